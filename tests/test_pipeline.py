"""`pipeline("ecg-analysis")`: with nothing but the saved folder, and with this package and its adapters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from test_remote_code import WITHOUT_THE_PACKAGE, run_python
from tiny_model import TINY_TASKS, save_tiny_model, tiny_model
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from data_builders.synthetic import SyntheticEcg, synthetic_ecg
from modeling_ecgmoe import EcgMoeFeatureExtractor, EcgMoePipeline
from modeling_ecgmoe.cli import main
from modeling_ecgmoe.leads import LEADS

WITHOUT_PEFT = 'import sys\nsys.modules["peft"] = None\n'

ANSWER_ARRAYS = """
import json
import numpy as np
from transformers import pipeline

folder, out, *adapters = sys.argv[1:]
given = np.load(folder + "/signals.npz")
more = {"adapters": adapters} if adapters else {}
analyse = pipeline("ecg-analysis", model=folder, trust_remote_code=True, **more)
names = [str(name) for name in given["names"]]
rows = [{"record_id": key, "signal": given[key], "sampling_rate": 250, "lead_names": names} for key in ("a", "b")]
report = {
    "module": type(analyse).__module__,
    "answers": analyse(rows, batch_size=2),
    "file": analyse(folder + "/signals.npz"),
    "imported": sorted(m for m in sys.modules if m == "modeling_ecgmoe" or m.startswith("modeling_ecgmoe.")),
}
open(out, "w").write(json.dumps(report))
"""


def heart(**kind: Any) -> np.ndarray:
    return synthetic_ecg(**{"sampling_rate": 250, "noise_mv": 0.01} | kind).ecg.signal


def row(signal: np.ndarray, record: str = "x", lead_names: Any = LEADS, rate: float | None = 250) -> dict[str, Any]:
    return {"record_id": record, "signal": signal, "sampling_rate": rate, "lead_names": list(lead_names)}


SIGNALS = {"a": heart(rate_bpm=60), "b": heart(rate_bpm=95, rhythm="atrial_fibrillation")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights, code and preprocessing, adapters beside it, and two recordings in it."""
    folder = save_tiny_model(tmp_path_factory.mktemp("hub"), simulated=("sex",))
    np.savez(folder / "signals.npz", names=np.array(LEADS), **SIGNALS)
    return folder


@pytest.fixture(scope="module")
def heads(model: Path) -> EcgMoePipeline:
    """The pipeline of this package, which answers with the model's own heads."""
    return pipeline("ecg-analysis", model=str(model))


@pytest.fixture(scope="module")
def adapted(model: Path) -> EcgMoePipeline:
    """The same with the adapters beside the model."""
    return pipeline("ecg-analysis", model=str(model), adapters=model.parent / "adapters")


def assert_alike(first: Any, second: Any) -> None:
    """Equal but for the last digit that answers are rounded to."""
    if isinstance(first, dict):
        assert list(first) == list(second)
        for key, value in first.items():
            assert_alike(value, second[key])
    elif isinstance(first, float):
        assert first == pytest.approx(second, abs=0.011)
    else:
        assert first == second


# Without this package


def run_elsewhere(model: Path, folder: Path, code: str, *adapters: Path) -> dict[str, Any]:
    """What a process that cannot import this package reports."""
    out, cache = folder / "report.json", str(folder / "modules")
    arguments = [str(model), str(out), *map(str, adapters)]
    run_python(code, *arguments, cwd=folder, isolated=True, HF_MODULES_CACHE=cache)
    report = json.loads(out.read_text())
    assert report["module"].startswith("transformers_modules.")
    assert report["imported"] == []
    return report


def test_the_saved_folder_answers_arrays_without_this_package_and_without_peft(
    model: Path, heads: EcgMoePipeline, tmp_path: Path
) -> None:
    report = run_elsewhere(model, tmp_path, WITHOUT_PEFT + WITHOUT_THE_PACKAGE + ANSWER_ARRAYS)
    assert [line["record"] for line in report["answers"]] == ["a", "b"]
    for line, signal in zip(report["answers"], SIGNALS.values(), strict=True):
        assert_alike(line, heads(row(signal, line["record"])))
    assert report["file"]["status"] == "error"
    assert "files are read by the package ecg-moe, which is not installed" in report["file"]["error"]


def test_the_saved_folder_answers_with_adapters_without_peft_too(
    model: Path, adapted: EcgMoePipeline, tmp_path: Path
) -> None:
    folders = [model.parent / "adapters" / name for name in ("sex", "age")]
    report = run_elsewhere(model, tmp_path, WITHOUT_PEFT + WITHOUT_THE_PACKAGE + ANSWER_ARRAYS, *folders)
    for line, signal in zip(report["answers"], SIGNALS.values(), strict=True):
        assert list(line["tasks"]) == ["sex", "age"]
        assert_alike(line, adapted(row(signal, line["record"]), tasks=["sex", "age"]))


# With this package


def test_the_command_line_gives_the_same_answers(
    model: Path, adapted: EcgMoePipeline, write_record: Callable[..., tuple[Path, SyntheticEcg]], tmp_path: Path
) -> None:
    paths = [write_record("short", duration_s=4)[0], write_record("long", duration_s=25)[0], tmp_path / "none.hea"]
    assert main(["predict", *map(str, paths), "--model", str(model), "--out", str(tmp_path / "out.jsonl")]) == 1
    expected = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    found = adapted([str(path) for path in paths], batch_size=3)
    assert [line["status"] for line in found] == ["ok", "ok", "error"]
    assert found[0]["tasks"]["sex"]["evidence"] == "simulated"
    assert found[1]["quality"]["windows"] == 3
    assert_alike(found, expected)


def test_whoever_has_the_package_need_not_trust_the_code_of_the_folder(heads: EcgMoePipeline) -> None:
    assert type(heads) is EcgMoePipeline


def test_a_pipeline_is_saved_with_its_code(heads: EcgMoePipeline, model: Path, tmp_path: Path) -> None:
    heads.save_pretrained(tmp_path)
    left_out = {"signals.npz"}
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in model.iterdir()} - left_out
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (model / path.name).read_bytes(), path.name


def test_a_model_in_memory_needs_its_feature_extractor() -> None:
    made = pipeline("ecg-analysis", model=tiny_model(), feature_extractor=EcgMoeFeatureExtractor())
    assert made(row(SIGNALS["a"]))["status"] == "ok"
    with pytest.raises(ValueError, match="pass feature_extractor"):
        EcgMoePipeline(tiny_model())


# What comes in


def test_an_array_comes_with_its_rate_and_its_leads(heads: EcgMoePipeline) -> None:
    line = heads(SIGNALS["a"], sampling_rate=250, lead_names=LEADS)
    assert_alike(line | {"record": "x"}, heads(row(SIGNALS["a"])))
    assert line["record"] is None


def test_an_array_in_another_unit_is_converted_where_it_says_so_and_refused_where_not(heads: EcgMoePipeline) -> None:
    whole = row(SIGNALS["a"])
    in_uv = whole | {"signal": SIGNALS["a"] * 1000.0}
    expected = heads(whole)
    assert_alike(heads(in_uv | {"unit": "uV"}), expected)
    assert_alike(heads(in_uv, unit="µV"), expected)
    assert "is the signal in uV? Pass it in mV" in heads(in_uv)["error"]
    assert "'bar' is not a voltage; expected V, mV, uV or nV" in heads(in_uv | {"unit": "bar"})["error"]


def test_lists_of_arrays_and_tuples_share_rate_and_leads(heads: EcgMoePipeline) -> None:
    signals = [signal[:2] for signal in SIGNALS.values()]
    lines = heads(signals, sampling_rate=250, lead_names=["I", "II"])
    assert [line["leads"] for line in lines] == [["I", "II"]] * 2
    assert_alike(heads(tuple(signals), sampling_rate=250, lead_names=["I", "II"]), lines)
    assert heads([]) == []


@pytest.fixture(scope="module")
def table() -> datasets.Dataset:
    """Rows as the builders make them."""
    return datasets.Dataset.from_list([row(signal.tolist(), name) for name, signal in SIGNALS.items()])


@pytest.mark.parametrize(
    "form",
    [
        lambda table: table,
        lambda table: table.with_format("numpy"),
        lambda table: table.to_iterable_dataset(),
        lambda table: (r for r in table),
        lambda table: KeyDataset(table.map(lambda r: {"ecg": r}), "ecg"),
    ],
    ids=["data set", "with arrays", "streamed", "generator", "key of a data set"],
)
def test_data_sets_are_answered_row_by_row(heads: EcgMoePipeline, table: datasets.Dataset, form: Any) -> None:
    lines = list(heads(form(table), batch_size=2))
    assert_alike(lines, [heads(row(signal, name)) for name, signal in SIGNALS.items()])


def test_batches_change_nothing_whatever_lengths_and_leads_they_mix(adapted: EcgMoePipeline) -> None:
    mixed = [
        row(SIGNALS["a"]),
        row(SIGNALS["b"][:1, :1000], lead_names=["I"]),
        row(heart(duration_s=25)),
        row(SIGNALS["b"], rate=0.0),
        row(SIGNALS["b"]),
    ]
    assert_alike(adapted(mixed, batch_size=5), [adapted(record) for record in mixed])
    assert_alike(adapted(mixed, batch_size=2), [adapted(record) for record in mixed])


@pytest.mark.parametrize("with_adapters", [True, False])
def test_weights_in_half_precision_answer_as_whole_ones_do(model: Path, with_adapters: bool) -> None:
    adapters = model.parent / "adapters" if with_adapters else None
    whole, half = (
        pipeline("ecg-analysis", model=str(model), adapters=adapters, dtype=dtype)(row(SIGNALS["a"]))["tasks"]
        for dtype in (torch.float32, torch.float16)
    )
    assert half["age"]["value"] == pytest.approx(whole["age"]["value"], abs=0.1)
    for label, probability in whole["sex"]["probabilities"].items():
        assert half["sex"]["probabilities"][label] == pytest.approx(probability, abs=0.01)


def test_adapters_on_weights_in_bfloat16_are_refused_with_what_to_do(model: Path) -> None:
    with pytest.raises(ValueError, match="its weights came in bfloat16, load them in float32 or float16"):
        pipeline("ecg-analysis", model=str(model), adapters=model.parent / "adapters", dtype=torch.bfloat16)


# What comes out


def test_the_models_own_heads_say_that_they_are_not_calibrated(heads: EcgMoePipeline) -> None:
    signal = SIGNALS["a"]
    tasks = heads(row(signal))["tasks"]
    features = EcgMoeFeatureExtractor()(signal, 250, LEADS, return_tensors="pt")
    features.pop("quality")
    with torch.no_grad():
        logits = tiny_model().eval()(**features).logits
    assert set(tasks) == set(TINY_TASKS)
    assert all(answer["calibrated"] is False for answer in tasks.values())
    assert tasks["age"]["value"] == pytest.approx(60 + 17 * logits["age"].item(), abs=0.01)
    assert "interval" not in tasks["age"]
    assert tasks["superclass"]["probabilities"]["MI"] == pytest.approx(
        logits["superclass"].sigmoid()[0, 1].item(), abs=1e-3
    )


def test_adapters_are_calibrated(adapted: EcgMoePipeline) -> None:
    tasks = adapted(row(SIGNALS["a"]))["tasks"]
    assert len(tasks["age"]["interval"]) == 2
    assert not any("calibrated" in answer for answer in tasks.values())


def test_tasks_can_be_chosen_when_it_is_made_and_when_it_is_called(model: Path, heads: EcgMoePipeline) -> None:
    chosen = pipeline("ecg-analysis", model=str(model), tasks=["sex", "age"], batch_size=2)
    assert [list(line["tasks"]) for line in chosen([row(SIGNALS["a"])] * 2)] == [["sex", "age"]] * 2
    assert list(heads(row(SIGNALS["a"]), tasks="age")["tasks"]) == ["age"]
    with pytest.raises(ValueError, match="no answer to weight; there are age, arrhythmia"):
        heads(row(SIGNALS["a"]), tasks=["age", "weight"])
    with pytest.raises(ValueError, match="no answer to weight; there are age, arrhythmia"):
        pipeline("ecg-analysis", model=str(model), tasks=["weight"])


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (row(SIGNALS["a"], rate=None), "sampling_rate None"),
        ({"record_id": "x", "signal": SIGNALS["a"], "sampling_rate": 250}, "lead_names None"),
        (row(SIGNALS["a"][0]), "found shape (2500,)"),
        ({"record_id": "x"}, "with sampling_rate"),
        (row(np.zeros((12, 2500), np.float32)), "all leads are flat"),
        (row(SIGNALS["a"][:, :100]), "shorter than the 2 s"),
        (row(SIGNALS["a"], rate=2e6), "2e+06 Hz"),
        (row(SIGNALS["a"][:2]), "12"),
        (row("text"), "could not convert"),
    ],
    ids=["rate", "leads", "one axis", "no signal", "flat", "short", "absurd rate", "too many names", "text"],
)
def test_what_cannot_be_answered_says_why_and_the_others_go_on(heads: EcgMoePipeline, record: Any, words: str) -> None:
    good = row(SIGNALS["a"])
    first, bad, last = heads([good, record, good], batch_size=3)
    assert set(bad) == {"record", "path", "status", "error"}
    assert bad["status"] == "error"
    assert bad["error"].startswith("x: ")
    assert words in bad["error"]
    assert first["status"] == last["status"] == "ok"


def test_an_unknown_parameter_is_refused_with_the_known_ones(heads: EcgMoePipeline) -> None:
    with pytest.raises(ValueError, match="unknown parameters rate; known are tasks, sampling_rate, lead_names and"):
        heads(SIGNALS["a"], rate=250)
