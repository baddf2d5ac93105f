"""The web page: what it shows of a real file, and that it says what is wrong with a bad one."""

import importlib
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from tiny_model import TINY_TASKS, save_tiny_model

from data_builders.synthetic import SyntheticEcg, synthetic_ecg, write_wfdb
from modeling_ecgmoe.adapters import MultiTask
from modeling_ecgmoe.commands import load_model
from modeling_ecgmoe.ecg_files import Ecg
from modeling_ecgmoe.leads import LEADS
from modeling_ecgmoe.prediction import FileFacts, predict_record

ROOT = Path(__file__).resolve().parents[1]
SPACE = ROOT / "space"
WriteRecord = Callable[..., tuple[Path, SyntheticEcg]]
DEVICE_WARNING = "not a medical device"


@pytest.fixture(scope="module")
def app() -> Iterator[ModuleType]:
    """space/app.py as the Space runs it: with its own folder on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SPACE)
        yield importlib.import_module("app")


@pytest.fixture(scope="module")
def plotting(app: ModuleType) -> ModuleType:
    return importlib.import_module("plotting")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> MultiTask:
    return load_model(str(save_tiny_model(tmp_path_factory.mktemp("hub"), simulated=("sex",))), None)


def page_functions(page: Any) -> dict[str, Callable[..., Any]]:
    """The functions behind the page by the names under which its API offers them."""
    return {function.api_name: function.fn for function in page.fns.values()}


def colours_of(image: Image.Image) -> set[str]:
    colours = image.getcolors(maxcolors=image.width * image.height) or []
    return {"#{:02x}{:02x}{:02x}".format(*colour[:3]) for _, colour in colours}


def test_a_file_gives_the_line_of_the_command_line(
    app: ModuleType, many: MultiTask, write_record: WriteRecord
) -> None:
    path, _ = write_record()
    *_, line = app.analyse(many, path, FileFacts())
    expected, _ = predict_record(many, path)
    assert line == {key: value for key, value in expected.items() if key != "path"}


def test_a_file_gives_every_answer_the_quality_and_two_pictures(
    app: ModuleType, many: MultiTask, write_record: WriteRecord
) -> None:
    path, truth = write_record()
    message, sheet, answers, experts, line = app.analyse(many, path, FileFacts())
    assert f"{len(truth.r_peaks_s)} beats in 10 s" in message
    assert "Leads used: I, II, III" in message
    assert all(task in answers for task in TINY_TASKS)
    assert f"{line['tasks']['age']['value']:.0f} years" in answers
    assert isinstance(sheet, Image.Image)
    assert isinstance(experts, Image.Image)


def test_answers_from_simulated_training_say_so(app: ModuleType, many: MultiTask, write_record: WriteRecord) -> None:
    path, _ = write_record()
    _, _, answers, _, _ = app.analyse(many, path, FileFacts())
    assert answers.count("[evidence: simulated]") == 1


def test_labels_come_with_their_meaning(app: ModuleType) -> None:
    (cell,) = app.label_cells({"labels": ["AFIB"], "probabilities": {"SR": 0.2, "AFIB": 0.9}})
    assert "atrial fibrillation" in cell
    assert "0.90" in cell


def test_without_a_label_the_nearest_is_named(app: ModuleType) -> None:
    (cell,) = app.label_cells({"labels": [], "probabilities": {"SR": 0.2, "AFIB": 0.1}})
    assert "none; nearest SR" in cell


def test_a_bad_file_is_told_in_words(app: ModuleType, many: MultiTask, write_record: WriteRecord) -> None:
    path, _ = write_record()
    path.with_suffix(".dat").unlink()
    message, *rest = app.analyse(many, path, FileFacts())
    assert message.startswith("**Not answered.** record: ")
    assert "record.dat" in message
    assert rest == [None, "", None, None]


def test_what_a_file_is_called_cannot_write_html(app: ModuleType, many: MultiTask, tmp_path: Path) -> None:
    message, *_ = app.analyse(many, tmp_path / "<img src=x>.npy", FileFacts())
    assert "<img" not in message


def test_the_upload_scatters_files_and_the_page_gathers_them(
    app: ModuleType, many: MultiTask, write_record: WriteRecord, tmp_path: Path
) -> None:
    path, _ = write_record()
    scattered = []
    for file in (path, path.with_suffix(".dat")):
        (tmp_path / file.suffix[1:]).mkdir()
        scattered.append(str(file.rename(tmp_path / file.suffix[1:] / file.name)))
    show_upload = page_functions(app.build_page(many))["predict"]
    *_, line = show_upload(scattered, None, None, None)
    assert line["status"] == "ok"


def test_two_records_at_once_are_refused(app: ModuleType, many: MultiTask, write_record: WriteRecord) -> None:
    files = [str(p) for name in ("one", "two") for p in write_record(name)[0].parent.glob(f"{name}.*")]
    message, *rest = page_functions(app.build_page(many))["predict"](files, None, None, None)
    assert "One record at a time" in message
    assert rest == [None, "", None, None]


def test_what_an_array_does_not_say_can_be_typed_in(app: ModuleType, many: MultiTask, tmp_path: Path) -> None:
    np.save(tmp_path / "bare.npy", synthetic_ecg(sampling_rate=200).ecg.signal)
    show_upload = page_functions(app.build_page(many))["predict"]
    message, *_ = show_upload([str(tmp_path / "bare.npy")], None, "", "")
    assert message.startswith("**Not answered.**")
    *_, line = show_upload([str(tmp_path / "bare.npy")], 200, "mV", ", ".join(LEADS))
    assert line["sampling_rate"] == 200


def test_every_bundled_example_is_answered(app: ModuleType, many: MultiTask) -> None:
    show_example = page_functions(app.build_page(many))["example"]
    assert app.example_records()
    for name in app.example_records():
        *_, line = show_example(name)
        assert line["record"] == name


def test_the_page_says_that_it_is_not_a_medical_device(app: ModuleType, many: MultiTask) -> None:
    texts = [str(component.get("props", {}).get("value")) for component in app.build_page(many).config["components"]]
    assert any(DEVICE_WARNING in text for text in texts)
    assert DEVICE_WARNING in (SPACE / "README.md").read_text("utf-8")


def test_the_sheet_is_to_scale(plotting: ModuleType) -> None:
    # A step of 1 mV at 5 s in lead II: on the rhythm strip it is 10 mm high and lies 125 mm from the strip's start.
    signal = np.full((12, 1000), np.nan)
    signal[LEADS.index("II")] = np.where(np.arange(1000) < 501, 0.0, 1.0)
    sheet = plotting.draw_sheet(signal, 100.0, ["II"], [], [], "step")
    pixels_per_mm = plotting.DPI / plotting.MM_PER_INCH
    dark = np.asarray(sheet.convert("L")) < 90
    strip_mm = plotting.TOP_MM + 3 * plotting.ROW_MM
    rows = slice(round((strip_mm - 2) * pixels_per_mm), round((strip_mm + plotting.ROW_MM) * pixels_per_mm))
    columns = [round((plotting.LEFT_MM + mm) * pixels_per_mm) for mm in (115, 135)]
    before, after = (float(np.flatnonzero(dark[rows, column]).mean()) / pixels_per_mm for column in columns)
    assert before - after == pytest.approx(10, abs=0.3)
    base_row = rows.start + round(before * pixels_per_mm)
    row = dark[base_row, round(plotting.LEFT_MM * pixels_per_mm) :]
    assert np.flatnonzero(row).max() / pixels_per_mm == pytest.approx(125, abs=0.5)


def test_beats_have_the_colours_of_their_experts(plotting: ModuleType) -> None:
    truth = synthetic_ecg(sampling_rate=250)
    num_beats = len(truth.r_peaks_s)
    experts = [0, 2] * num_beats
    sheet = plotting.draw_sheet(truth.ecg.signal, 250.0, LEADS, truth.r_peaks_s, experts[:num_beats], "two experts")
    assert {plotting.colour_of(0), plotting.colour_of(2)} <= colours_of(sheet)
    assert plotting.colour_of(1) not in colours_of(sheet)


@pytest.mark.parametrize("duration_s", [2.0, 10.0, 60.0])
def test_a_recording_of_any_length_is_drawn(
    app: ModuleType, many: MultiTask, write_record: WriteRecord, duration_s: float
) -> None:
    path, _ = write_record(duration_s=duration_s, rate_bpm=90)
    _, sheet, *_ = app.analyse(many, path, FileFacts())
    assert sheet is not None


def test_a_recording_of_one_lead_is_drawn(app: ModuleType, many: MultiTask, tmp_path: Path) -> None:
    ecg = synthetic_ecg(sampling_rate=250).ecg
    path = write_wfdb(Ecg(ecg.signal[7:8], ecg.sampling_rate, ("V2",)), tmp_path, "single")
    _, sheet, _, _, line = app.analyse(many, path, FileFacts())
    assert line["leads"] == ["V2"]
    assert sheet is not None


def test_a_title_is_text_and_not_a_formula(plotting: ModuleType) -> None:
    plotting.draw_sheet(np.zeros((12, 1000)), 100.0, LEADS, [], [], r"50$ \frac{$")


def test_the_space_asks_for_the_versions_that_were_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = {
        canonicalize_name(requirement.name)
        for requirement in map(Requirement, [*project["dependencies"], *extras["space"], *extras["formats"]])
    }
    asked = dict(re.findall(r"^([^#=\s]+)==(\S+)$", (SPACE / "requirements.txt").read_text("utf-8"), re.MULTILINE))
    tested = dict(re.findall(r"^([^#=\s]+)==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE))
    tested = {canonicalize_name(name): version for name, version in tested.items()}
    asked = {canonicalize_name(name): version for name, version in asked.items()}
    assert set(asked) == needed - {"gradio", project["name"]}
    assert {name: tested[name] for name in asked} == asked


def test_a_space_opens_the_model_that_its_header_names(
    app: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert app.own_model() is None
    monkeypatch.setattr(app, "HERE", tmp_path)
    (tmp_path / "README.md").write_text("---\nsdk: gradio\nmodels:\n- me/tiny\n---\n")
    assert app.own_model() == "me/tiny"


def test_the_header_of_the_space_fits_the_source_tree() -> None:
    _, header, _ = (SPACE / "README.md").read_text("utf-8").split("---\n", 2)
    fields = yaml.safe_load(header)
    assert fields["sdk"] == "gradio"
    assert f"gradio=={fields['sdk_version']}" in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    assert (SPACE / fields["app_file"]).is_file()
    assert fields["license"] == "apache-2.0"
    assert len(fields["short_description"]) <= 60
