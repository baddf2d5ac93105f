"""What would be published: complete, filled from what was measured, and nothing in it that has to stay here."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from safetensors.numpy import load_file, save_file
from test_layout import hub_files, model_files
from tiny_model import save_tiny_model

from benchmarks import cards as hub_cards
from data_builders import find_builder
from data_builders.ptb_xl import FACTS
from modeling_ecgmoe.adapter_card import AdapterCard
from modeling_ecgmoe.cards import calibration_results, fill_card, model_header, results_table
from modeling_ecgmoe.leaks import find_leaks
from modeling_ecgmoe.publish import adapter_upload, model_upload, space_upload
from modeling_ecgmoe.publish_dataset import dataset_upload
from modeling_ecgmoe.tasks import Task
from modeling_ecgmoe.upload import PublishError, Upload

ROOT = Path(__file__).resolve().parents[1]
RESULTS = {
    "command": "python -m benchmarks.quality", "commit": "0123456789abcdef", "data": {"set": "PTB-XL, fold 9"},
    "dataset": {"id": "me/ptb-xl", "config": "100hz", "split": "validation"},
    "rows": [
        {"model": "ours", "metrics": {"age": {
            "metric": "mae", "value": 7.1234567, "low": 6.9, "high": 7.4, "level": 0.95, "n": 2141}}},
        {"model": "constant", "metrics": {"age": {
            "metric": "mae", "value": 13.8, "low": 13.4, "high": 14.3, "level": 0.95, "n": 2141}}},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("hub"), tasks=("age",))


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A model that a test may spoil, with an adapter beside it."""
    shutil.copytree(saved.parent, tmp_path / "hub")
    return tmp_path / "hub" / "model"


def header_of(upload: Upload) -> dict:
    return yaml.safe_load(upload.page().split("---\n")[1])


# What goes


def test_a_model_goes_with_its_weights_settings_and_all_code_that_it_reaches(model: Path) -> None:
    upload = model_upload(model, "me/tiny")
    assert {Path(name).stem for name in upload.files if name.endswith(".py")} == set(hub_files())
    assert {"config.json", "preprocessor_config.json", "model.safetensors", "README.md"} <= set(upload.files)


def test_what_is_no_part_of_a_model_stays_and_is_named(model: Path) -> None:
    (model / "optimizer.bin").write_bytes(b"\0")
    (model / "notes.txt").write_text("buy milk")
    upload = model_upload(model, "me/tiny")
    assert upload.left_out == ["notes.txt", "optimizer.bin"]
    assert not {"notes.txt", "optimizer.bin"} & set(upload.files)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "routing.py").unlink(), "lacks routing.py, which its code needs"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "it lacks preprocessor_config.json"),
        (lambda folder: (folder / "beats.py").write_text("def ("), "beats.py, line 1: this is no Python"),
        (lambda folder: (folder / "results.json").write_text("{"), "results.json is not JSON"),
        (lambda folder: (folder / "results.json").write_text("{}"), "missing or empty: command, commit"),
        (shutil.rmtree, "there is no folder"),
    ],
)
def test_a_model_that_nobody_could_open_is_refused(model: Path, spoil, says: str) -> None:
    spoil(model)
    with pytest.raises(PublishError, match=says):
        model_upload(model, "me/tiny")


def test_a_map_of_classes_that_lacks_one_is_refused(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    del config["auto_map"]["AutoModel"]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(PublishError, match="has no AutoModel in its auto_map"):
        model_upload(model, "me/tiny")


def test_an_adapter_names_its_base_by_id_and_commit(model: Path) -> None:
    upload = adapter_upload(model.parent / "adapters" / "age", "me/tiny-age", "me/tiny", "a" * 40)
    config = json.loads(upload.files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/tiny", "a" * 40)
    assert config["auto_mapping"] is None
    header = header_of(upload)
    assert header["base_model"] == "me/tiny"
    assert {"ecg", "electrocardiogram", "lora", "base_model:adapter:me/tiny", "age"} <= set(header["tags"])
    assert (header["library_name"], header["license"], header["pipeline_tag"]) == ("peft", "apache-2.0", "other")
    assert 'MultiTask.from_pretrained("me/tiny", tasks=["me/tiny-age"])' in upload.page()


def test_a_folder_that_is_no_adapter_is_refused(model: Path) -> None:
    with pytest.raises(PublishError, match=r"is not an adapter: it lacks adapter_config.json"):
        adapter_upload(model, "me/tiny-age", "me/tiny", None)


def test_the_web_page_goes_with_the_package_and_its_model(model: Path) -> None:
    upload = space_upload(ROOT, "me/page", str(model))
    assert {f"modeling_ecgmoe/{name}.py" for name in model_files()} <= set(upload.files)
    assert {"app.py", "plotting.py", "requirements.txt", "README.md", "examples/sinus_75bpm.hea"} <= set(upload.files)
    assert {"hub/model/model.safetensors", "hub/adapters/age/task.json"} <= set(upload.files)


def test_the_web_page_may_load_a_model_by_its_id(model: Path) -> None:
    upload = space_upload(ROOT, "me/page", "me/tiny")
    header = header_of(upload)
    assert (header["models"], header["preload_from_hub"]) == (["me/tiny"], ["me/tiny"])
    assert header["sdk"] == "gradio"
    assert not [name for name in upload.files if name.startswith("hub/")]


def test_the_web_page_without_its_source_tree_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PublishError, match=r"holds no space/; publish it from the source tree"):
        space_upload(tmp_path, "me/page", "me/tiny")


# Pages


def test_results_are_on_the_page_in_its_header_and_in_a_file_of_their_own(model: Path) -> None:
    (model / "results.json").write_text(json.dumps(RESULTS))
    upload = model_upload(model, "me/tiny")
    (measured,) = model_index_to_eval_results(header_of(upload)["model-index"])[1]
    assert (measured.metric_type, measured.metric_value) == ("mae", 7.1235)
    assert measured.metric_name == "age: MAE (years), 95% interval 6.9 to 7.4"
    assert (measured.dataset_type, measured.dataset_config, measured.dataset_split) == (
        "me/ptb-xl", "100hz", "validation",
    )  # fmt: skip
    (entry,) = yaml.safe_load(upload.files[".eval_results/ptb-xl.yaml"])
    assert entry["dataset"] == {"id": "me/ptb-xl", "task_id": "age"}
    assert entry["value"] == 7.1235
    assert "95% interval 6.9 to 7.4, 2141 records" in entry["notes"]
    assert "| age | MAE (years) ↓ | 7.12 [6.90, 7.40] | 13.8 [13.4, 14.3] | 2,141 |" in upload.page()


def test_without_results_the_page_claims_none(model: Path) -> None:
    upload = model_upload(model, "me/tiny")
    assert "model-index" not in header_of(upload)
    assert not [name for name in upload.files if name.startswith(".eval_results")]


def test_what_people_wrote_on_a_page_stays(model: Path) -> None:
    (model / "README.md").write_text("---\nlanguage: en\ntags:\n- mine\n---\n\n# My model\n\nMade at home.\n")
    upload = model_upload(model, "me/tiny")
    assert "# My model\n\nMade at home.\n" in upload.page()
    assert header_of(upload)["language"] == "en"
    assert {"mine", "ecg"} <= set(header_of(upload)["tags"])


def test_filling_a_page_twice_changes_nothing() -> None:
    header, table = model_header(None, None), results_table(RESULTS)
    once = fill_card("# A model\n", header, "tiny", [], table)
    assert fill_card(once, header, "tiny", [], table) == once


def test_every_metric_of_an_adapter_has_its_own_interval() -> None:
    task = Task("axis", "multi_class", "axis", "axis", labels=("a", "b", "c"))
    own = {"validation_accuracy": 0.8, "accuracy_low": 0.6, "accuracy_high": 0.9}
    card = AdapterCard(task, "abc", metrics={"validation_macro_auroc": 0.9, "low": 0.7, "high": 1.0} | own)
    auroc, accuracy = calibration_results(card, {})
    assert "95% interval 0.7 to 1," in auroc.metric_name
    assert "95% interval 0.6 to 0.9," in accuracy.metric_name


def test_an_adapter_without_results_shows_what_its_calibration_measured() -> None:
    card = AdapterCard.load(ROOT / "hub" / "adapters" / "age")
    (result,) = calibration_results(card, {"dataset": "ptb_xl", "config_name": "100hz"})
    measured = card.metrics
    assert (result.metric_type, result.metric_value, result.dataset_type) == (
        "mae",
        measured["validation_mae"],
        "ptb_xl",
    )
    interval = f"95% interval {measured['low']:.4g} to {measured['high']:.4g}, on the data of the calibration"
    assert interval in str(result.metric_name)


def test_hub_says_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert hub_cards.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", ["model", *(f"adapters/{p.name}" for p in (ROOT / "hub" / "adapters").iterdir())])
def test_a_page_in_hub_has_a_header_that_the_client_reads(name: str) -> None:
    card = ModelCard.load(ROOT / "hub" / name / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.eval_results


@pytest.mark.parametrize("folder", sorted((ROOT / "hub" / "datasets").iterdir()), ids=lambda path: path.name)
def test_the_page_of_a_data_set_in_hub_fits_its_builder(folder: Path) -> None:
    card = DatasetCard.load(folder / "README.md")
    builder = find_builder(folder.name)
    for text in (builder.FACTS.doi, builder.FACTS.citation, f"licence | {builder.FACTS.license} |"):
        assert text in card.text
    known = {config.name: config for config in builder.BUILDER_CONFIGS}
    names = [config["config_name"] for config in card.data.configs]
    assert set(names) <= set(known)
    infos = card.data.dataset_info
    for info in infos if isinstance(infos, list) else [infos]:
        features = builder(config_name=info["config_name"], data_dir=folder).info.features
        assert [column["name"] for column in info["features"]] == list(features)


# What stays


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("token = " + "hf_" + "a1B2" * 9, "a Hugging Face token"),
        ("key: AKIA" + "ABCDEFGHIJKLMNOP", "a key of Amazon Web Services"),
        ("-----BEGIN RSA " + "PRIVATE KEY-----", "a private key"),
        ("https://me:" + "sesame@example.org/x", "a password in an address"),
        ("see /home/" + "someone/data", "an absolute path"),
        ('"data_dir": "/mnt/' + 'ecg/ptb-xl"', "an absolute path"),
        (r"C:\Users" + r"\someone\data", "an absolute path"),
        ("copied from 192.168" + ".1.20", "an address of a private network"),
        ("node17.cluster" + ".internal", "a host of a private network"),
    ],
)
def test_a_trace_is_found_with_its_file_and_line(text: str, what: str) -> None:
    (leak,) = find_leaks({"training.json": f"{{\n{text}\n}}".encode()})
    assert (leak.path, leak.place, leak.what) == ("training.json", "line 2", what)
    assert "sesame" not in str(leak)
    assert "a1B2a1B2" not in str(leak)


@pytest.mark.parametrize(
    "text",
    [
        "https://physionet.org/files/ptb-xl/1.0.3/", "`python -m benchmarks.quality --data_dir ptb-xl`", "and/or 1/2",
        "http://127.0.0.1:7860", "doi.org/10.13026/kfzx-aw45", "password", "hub/model/config.json", "../data/home/x",
    ],
)  # fmt: skip
def test_harmless_text_is_not_taken_for_a_trace(text: str) -> None:
    assert list(find_leaks({"README.md": text.encode()})) == []


def test_the_name_of_this_machine_and_the_token_in_use_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "gpu-node-7")
    files = {"log.jsonl": b'{"host": "gpu-node-7"}\n{"t": "s3cret-of-mine"}'}
    found = [(leak.place, leak.what) for leak in find_leaks(files, token="s3cret-of-mine")]
    assert found == [("line 1", "the name of this machine"), ("line 2", "the token in use")]


def test_the_metadata_of_weights_is_read_too(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt", "from": "/home/" + "someone/run"})
    with pytest.raises(PublishError, match=r"model.safetensors, metadata 'from': an absolute path \(/home/someone\)"):
        model_upload(model, "me/tiny").check()


def test_a_trace_in_the_training_arguments_is_refused(model: Path) -> None:
    (model / "training.json").write_text('{\n  "trunk": "/scratch/' + 'me/run"\n}\n')
    with pytest.raises(PublishError, match=r"nothing was sent, take this out first: training.json, line 2"):
        model_upload(model, "me/tiny").check()


def test_what_this_project_publishes_holds_no_trace() -> None:
    space_upload(ROOT, "me/page", str(ROOT / "hub" / "model")).check()
    model_upload(ROOT / "hub" / "model", "me/model").check()


def test_help_comes_without_loading_a_library() -> None:
    code = (
        "import sys\nfrom modeling_ecgmoe.cli import main\n"
        "try:\n    main(['publish', 'dataset', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'huggingface_hub', 'torch', 'numpy', 'datasets'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--dry_run" in done.stdout


# A data set


@pytest.fixture(scope="module")
def rows() -> dict:
    import datasets

    features = datasets.Features(
        {
            "record_id": datasets.Value("string"), "patient_id": datasets.Value("string"),
            "signal": datasets.Array2D((2, 50), "float32"), "sex": datasets.ClassLabel(names=["male", "female"]),
            "superclass": datasets.List(datasets.Value("string")), "report": datasets.Value("string"),
        }
    )  # fmt: skip
    columns = {
        "record_id": ["a", "b", "c"], "patient_id": ["1", "1", "2"], "signal": [np.zeros((2, 50), "float32")] * 3,
        "sex": [0, None, 1], "superclass": [["NORM"], None, ["MI", "HYP"]], "report": ["fine", None, "bad"],
    }  # fmt: skip
    return {"100hz": datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns, features=features)})}


def test_the_page_of_a_data_set_says_where_it_comes_from_and_counts_what_is_there(rows: dict, tmp_path: Path) -> None:
    upload = dataset_upload(rows, FACTS, "me/ptb-xl", tmp_path)
    page, header = upload.page(), header_of(upload)
    files = [{"split": "train", "path": "data/100hz/train-*"}]
    assert header["configs"] == [{"config_name": "100hz", "data_files": files, "default": True}]
    assert (header["license"], header["size_categories"]) == ("cc-by-4.0", ["n<1K"])
    assert header["dataset_info"]["splits"][0]["num_examples"] == 3
    for text in (FACTS.doi, FACTS.citation, "CC BY 4.0", "| 100hz | train | 3 | 2 |", "| `sex` | unknown | 1 |",
                 "| `superclass` | NORM | 1 |", "float32 (2, 50)", 'load_dataset("me/ptb-xl", "100hz", split="train")',
                 "The source has 21,799 records, this copy 3 rows in 100hz", "ethics"):  # fmt: skip
        assert text in page, text


def test_a_credentialed_data_set_is_refused_with_the_reason(rows: dict, tmp_path: Path) -> None:
    closed = replace(FACTS, title="MIMIC-IV-ECG", access="credentialed")
    with pytest.raises(PublishError, match="MIMIC-IV-ECG is credentialed: who has it has agreed not to share it"):
        dataset_upload(rows, closed, "me/mimic", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_path_in_a_column_of_texts_is_refused(rows: dict, tmp_path: Path) -> None:
    spoiled = rows["100hz"].map(lambda row: {"report": "/home/" + "someone/a.dat" if row["record_id"] == "b" else ""})
    with pytest.raises(PublishError, match=r"100hz, train, column report, line 2: an absolute path"):
        dataset_upload({"100hz": spoiled}, FACTS, "me/ptb-xl", tmp_path)


def test_a_licence_that_the_hub_has_no_word_for_is_named_and_linked(rows: dict, tmp_path: Path) -> None:
    upload = dataset_upload(rows, replace(FACTS, license="Own licence 2"), "me/ptb-xl", tmp_path)
    header = header_of(upload)
    assert (header["license"], header["license_name"]) == ("other", "Own licence 2")
    assert header["license_link"] == f"https://doi.org/{FACTS.doi}"
