"""A saved folder opened by people who do not have this package, and by people who have it and import it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_model import tiny_model

from data_builders.synthetic import synthetic_ecg
from modeling_ecgmoe.feature_extraction_ecgmoe import EcgMoeFeatureExtractor
from modeling_ecgmoe.leads import LEADS

ROOT = Path(__file__).resolve().parents[1]

# Forgets every folder in which this package could be found, and the finders of editable installations.
WITHOUT_THE_PACKAGE = """
import importlib.util, pathlib, sys
sys.path = [p for p in sys.path if not (pathlib.Path(p or ".") / "modeling_ecgmoe").exists()]
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
assert importlib.util.find_spec("modeling_ecgmoe") is None, "the package can be imported here"
"""

OPEN_THE_FOLDER = """
import json
import numpy as np, torch, transformers
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForTimeSeriesPrediction

folder, out = sys.argv[1:]
given = np.load(folder + "/signal.npz")
extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
features = extractor(
    given["signal"], sampling_rate=250, lead_names=[str(name) for name in given["names"]], return_tensors="pt"
)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
whole = AutoModelForTimeSeriesPrediction.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    output = model.eval()(**features)
    logits = whole.eval()(**features).logits
np.savez(out + ".npz", pooler_output=output.pooler_output, **{"logits_" + k: v for k, v in logits.items()})
report = {
    "classes": [type(o).__name__ for o in (config, extractor, model, whole)],
    "modules": [type(o).__module__ for o in (config, extractor, model, whole)],
    "missing": sorted(info["missing_keys"]),
    "unexpected": sorted(info["unexpected_keys"]),
    "imported": sorted(m for m in sys.modules if m == "modeling_ecgmoe" or m.startswith("modeling_ecgmoe.")),
}
open(out, "w").write(json.dumps(report))
"""


def run_python(
    code: str, *arguments: str, cwd: Path, isolated: bool, stderr: int = subprocess.PIPE, **environment: str
) -> str:
    """What code prints in a new interpreter; `isolated` hides PYTHONPATH, the user's packages and the working folder.

    Args:
        stderr: subprocess.STDOUT to see this too.
    """
    command = [sys.executable, *(["-I"] if isolated else []), "-c", code, *arguments]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True, check=False)
    assert done.returncode == 0, (done.stderr or done.stdout)[-4000:]
    return done.stdout


def python_of(page: Path) -> list[str]:
    """The blocks of Python that a page shows."""
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with heads, its feature extractor, and a recording."""
    folder = tmp_path_factory.mktemp("hub")
    tiny_model().save_pretrained(folder)
    EcgMoeFeatureExtractor().save_pretrained(folder)
    signal = synthetic_ecg(sampling_rate=250, noise_mv=0.01).ecg.signal
    np.savez(folder / "signal.npz", signal=signal, names=np.array(LEADS))
    return folder


@pytest.fixture(scope="module")
def opened(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a process without this package found in the folder: a report, and the model's answers."""
    folder = tmp_path_factory.mktemp("elsewhere")
    out = folder / "report.json"
    code = WITHOUT_THE_PACKAGE + OPEN_THE_FOLDER
    run_python(code, str(saved), str(out), cwd=folder, isolated=True, HF_MODULES_CACHE=str(folder / "modules"))
    return json.loads(out.read_text()), dict(np.load(f"{out}.npz"))


# Without this package


def test_the_classes_come_from_the_saved_folder(opened: tuple[dict[str, Any], dict[str, np.ndarray]]) -> None:
    report, _ = opened
    assert report["classes"] == ["EcgMoeConfig", "EcgMoeFeatureExtractor", "EcgMoeModel", "EcgMoeForTasks"]
    assert all(module.startswith("transformers_modules.") for module in report["modules"])
    assert report["imported"] == []


def test_a_checkpoint_with_heads_opens_as_an_encoder_with_nothing_missing(
    opened: tuple[dict[str, Any], dict[str, np.ndarray]],
) -> None:
    report, _ = opened
    assert report["missing"] == []
    assert report["unexpected"] == []


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForTimeSeriesPrediction"])
def test_opening_a_checkpoint_with_heads_says_nothing_of_them(saved: Path, auto: str, tmp_path: Path) -> None:
    code = f"import sys\nfrom transformers import {auto}\n{auto}.from_pretrained(sys.argv[1], trust_remote_code=True)"
    cache = str(tmp_path / "modules")
    said = run_python(code, str(saved), cwd=tmp_path, isolated=True, stderr=subprocess.STDOUT, HF_MODULES_CACHE=cache)
    assert "UNEXPECTED" not in said
    assert "MISSING" not in said


def test_the_answers_are_those_of_the_saved_model(
    saved: Path, opened: tuple[dict[str, Any], dict[str, np.ndarray]]
) -> None:
    given = np.load(saved / "signal.npz")
    features = EcgMoeFeatureExtractor()(given["signal"], 250, LEADS, return_tensors="pt")
    with torch.no_grad():
        expected = tiny_model().eval()(**features)
    _, found = opened
    np.testing.assert_allclose(found["pooler_output"], expected.pooler_output, atol=1e-6)
    for name, logits in expected.logits.items():
        np.testing.assert_allclose(found[f"logits_{name}"], logits, atol=1e-6)


# What is saved


def test_the_folder_holds_the_code_that_it_names(saved: Path) -> None:
    auto_map = json.loads((saved / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_ecgmoe.EcgMoeConfig",
        "AutoModel": "modeling_ecgmoe.EcgMoeModel",
        "AutoModelForTimeSeriesPrediction": "modeling_ecgmoe.EcgMoeForTasks",
    }
    preprocessor = json.loads((saved / "preprocessor_config.json").read_text())
    assert preprocessor["auto_map"] == {"AutoFeatureExtractor": "feature_extraction_ecgmoe.EcgMoeFeatureExtractor"}
    for entry in (*auto_map.values(), preprocessor["auto_map"]["AutoFeatureExtractor"]):
        name = entry.split(".")[0]
        assert (saved / f"{name}.py").read_text() == (ROOT / "modeling_ecgmoe" / f"{name}.py").read_text()


def test_an_encoder_saved_alone_does_not_promise_heads(tmp_path: Path) -> None:
    tiny_model().ecgmoe.save_pretrained(tmp_path)
    assert set(json.loads((tmp_path / "config.json").read_text())["auto_map"]) == {"AutoConfig", "AutoModel"}


def test_saving_again_what_was_loaded_changes_no_file(saved: Path, tmp_path: Path) -> None:
    from modeling_ecgmoe.modeling_ecgmoe import EcgMoeForTasks

    EcgMoeForTasks.from_pretrained(saved).save_pretrained(tmp_path)
    EcgMoeFeatureExtractor.from_pretrained(saved).save_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (saved / path.name).read_bytes(), path.name


def test_nothing_saved_names_this_machine(saved: Path) -> None:
    for path in saved.glob("*.json"):
        for trace in (str(ROOT), str(saved), str(Path.home())):
            assert trace not in path.read_text(), path.name


# With this package


@pytest.mark.parametrize(
    "imports",
    [
        "import modeling_ecgmoe\nfrom transformers import AutoConfig, AutoFeatureExtractor, AutoModel",
        "from transformers import AutoConfig, AutoFeatureExtractor, AutoModel\nimport modeling_ecgmoe",
    ],
    ids=["package first", "transformers first"],
)
def test_importing_the_package_is_all_that_the_auto_classes_need(saved: Path, imports: str, tmp_path: Path) -> None:
    code = f"""
{imports}
import sys
folder = sys.argv[1]
for auto in (AutoConfig, AutoFeatureExtractor, AutoModel):
    print(type(auto.from_pretrained(folder)).__module__)
"""
    found = run_python(code, str(saved), cwd=tmp_path, isolated=False, PYTHONPATH=str(ROOT)).split()
    assert found == [
        "modeling_ecgmoe.configuration_ecgmoe",
        "modeling_ecgmoe.feature_extraction_ecgmoe",
        "modeling_ecgmoe.modeling_ecgmoe",
    ]


def test_importing_the_package_loads_no_library(tmp_path: Path) -> None:
    code = """
import sys
import modeling_ecgmoe, modeling_ecgmoe.leads, modeling_ecgmoe.tasks
assert modeling_ecgmoe.LEADS[1] == "II"
print(sorted({"torch", "transformers", "peft"} & set(sys.modules)))
"""
    assert run_python(code, cwd=tmp_path, isolated=False, PYTHONPATH=str(ROOT)).strip() == "[]"


def test_every_public_name_can_be_imported() -> None:
    import modeling_ecgmoe

    for name in modeling_ecgmoe.__all__:
        assert getattr(modeling_ecgmoe, name) is not None
    assert set(modeling_ecgmoe.__all__) <= set(dir(modeling_ecgmoe))
    with pytest.raises(AttributeError, match="module 'modeling_ecgmoe' has no attribute 'EcgMoeForTask'"):
        _ = modeling_ecgmoe.EcgMoeForTask


@pytest.mark.parametrize("first", ["classification_ecgmoe", "pipeline_ecgmoe"])
def test_what_is_registered_can_be_imported_first(first: str) -> None:
    run_python(f"import modeling_ecgmoe.{first}", cwd=ROOT, isolated=False)
