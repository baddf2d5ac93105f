"""What a model, an adapter and the web page are on the Hub: which files, with which page, ready to be sent.

Each function gives an `Upload`; `upload.send` makes it one commit. Nothing here asks the network but `adapter_upload`,
which looks at the base model it shall name.
"""

import ast
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, SpaceCard, snapshot_download

from .adapter_card import BASE_MODEL, CARD_FILE, AdapterCard
from .cards import (
    calibration_results,
    eval_files,
    eval_results,
    fill_card,
    model_header,
    read_results,
    results_table,
)
from .typicality import TYPICALITY_FILE
from .upload import PublishError, Upload, explained

MODEL_FILES = (
    "config.json",
    "preprocessor_config.json",
    "training.json",
    "log.jsonl",
    "results.json",
    TYPICALITY_FILE,
    "LICENSE",
)
NEEDED_CLASSES = {"config.json": ("AutoConfig", "AutoModel"), "preprocessor_config.json": ("AutoFeatureExtractor",)}
MODEL_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", CARD_FILE, "training.json", "results.json")
SPACE_FILES = ("app.py", "plotting.py", "requirements.txt")
PAGE = "README.md"
PAGES = (PAGE, ".yaml")  # what only the pages of models and adapters need
NOT_WORTH_NAMING = {"__pycache__", ".cache", ".git", ".eval_results", PAGE}


# --------------------------------------------------------------------------------------------------------------- model


def model_upload(folder: Path, repo_id: str) -> Upload:
    """A model with its code, its feature extractor and its page.

    Args:
        folder: as `save_pretrained` of model and feature extractor left it.
        repo_id: where it shall go.

    Raises:
        PublishError: it is incomplete; the message names what is missing and how to get it.
    """
    _require(folder, ("config.json", "preprocessor_config.json"), "a model with its feature extractor")
    weights = [path for pattern in MODEL_WEIGHTS for path in sorted(folder.glob(pattern))]
    if not any(path.suffix == ".safetensors" for path in weights):
        raise PublishError(f"{folder} holds no model.safetensors; save the model with save_pretrained")
    code = model_code(folder)
    named = [folder / name for name in MODEL_FILES if (folder / name).is_file()]
    files: dict[str, Path | bytes] = {path.name: path for path in (*named, *weights, *code)}
    results = _results(folder)
    page = folder / PAGE
    text = page.read_text(encoding="utf-8") if page.is_file() else _first_page(folder)
    measured, table = (eval_results(results), results_table(results)) if results else ([], None)
    text = text.replace(BASE_MODEL, repo_id)
    files[PAGE] = fill_card(text, model_header(None, None), repo_id.rpartition("/")[2], measured, table).encode()
    files |= eval_files(results) if results else {}
    return Upload(repo_id, "model", files, left_out=_left_out(folder, files))


def model_code(folder: Path) -> list[Path]:
    """The code that a model's `auto_map` and `custom_pipelines` name, and all that this code imports from beside it.

    Raises:
        PublishError: the map is not complete, or a file is missing or is no Python.
    """
    code: dict[str, Path] = {}
    waiting = []
    for name, needed in NEEDED_CLASSES.items():
        settings = json.loads((folder / name).read_text(encoding="utf-8"))
        found = settings.get("auto_map", {})
        missing = [auto for auto in needed if auto not in found]
        if missing:
            raise PublishError(
                f"{folder / name} has no {' and no '.join(missing)} in its auto_map, so nobody could open it by its "
                "id; save it again with save_pretrained"
            )
        pipelines = [entry["impl"] for entry in settings.get("custom_pipelines", {}).values()]
        waiting += [entry.partition(".")[0] for entry in (*found.values(), *pipelines)]
    while waiting:
        module = waiting.pop()
        if module in code:
            continue
        path = code[module] = folder / f"{module}.py"
        if not path.is_file():
            raise PublishError(f"{folder} lacks {path.name}, which its code needs; save the model again")
        waiting += _siblings(path)
    return sorted(code.values())


def _siblings(path: Path) -> Iterable[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise PublishError(f"{path}, line {error.lineno}: this is no Python; save the model again") from error
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    for node in imports:
        if node.level > 1 or node.module is None or "." in node.module:
            raise PublishError(f"{path}, line {node.lineno}: the Hub's code must be flat, one file beside the other")
    return [str(node.module) for node in imports]


def _first_page(folder: Path) -> str:
    """A page for a model that has none."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tasks = ", ".join(config.get("tasks") or {}) or "none"
    training = folder / "training.json"
    arguments = json.loads(training.read_text(encoding="utf-8")) if training.is_file() else {}
    data = arguments.get("dataset") or arguments.get("csv")
    return f"""\
# ECG-MoE

An ECG encoder: temporal features of {len(config["families"])} families ({", ".join(config["families"])}), mixtures of
experts for {" and ".join(config["paths"])}, and a hierarchical fusion.

- Input: any ECG with its sampling rate and lead names; `preprocessor_config.json` orders leads by name and resamples
  to {config["sampling_rate"]} Hz.
- Output: a {config["record_size"]}-wide embedding (`pooler_output`).
- Heads: {tasks}.
- Trained on: {data or "not stated"}{"; `training.json` holds the arguments" if data else ""}.

```python
from transformers import AutoFeatureExtractor, AutoModel

extractor = AutoFeatureExtractor.from_pretrained("{BASE_MODEL}", trust_remote_code=True)
model = AutoModel.from_pretrained("{BASE_MODEL}", trust_remote_code=True).eval()
features = extractor(signal_mv, sampling_rate=500, lead_names=["I", "II"], return_tensors="pt")
embedding = model(**features).pooler_output
```

Research software, not a medical device: its answers must not guide the care of a patient.
"""


# ------------------------------------------------------------------------------------------------------------- adapter


def adapter_upload(folder: Path, repo_id: str, base: str, revision: str | None) -> Upload:
    """An adapter with its card, bound to a published base.

    Args:
        folder: as `train.py adapt` left it.
        repo_id: where it shall go.
        base: id of the model it adapts.
        revision: the commit of the base, which `pinned_base` finds; None leaves it open.

    Raises:
        PublishError: it is incomplete.
    """
    _require(folder, ADAPTER_FILES[:3], "an adapter")
    try:
        card = AdapterCard.load(folder)
    except ValueError as error:
        raise PublishError(str(error)) from error
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"auto_mapping": None, "base_model_name_or_path": base, "revision": revision}
    files: dict[str, Path | bytes] = {name: folder / name for name in ADAPTER_FILES if (folder / name).is_file()}
    files["adapter_config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    training = folder / "training.json"
    arguments = json.loads(training.read_text(encoding="utf-8")) if training.is_file() else {}
    page, results = folder / PAGE, _results(folder)
    text = page.read_text(encoding="utf-8") if page.is_file() else card.to_markdown(BASE_MODEL)
    measured, table = (
        (eval_results(results), results_table(results)) if results else (calibration_results(card, arguments), None)
    )
    header = model_header(base, card.task)
    text = text.replace(f"{BASE_MODEL}-{card.task.name}", repo_id).replace(BASE_MODEL, base)
    files[PAGE] = fill_card(text, header, repo_id.rpartition("/")[2], measured, table).encode()
    files |= eval_files(results) if results else {}
    return Upload(repo_id, "model", files, left_out=_left_out(folder, files))


def pinned_base(folder: Path, base: str, revision: str | None = None) -> str:
    """The commit of the base that an adapter fits.

    Args:
        folder: of the adapter.
        base: id of a model.
        revision: a branch, tag or commit of it; the newest where None.

    Raises:
        PublishError: there is no such model, or the adapter was trained on another one.
    """
    from .adapters import fingerprint
    from .modeling_ecgmoe import EcgMoeForTasks

    card = AdapterCard.load(folder)
    with explained(Upload(base, "model", {}), "nothing was published"):
        commit = HfApi().model_info(base, revision=revision).sha
        copy = snapshot_download(base, revision=commit, allow_patterns=["*.json", "*.safetensors"])
    found = fingerprint(EcgMoeForTasks.from_pretrained(copy))
    if found != card.base:
        raise PublishError(
            f"the adapter {folder} was trained on base {card.base}, {base} at {str(commit)[:12]} is {found}; publish "
            "the model it was trained on first, and name it with --base"
        )
    return str(commit)


# --------------------------------------------------------------------------------------------------------------- space


def space_upload(source: Path, repo_id: str, model: str) -> Upload:
    """The web page with all it runs on: the package lies beside it, since it is on no package index.

    Args:
        source: the source tree, with `space/`, `examples/` and `modeling_ecgmoe/`.
        repo_id: where it shall go.
        model: a folder, which goes along with the adapters beside it, or an id on the Hub, which the Space loads.

    Raises:
        PublishError: something is missing.
    """
    space, package = source / "space", source / "modeling_ecgmoe"
    if not space.is_dir():
        raise PublishError(f"{source} holds no space/; publish it from the source tree, or name that with --source")
    _require(space, (*SPACE_FILES, PAGE), "the web page")
    files: dict[str, Path | bytes] = {name: space / name for name in SPACE_FILES}
    files |= {f"modeling_ecgmoe/{path.name}": path for path in sorted(package.glob("*.py"))}
    files |= {f"examples/{path.name}": path for path in sorted((source / "examples").glob("*")) if path.is_file()}
    header: dict[str, Any] = {}
    folder = Path(model)
    if folder.is_dir():
        bundled = {"hub/model": model_upload(folder, BASE_MODEL)}
        for card in sorted((folder.parent / "adapters").glob(f"*/{CARD_FILE}")):
            name = card.parent.name
            bundled[f"hub/adapters/{name}"] = adapter_upload(card.parent, f"{BASE_MODEL}-{name}", BASE_MODEL, None)
        for place, upload in bundled.items():
            needed = {name: content for name, content in upload.files.items() if not name.endswith(PAGES)}
            files |= {f"{place}/{name}": content for name, content in needed.items()}
    elif model.count("/") == 1:
        header = {"models": [model], "preload_from_hub": [model]}
    else:
        raise PublishError(f"{model} is neither a folder nor an id on the Hub (owner/name)")
    page = SpaceCard((space / PAGE).read_text(encoding="utf-8"))
    for key, value in header.items():
        page.data[key] = value
    files[PAGE] = str(page).encode() if header else space / PAGE
    owned = ("modeling_ecgmoe/*", "examples/*", "hub/*")
    return Upload(repo_id, "space", files, owned)


# ----------------------------------------------------------------------------------------------------- what they share


def _require(folder: Path, names: Iterable[str], what: str) -> None:
    if not folder.is_dir():
        raise PublishError(f"there is no folder {folder}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise PublishError(f"{folder} is not {what}: it lacks {', '.join(missing)}")


def _results(folder: Path) -> dict[str, Any] | None:
    try:
        return read_results(folder)
    except ValueError as error:
        raise PublishError(str(error)) from error


def _left_out(folder: Path, files: Iterable[str]) -> list[str]:
    """Files and folders that were found and are none of what is published."""
    return sorted({path.name for path in folder.iterdir()} - set(files) - NOT_WORTH_NAMING)
