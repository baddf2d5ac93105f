"""What is published: the weights in hub/ answer, their code is the package's, and adapters fit their base."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from test_layout import hub_files
from test_remote_code import WITHOUT_THE_PACKAGE, python_of, run_python

from data_builders.synthetic import synthetic_ecg
from modeling_ecgmoe.adapter_card import BASE_MODEL, AdapterCard, renew_card
from modeling_ecgmoe.adapters import MultiTask
from modeling_ecgmoe.ecg_files import read_ecg

ROOT = Path(__file__).resolve().parents[1]
MODEL, ADAPTERS = ROOT / "hub" / "model", ROOT / "hub" / "adapters"
PUBLISHED = ("age", "arrhythmia", "rr_interval", "sex", "statements", "superclass")


@pytest.fixture(scope="module")
def many() -> MultiTask:
    """The published model with all its adapters."""
    return MultiTask.from_pretrained(MODEL)


def answers(many: MultiTask, name: str) -> dict:
    ecg = read_ecg(ROOT / "examples" / f"{name}.hea")
    return many.answer([many.prepare(ecg.signal, ecg.sampling_rate, ecg.lead_names)])[0]


def test_the_code_beside_the_weights_is_the_packages() -> None:
    stale = [p.name for p in MODEL.glob("*.py") if p.read_text() != (ROOT / "modeling_ecgmoe" / p.name).read_text()]
    assert stale == [], "run `make hub`"
    assert {path.stem for path in MODEL.glob("*.py")} == set(hub_files()), "save the model anew: its imports changed"


def test_all_adapters_are_there_and_fit_the_base(many: MultiTask) -> None:
    assert tuple(sorted(many.cards)) == PUBLISHED
    assert {card.base for card in many.cards.values()} == {many.base}


@pytest.mark.parametrize("task", PUBLISHED)
def test_an_adapter_says_what_it_needs(task: str) -> None:
    card = AdapterCard.load(ADAPTERS / task)
    config = json.loads((ADAPTERS / task / "adapter_config.json").read_text())
    assert config["auto_mapping"] is None
    assert not Path(config["base_model_name_or_path"]).is_absolute()
    assert card.metrics
    assert card.trained_on
    assert card.half_widths if card.task.kind == "regression" else len(card.thresholds) == card.task.num_outputs
    with safe_open(ADAPTERS / task / "adapter_model.safetensors", "np") as weights:
        assert all("fusion" in name or f"head_{task}" in name for name in weights.keys())  # noqa: SIM118


@pytest.mark.parametrize("task", PUBLISHED)
def test_an_adapter_holds_the_codes_and_the_page_of_today(task: str, tmp_path: Path) -> None:
    shutil.copytree(ADAPTERS / task, tmp_path / task)
    renew_card(tmp_path / task)
    assert (tmp_path / task / "task.json").read_bytes() == (ADAPTERS / task / "task.json").read_bytes(), (
        "run `python -m modeling_ecgmoe.adapter_card hub/adapters/*` and `make tables`"
    )
    page, renewed = ((folder / task / "README.md").read_text() for folder in (ADAPTERS, tmp_path))
    body = renewed.split("---\n", 2)[2]
    assert [line for line in body.splitlines() if line not in page] == []


def test_what_the_models_page_shows_runs_without_this_package(tmp_path: Path) -> None:
    code = "".join(python_of(MODEL / "README.md")).replace(f"{BASE_MODEL}-age", str(ADAPTERS / "age"))
    np.save(tmp_path / "signal.npy", synthetic_ecg(sampling_rate=500).ecg.signal[:2])
    given = f'{WITHOUT_THE_PACKAGE}\nimport numpy\nsignal_mv = numpy.load("signal.npy")\n'
    code = given + code.replace(BASE_MODEL, str(MODEL)) + "\nprint(embedding.shape, logits.shape)"
    shown = run_python(code, cwd=tmp_path, isolated=True, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert shown.strip() == "torch.Size([1, 256]) torch.Size([1, 1])"


def test_the_model_file_is_small_enough_to_keep_in_git() -> None:
    assert (MODEL / "model.safetensors").stat().st_size < 20e6


@pytest.mark.parametrize("rate_bpm", [45, 60, 75, 110])
def test_the_rr_interval_of_a_synthetic_heart_is_right_within_ten_milliseconds(many: MultiTask, rate_bpm: int) -> None:
    ecg = synthetic_ecg(sampling_rate=500, duration_s=10, rate_bpm=rate_bpm).ecg
    record = many.prepare(ecg.signal, ecg.sampling_rate, ecg.lead_names)
    assert many.answer([record])[0]["rr_interval"]["value"] == pytest.approx(60_000 / rate_bpm, abs=10)


def test_the_rr_interval_of_an_irregular_heart_is_less_certain(many: MultiTask) -> None:
    widths = {}
    for duration_s in (10, 60):
        for rhythm in ("sinus", "atrial_fibrillation"):
            ecg = synthetic_ecg(sampling_rate=250, duration_s=duration_s, rhythm=rhythm, seed=1).ecg
            record = many.prepare(ecg.signal, ecg.sampling_rate, ecg.lead_names)
            low, high = many.answer([record])[0]["rr_interval"]["interval"]
            widths[duration_s, rhythm] = high - low
    assert widths[10, "atrial_fibrillation"] > 3 * widths[10, "sinus"]
    # Each window has its own missed beats: many of them make no interval of the whole recording certain.
    assert widths[60, "atrial_fibrillation"] > 3 * widths[60, "sinus"] > widths[10, "sinus"]


def test_examples_get_their_rhythm(many: MultiTask) -> None:
    assert "AFIB" in answers(many, "atrial_fibrillation")["arrhythmia"]["labels"]
    assert answers(many, "sinus_75bpm")["arrhythmia"]["probabilities"]["SR"] > 0.5


def test_fewer_leads_give_wider_intervals(many: MultiTask) -> None:
    widths = many.cards["age"].half_widths
    assert widths["12"] < widths["6"] < widths["1"]


def test_age_and_sex_of_real_records_are_mostly_right(many: MultiTask, test_data: Path) -> None:
    import datasets

    from data_builders.ptb_xl import PtbXl

    builder = PtbXl(config_name="100hz", data_dir=test_data / "ptb-xl", cache_dir=test_data / "cache")
    datasets.disable_progress_bars()
    builder.download_and_prepare()
    rows = builder.as_dataset("validation").select(range(200)).with_format("numpy")
    rows = rows.select_columns(["signal", "sampling_rate", "lead_names", "age", "sex"])
    records = [many.prepare(np.array(r["signal"]), float(r["sampling_rate"]), list(r["lead_names"])) for r in rows]
    found = many.answer(records)
    ages = np.array([np.nan if r["age"] is None else r["age"] for r in rows], float)
    errors = np.abs(np.array([a["age"]["value"] for a in found]) - ages)
    assert np.nanmean(errors) < 9.0
    sexes = (
        np.array([a["sex"]["labels"][0] for a in found]) == np.array(["male", "female"])[[int(r["sex"]) for r in rows]]
    )
    assert sexes.mean() > 0.75
