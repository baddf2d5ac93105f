"""`pipeline("ecg-analysis", model=...)`: recordings in, the objects of `ecgmoe predict` out.

Arrays and adapters need no more than what the Hub gives out with the weights; files need this package.
"""

import importlib
import importlib.util
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from torch.utils.data import Dataset
from transformers import AutoModelForTimeSeriesPrediction, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .adapter_card import AdapterCard
from .adapters import FEATURES, SIGNAL_KEYS, MultiTask, adapters_in
from .feature_extraction_ecgmoe import EcgMoeFeatureExtractor, Prepared
from .modeling_ecgmoe import PIPELINE_TASK, EcgMoeForTasks
from .record_answers import BATCH_SIZE, LoadedRecord, answer_records, prepare_record, refuse_record
from .recording import millivolts_per, shown
from .temporal import mean_and_max
from .typicality import TYPICALITY_FILE, Typicality

logger = logging.getLogger(__name__)

Adapters = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class JointHeads(MultiTask):
    """The heads that the model was pretrained with, in the place of adapters. Their answers are not calibrated."""

    def __init__(self, model: EcgMoeForTasks, extractor: EcgMoeFeatureExtractor) -> None:
        super().__init__(model, extractor)
        self.cards = {name: AdapterCard(task, self.base) for name, task in model.tasks.items()}

    @torch.inference_mode()
    def logits(self, windows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
        """See `MultiTask.logits`."""
        features = self.extractor.pad(windows, return_tensors="pt")
        output = self.model(**{name: features[name].to(self.model.device) for name in SIGNAL_KEYS})
        outputs = output.logits
        if self.typicality is not None:
            outputs = outputs | {FEATURES: mean_and_max(*output.encoder.memories()["tokens"])}
        return {name: value.float().cpu().numpy() for name, value in outputs.items()}

    def answer(self, prepared: Sequence[Prepared], batch_size: int = BATCH_SIZE) -> list[dict[str, dict[str, Any]]]:
        """See `MultiTask.answer`; each answer says that it is not calibrated."""
        return [
            {name: answer | {"calibrated": False} for name, answer in tasks.items()}
            for tasks in super().answer(prepared, batch_size)
        ]


class RowDataset(Dataset):
    """A `datasets.Dataset` as transformers wants it: a dataset of torch, whose rows are read one at a time."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


class EcgMoePipeline(Pipeline):
    """Clinical answers from ECGs.

    ```python
    analyse = pipeline("ecg-analysis", model="ecg-moe/ecg-moe-base", trust_remote_code=True)
    analyse({"signal": signal, "sampling_rate": 500, "lead_names": ["I", "II", "V1"]})
    analyse(["a.hea", "b.csv"], batch_size=32)  # files, where this package is installed
    ```

    Args:
        adapters: a folder of adapters, or folders and ids on the Hub of some; the heads of the model itself answer
            where not given. These know no thresholds and no intervals, and say so with `"calibrated": False`.
        model, feature_extractor, device, batch_size: as in every pipeline of transformers; `batch_size` counts
            recordings.
    """

    _load_tokenizer = False
    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = True

    def __init__(
        self,
        *args: Any,
        adapters: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.feature_extractor is None:
            raise ValueError("pass feature_extractor=EcgMoeFeatureExtractor(...) together with a model in memory")
        if adapters is None:
            self.many: MultiTask = JointHeads(self.model, self.feature_extractor)
        else:
            self.many = MultiTask(self.model, self.feature_extractor)
            for source in _adapter_folders(adapters):
                self.many.load(source)
        self.many.typicality = _typicality_of(self.model, self.many.base)
        self._check_tasks(self._postprocess_params.get("tasks", []))

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Answer recordings.

        Args:
            inputs: one recording or many. One is a path; an array (leads, samples) in mV, NaN where missing; or a dict
                with `signal`, `sampling_rate`, `lead_names` and, where it is not mV, `unit`, such as a row of a data
                set of this project (`record_id` names it). Many are a list, a tuple, a generator, a
                `datasets.Dataset` or a `KeyDataset`.
            sampling_rate, lead_names: of arrays, and of files that do not say them.
            unit: of arrays that are not in mV, and of files that do not say it: "V", "mV", "uV" or "nV".
            tasks: names of the tasks to answer, all where not given.
            batch_size: recordings at once.

        Returns:
            for one recording a dict: record, path, status, sampling_rate, leads, duration_s, quality and tasks, or
            record, path, status "error" and error. A list of dicts for a list or a tuple; an iterator, which works as
            it is asked, for the others.

        Raises:
            ValueError: there is no such task, or a parameter is unknown.
        """
        tasks = kwargs.get("tasks") or []
        self._check_tasks([tasks] if isinstance(tasks, str) else tasks)
        if isinstance(inputs, tuple):
            inputs = list(inputs)
        if isinstance(inputs, list) and not inputs:
            return []
        if hasattr(inputs, "column_names"):  # a data set of `datasets`, in memory or streamed
            inputs = RowDataset(inputs) if hasattr(inputs, "__len__") else (row for row in inputs)
        return super().__call__(inputs, **kwargs)

    def _check_tasks(self, tasks: Iterable[str]) -> None:
        unknown = sorted(set(tasks) - set(self.many.cards))
        if unknown:
            raise ValueError(f"no answer to {', '.join(unknown)}; there are {', '.join(self.many.cards)}")

    def _sanitize_parameters(
        self,
        tasks: Iterable[str] | None = None,
        sampling_rate: float | None = None,
        lead_names: Sequence[str] | None = None,
        unit: str | None = None,
        **unknown: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if unknown:
            raise ValueError(
                f"unknown parameters {', '.join(unknown)}; known are tasks, sampling_rate, lead_names and unit"
            )
        facts = {"sampling_rate": sampling_rate, "lead_names": lead_names, "unit": unit}
        given = {name: value for name, value in facts.items() if value is not None}
        return given, {}, {} if tasks is None else {"tasks": [tasks] if isinstance(tasks, str) else list(tasks)}

    def preprocess(
        self,
        record: Any,
        sampling_rate: float | None = None,
        lead_names: Sequence[str] | None = None,
        unit: str | None = None,
    ) -> dict[str, Any]:
        """Read and prepare one recording. What goes wrong becomes its answer and is not raised."""
        if isinstance(record, (str, os.PathLike)):
            return {"record": _load_file(self.many, Path(record), sampling_rate, lead_names, unit)}
        row = record if isinstance(record, dict) else {"signal": record}
        line = {"record": row.get("record_id", row.get("record")), "path": row.get("path")}
        try:
            signal = np.asarray(row.get("signal"), dtype=np.float32)
            rate = sampling_rate if row.get("sampling_rate") is None else row["sampling_rate"]
            names = lead_names if row.get("lead_names") is None else row["lead_names"]
            scale = millivolts_per(str(in_unit := row.get("unit") or unit or "mV"))
            if scale is None:
                raise ValueError(f"unit {shown(in_unit)} is not a voltage; expected V, mV, uV or nV")
            if signal.ndim != 2 or rate is None or names is None:
                raise ValueError(
                    "expected a signal (leads, samples) in mV with sampling_rate (Hz) and lead_names, found shape "
                    f"{signal.shape}, sampling_rate {rate} and lead_names {names}; pass what is missing"
                )
            loaded = prepare_record(self.many, line, signal * scale, float(rate), [str(name) for name in names])
        except (TypeError, ValueError) as error:
            loaded = refuse_record(line, str(error))
        return {"record": loaded}

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        records: LoadedRecord | list[LoadedRecord] = model_inputs["record"]
        if not isinstance(records, list):
            return {"line": answer_records(self.many, [records], BATCH_SIZE)[0]}
        return {"line": answer_records(self.many, records, max(BATCH_SIZE, len(records)))}

    def postprocess(self, model_outputs: dict[str, Any], tasks: list[str] | None = None) -> dict[str, Any]:
        """The answer of one recording, with the tasks that were asked for."""
        line = model_outputs["line"]
        if tasks is None or "tasks" not in line:
            return line
        return line | {"tasks": {name: line["tasks"][name] for name in tasks}}


def _adapter_folders(adapters: Adapters) -> list[str]:
    """The adapters themselves, where a folder of adapters may be named for all of them."""
    sources: list[str] = []
    for source in [adapters] if isinstance(adapters, (str, os.PathLike)) else adapters:
        sources += [str(folder) for folder in adapters_in(Path(source))] or [str(source)]
    return sources


def _typicality_of(model: EcgMoeForTasks, base: str) -> Typicality | None:
    """What is typical, from beside the weights that the model was loaded from; None where nothing is known of it."""
    name = model.name_or_path
    if not name:
        return None
    folder = Path(name)
    try:
        if not folder.is_dir():
            commit = getattr(model.config, "_commit_hash", None)
            folder = Path(hf_hub_download(name, TYPICALITY_FILE, revision=commit)).parent
        if next(model.parameters()).dtype == torch.bfloat16 and (folder / TYPICALITY_FILE).is_file():
            raise ValueError("its weights came in bfloat16, load them in float32 or float16")
        return Typicality.load(folder, base)
    except EntryNotFoundError:  # the repository has no such file, or this machine has no copy of it
        return None
    except (HfHubHTTPError, HFValidationError, ValueError) as error:  # of weights that were changed since, too
        logger.warning("how typical recordings are is left out: %s", error)
        return None


def _load_file(
    many: MultiTask,
    path: Path,
    sampling_rate: float | None,
    lead_names: Sequence[str] | None,
    unit: str | None,
) -> LoadedRecord:
    """Read a file with the package, which the weights on the Hub do without."""
    if importlib.util.find_spec("modeling_ecgmoe") is None:
        line = {"record": path.stem, "path": str(path)}
        return refuse_record(line, "files are read by the package ecg-moe, which is not installed; pass an array")
    prediction = importlib.import_module("modeling_ecgmoe.prediction")
    facts = prediction.FileFacts(sampling_rate, None if lead_names is None else tuple(lead_names), unit)
    return prediction.load_record(many, path, facts)


if PIPELINE_TASK not in PIPELINE_REGISTRY.get_supported_tasks():  # a copy from the Hub does not take the place
    PIPELINE_REGISTRY.register_pipeline(
        PIPELINE_TASK, pipeline_class=EcgMoePipeline, pt_model=AutoModelForTimeSeriesPrediction
    )

__all__ = ["EcgMoePipeline"]
