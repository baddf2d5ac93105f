"""The shape of the project, read from its syntax trees: who may import whom, and what no file may hold."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers.dynamic_module_utils import get_imports

from benchmarks import tables

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("modeling_ecgmoe", "data_builders")
# What stands outside the packages and may be imported by whom. The packages themselves are open to everyone.
OUTSIDE = {
    "arguments": {"records", "evaluation", "adaptation", "train", "benchmarks", "tests"},
    "records": {"soft_labels", "evaluation", "linear_heads", "adaptation", "train", "benchmarks", "tests"},
    "evaluation": {"linear_heads", "adaptation", "train", "benchmarks", "tests"},
    "checkpoints": {"adaptation", "train", "tests"},
    "linear_heads": {"adaptation", "train", "benchmarks", "tests"},
    "report_words": {"train", "tests"},
    "soft_labels": {"train", "tests"},
    "adaptation": {"train", "benchmarks", "tests"},
    "train": {"benchmarks", "tests"},
    "benchmarks": {"tests"},
    "space": {"tests"},
    "tests": set[str](),
}

# From what knows nothing to what knows everything; a file imports files of its own layer or of one above it here.
LAYERS = (
    {"leads", "tasks"},
    {"recording"},
    {"wfdb_files", "array_files", "mat_files", "device_files", "xml_files", "dicom_files", "ecg_files", "beats"},
    {"configuration_ecgmoe", "feature_extraction_ecgmoe"},
    {"temporal", "routing", "fusion", "encoder", "heads"},
    {"modeling_ecgmoe", "classification_ecgmoe"},
    {"metrics", "adapter_card", "folding", "stacking", "typicality", "adapters", "lora"},
    {"record_answers"},
    {"prediction", "answer_files", "leaks", "upload", "cards"},
    {"pipeline_ecgmoe", "publish", "publish_dataset", "export_page", "export_model", "embeddings"},
    {"commands"},
    {"cli"},
)
LAYER_OF = {name: index for index, layer in enumerate(LAYERS) for name in layer}
OPEN_TO_BUILDERS = {"leads", "tasks", "wfdb_files", "ecg_files", "beats"}

# Where the Hub starts to copy custom code, and what this code may count on. The last two come with transformers.
HUB_ENTRIES = ("modeling_ecgmoe", "configuration_ecgmoe", "feature_extraction_ecgmoe", "pipeline_ecgmoe")
HUB_THIRD_PARTY = {"torch", "transformers", "numpy", "scipy", "huggingface_hub", "safetensors"}
# transformers finds the siblings to copy with this expression, in docstrings too.
HUB_RELATIVE_IMPORT = re.compile(r"^\s*(?:from\s+\.(\S+)\s+import|import\s+\.(\S+)\s*$)", re.MULTILINE)

MAX_LINES = 500
VAGUE_NAMES = {"utils", "util", "helpers", "common", "misc"}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


class Import(NamedTuple):
    """One imported name: `from .leads import LEADS` in modeling_ecgmoe is modeling_ecgmoe.leads, level 1."""

    module: str
    name: str
    level: int
    is_deferred: bool

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]

    def inside(self, package: str) -> str | None:
        """The file of the package that is imported, "" for the package itself, None where it is another's."""
        parts = self.module.split(".")
        if parts[0] != package:
            return None
        if len(parts) > 1:
            return parts[1]
        return self.name if (ROOT / package / f"{self.name}.py").exists() else ""


def find_imports(source: str, package: str = "") -> list[Import]:
    """Every import of a file, those inside of functions too."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    deferred = {id(child) for function in functions for child in ast.walk(function)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, "", 0, id(node) in deferred) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = ([package] if node.level and package else []) + ([node.module] if node.module else [])
            found += [Import(".".join(parts), alias.name, node.level, id(node) in deferred) for alias in node.names]
    return found


def find_unsafe(source: str) -> list[str]:
    """What runs code out of data: pickles, `torch.load`, `eval` and `exec`."""
    found = [f"import {item.top}" for item in find_imports(source) if item.top in UNSAFE_MODULES]
    found += ["torch.load" for item in find_imports(source) if (item.module, item.name) == ("torch", "load")]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in {"eval", "exec", "torch.load"}:
            found.append(called)
        found += [
            "allow_pickle"
            for keyword in node.keywords
            if keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False"
        ]
    return found


def files_of(folder: str) -> dict[str, Path]:
    """The Python files of a folder by their names without suffix."""
    return {path.stem: path for path in sorted((ROOT / folder).rglob("*.py"))}


def all_files() -> Iterator[Path]:
    """Every Python file of the project."""
    yield from sorted(ROOT.glob("*.py"))
    for folder in (*PACKAGES, "benchmarks", "space", "tests"):
        yield from files_of(folder).values()


def imports_of(path: Path) -> list[Import]:
    return find_imports(path.read_text(encoding="utf-8"), path.relative_to(ROOT).parts[0])


def model_files() -> dict[str, Path]:
    return {name: path for name, path in files_of("modeling_ecgmoe").items() if name != "__init__"}


def siblings_of(path: Path) -> set[str]:
    """The files of the model's package that a file imports."""
    return {name for item in imports_of(path) if (name := item.inside("modeling_ecgmoe")) is not None}


def hub_files() -> dict[str, Path]:
    """The files that travel to the Hub with the weights: the entries and all they reach."""
    files, reached, waiting = model_files(), {}, list(HUB_ENTRIES)
    while waiting:
        name = waiting.pop()
        if name in files and name not in reached:
            reached[name] = files[name]
            waiting += siblings_of(files[name])
    return reached


def read_pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def declared(extras: bool) -> list[Requirement]:
    project = read_pyproject()["project"]
    lines = list(project["dependencies"])
    if extras:
        lines += [line for extra in project["optional-dependencies"].values() for line in extra]
    return [requirement for line in lines if (requirement := Requirement(line)).name != project["name"]]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): pinned for name, pinned in pairs}


def test_the_core_files_are_seen() -> None:
    assert {"leads", "tasks"} <= set(model_files())
    assert Path(__file__) in set(all_files())


def test_every_file_of_the_model_has_a_layer() -> None:
    assert set(model_files()) - set(LAYER_OF) == set(), "name the layer of a new file in LAYERS"


def test_a_file_of_the_model_imports_only_its_own_layer_and_those_before() -> None:
    wrong = [
        f"{name} imports {sibling}"
        for name, path in model_files().items()
        for sibling in siblings_of(path)
        if LAYER_OF.get(sibling, len(LAYERS)) > LAYER_OF[name]
    ]
    assert wrong == []


def test_no_file_of_the_model_imports_itself_by_a_detour() -> None:
    tuple(TopologicalSorter({name: siblings_of(path) for name, path in model_files().items()}).static_order())


def test_the_model_does_not_know_the_data_builders() -> None:
    # The command line may ask for a builder by name, when it is told to.
    wrong = [
        name
        for name, path in model_files().items()
        for item in imports_of(path)
        if item.top == "data_builders" and not (name == "commands" and item.is_deferred)
    ]
    assert wrong == []


def test_data_builders_know_files_leads_beats_and_tasks_but_not_the_model() -> None:
    wrong = [
        f"{name} imports {item.module}"
        for name, path in files_of("data_builders").items()
        for item in imports_of(path)
        if (sibling := item.inside("modeling_ecgmoe")) is not None and sibling not in OPEN_TO_BUILDERS
    ]
    assert wrong == []


def test_nobody_imports_what_stands_outside_the_packages() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {item.module}"
        for path in all_files()
        for item in imports_of(path)
        if item.level == 0 and item.top in OUTSIDE
        if path.relative_to(ROOT).with_suffix("").parts[0] not in {item.top, *OUTSIDE[item.top]}
    ]
    assert wrong == []


def test_files_that_go_to_the_hub_import_siblings_with_a_single_dot() -> None:
    wrong = []
    for name, path in hub_files().items():
        for item in imports_of(path):
            by_own_name = item.level == 0 and item.top == "modeling_ecgmoe"
            several_dots = item.level > 1 or (item.level == 1 and item.module.count(".") != 1)
            if by_own_name or several_dots:
                wrong.append(f"{name}: {item}")
    assert wrong == []


def test_files_that_go_to_the_hub_need_nothing_that_transformers_users_do_not_have() -> None:
    # As transformers reads them: what stands behind `if is_peft_available():` does not count.
    needed = {name: set(get_imports(path)) for name, path in hub_files().items()}
    allowed = HUB_THIRD_PARTY | set(sys.stdlib_module_names)
    assert {name: modules - allowed for name, modules in needed.items() if modules - allowed} == {}


def test_the_hub_copies_exactly_what_is_imported() -> None:
    for name, path in hub_files().items():
        matches = HUB_RELATIVE_IMPORT.findall(path.read_text(encoding="utf-8"))
        assert {a or b for a, b in matches} == siblings_of(path), f"{name}: a line of text looks like an import"


def test_module_level_imports_of_the_model_come_with_a_plain_install() -> None:
    base = {canonicalize_name(requirement.name) for requirement in declared(extras=False)}
    every = {canonicalize_name(requirement.name) for requirement in declared(extras=True)}
    distributions = packages_distributions()
    wrong = []
    for package in PACKAGES:
        for path in files_of(package).values():
            for item in imports_of(path):
                if item.level or item.top in {*PACKAGES, *sys.stdlib_module_names}:
                    continue
                providers = {canonicalize_name(name) for name in distributions.get(item.top, [])}
                allowed = base if package == "modeling_ecgmoe" and not item.is_deferred else every
                if not providers & allowed:
                    wrong.append(f"{path.name} imports {item.top}")
    assert wrong == []


def test_every_dependency_is_pinned_within_its_range_and_tested_at_the_pin() -> None:
    pinned = pins()
    for requirement in declared(extras=True):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"add {requirement.name} to constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{requirement} against {pinned[name]}"
        assert version(name).partition("+")[0] == pinned[name], f"{name} is installed in another version"


def test_the_wheel_holds_the_two_packages() -> None:
    assert read_pyproject()["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == list(PACKAGES)


def test_no_file_is_longer_than_500_lines() -> None:
    lengths = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in all_files()}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_every_name_says_what_is_inside() -> None:
    named = {path.relative_to(ROOT).with_suffix("") for path in all_files()}
    assert [path for path in named if VAGUE_NAMES & {word for part in path.parts for word in part.split("_")}] == []


def test_nothing_runs_code_out_of_data() -> None:
    found = {path.name: find_unsafe(path.read_text(encoding="utf-8")) for path in all_files()}
    assert {name: unsafe for name, unsafe in found.items() if unsafe} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "def read(path):\n    import dill",
        "weights = torch.load(path, weights_only=True)",
        "from torch import load",
        "value = eval(text)",
        "array = np.load(path, allow_pickle=True)",
    ],
)
def test_code_out_of_data_is_recognised(source: str) -> None:
    assert find_unsafe(source)


@pytest.mark.parametrize("source", ["model.eval()", "array = np.load(path, allow_pickle=False)", "json.load(file)"])
def test_harmless_calls_are_not_taken_for_code_out_of_data(source: str) -> None:
    assert find_unsafe(source) == []


def test_imports_are_found_in_every_form() -> None:
    source = "import a.b\nfrom .c import d\ndef f():\n    from e import g, h\n"
    assert find_imports(source, "p") == [
        Import("a.b", "", 0, False),
        Import("p.c", "d", 1, False),
        Import("e", "g", 0, True),
        Import("e", "h", 0, True),
    ]


def test_the_tables_of_the_readme_show_the_result_files() -> None:
    if not (ROOT / "README.md").exists():
        pytest.skip("there is no README.md")
    assert tables.main(["--check"]) == 0


def test_the_tree_of_the_readme_names_every_file_of_code() -> None:
    if not (ROOT / "README.md").exists():
        pytest.skip("there is no README.md")
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree")[1].split("```")[1]
    named = set(re.findall(r"[a-z0-9_]+\.py", tree))
    files = {path.name for folder in (".", *PACKAGES) for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    assert named == files
