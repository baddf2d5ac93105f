"""ECG-MoE: one backbone pass over an ECG, then any number of clinical tasks, each a small LoRA adapter.

After `import modeling_ecgmoe` the classes `AutoConfig`, `AutoModel` and `AutoFeatureExtractor` of transformers know
the model, and `pipeline` knows the task `ecg-analysis`. The import takes no time: what needs torch is loaded when a
name of this package, an auto class or a pipeline is used.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter_card import AdapterCard
    from .adapters import MultiTask
    from .classification_ecgmoe import EcgMoeForSequenceClassification
    from .configuration_ecgmoe import EcgMoeConfig
    from .ecg_files import Ecg, read_ecg
    from .feature_extraction_ecgmoe import EcgMoeFeatureExtractor
    from .leads import LEADS
    from .modeling_ecgmoe import EcgMoeForTasks, EcgMoeModel
    from .pipeline_ecgmoe import EcgMoePipeline
    from .tasks import TASKS, Task

_FILE_OF = {
    "AdapterCard": "adapter_card",
    "Ecg": "ecg_files",
    "EcgMoeConfig": "configuration_ecgmoe",
    "EcgMoeFeatureExtractor": "feature_extraction_ecgmoe",
    "EcgMoeForSequenceClassification": "classification_ecgmoe",
    "EcgMoeForTasks": "modeling_ecgmoe",
    "EcgMoeModel": "modeling_ecgmoe",
    "EcgMoePipeline": "pipeline_ecgmoe",
    "LEADS": "leads",
    "MultiTask": "adapters",
    "TASKS": "tasks",
    "Task": "tasks",
    "read_ecg": "ecg_files",
}

__all__ = [
    "AdapterCard",
    "Ecg",
    "EcgMoeConfig",
    "EcgMoeFeatureExtractor",
    "EcgMoeForSequenceClassification",
    "EcgMoeForTasks",
    "EcgMoeModel",
    "EcgMoePipeline",
    "LEADS",
    "MultiTask",
    "TASKS",
    "Task",
    "read_ecg",
]


def __getattr__(name: str) -> Any:
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FILE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# ------------------------------------------------------------------------------------ the auto classes of transformers


def _register_config(auto: ModuleType) -> None:
    from .configuration_ecgmoe import EcgMoeConfig

    auto.AutoConfig.register(EcgMoeConfig.model_type, EcgMoeConfig, exist_ok=True)


def _register_feature_extractor(auto: ModuleType) -> None:
    from .configuration_ecgmoe import EcgMoeConfig
    from .feature_extraction_ecgmoe import EcgMoeFeatureExtractor

    auto.AutoFeatureExtractor.register(EcgMoeConfig, EcgMoeFeatureExtractor, exist_ok=True)


def _register_models(auto: ModuleType) -> None:
    from .configuration_ecgmoe import EcgMoeConfig
    from .modeling_ecgmoe import EcgMoeForTasks, EcgMoeModel

    auto.AutoModel.register(EcgMoeConfig, EcgMoeModel, exist_ok=True)
    auto.AutoModelForTimeSeriesPrediction.register(EcgMoeConfig, EcgMoeForTasks, exist_ok=True)
    # Registers itself, for it may be what is being imported just now.
    importlib.import_module(f"{__name__}.classification_ecgmoe")


def _register_pipeline(pipelines: ModuleType) -> None:
    importlib.import_module(f"{__name__}.pipeline_ecgmoe")  # registers itself too


_REGISTER: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.feature_extraction_auto": _register_feature_extractor,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.pipelines": _register_pipeline,
}


class _RegisterAfterImport(MetaPathFinder):
    """Finds an auto module as Python would, and registers ECG-MoE with it as soon as it is loaded.

    An auto class can only be told of real classes, and those need torch: to register here and now would cost every
    `ecgmoe --help` and every reader of a file format the seconds that torch and transformers take to load.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _REGISTER:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for f in others if (found := f.find_spec(fullname, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                _REGISTER[fullname](module)

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    """With the auto modules that are there already at once, with the others when they come."""
    sys.meta_path.insert(0, _RegisterAfterImport())
    for name, register in _REGISTER.items():
        module = sys.modules.get(name)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            register(module)


_register()
