"""The task table: everything the project knows about a clinical question, in one place.

Heads, losses, metrics, LoRA adapters, cards and menus read this table; nothing else branches on a task's name. A task
made by a user is the same `Task`, read from a JSON file.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Statement(NamedTuple):
    """One SCP-ECG statement of PTB-XL (`scp_statements.csv`, v1.0.3).

    `snomed_ct` is the concept that the PhysioNet Challenges 2020 and 2021 use for the same finding
    (`dx_mapping_scored.csv`, `dx_mapping_unscored.csv`), empty where none says exactly the same.
    """

    code: str
    description: str
    groups: str
    superclass: str
    snomed_ct: str = ""


STATEMENTS = (
    Statement("NDT", "non-diagnostic T abnormalities", "diagnostic+form", "STTC"),
    Statement("NST_", "non-specific ST changes", "diagnostic+form", "STTC"),
    Statement("DIG", "digitalis-effect", "diagnostic+form", "STTC"),
    Statement("LNGQT", "long QT-interval", "diagnostic+form", "STTC", "111975006"),
    Statement("NORM", "normal ECG", "diagnostic", "NORM"),
    Statement("IMI", "inferior myocardial infarction", "diagnostic", "MI"),
    Statement("ASMI", "anteroseptal myocardial infarction", "diagnostic", "MI"),
    Statement("LVH", "left ventricular hypertrophy", "diagnostic", "HYP", "164873001"),
    Statement("LAFB", "left anterior fascicular block", "diagnostic", "CD", "445118002"),
    Statement("ISC_", "non-specific ischemic", "diagnostic", "STTC"),
    Statement("IRBBB", "incomplete right bundle branch block", "diagnostic", "CD", "713426002"),
    Statement("1AVB", "first degree AV block", "diagnostic", "CD", "270492004"),
    Statement("IVCD", "non-specific intraventricular conduction disturbance (block)", "diagnostic", "CD", "698252002"),
    Statement("ISCAL", "ischemic in anterolateral leads", "diagnostic", "STTC"),
    Statement("CRBBB", "complete right bundle branch block", "diagnostic", "CD", "713427006"),
    Statement("CLBBB", "complete left bundle branch block", "diagnostic", "CD", "733534002"),
    Statement("ILMI", "inferolateral myocardial infarction", "diagnostic", "MI"),
    Statement("LAO/LAE", "left atrial overload/enlargement", "diagnostic", "HYP"),
    Statement("AMI", "anterior myocardial infarction", "diagnostic", "MI"),
    Statement("ALMI", "anterolateral myocardial infarction", "diagnostic", "MI"),
    Statement("ISCIN", "ischemic in inferior leads", "diagnostic", "STTC"),
    Statement("INJAS", "subendocardial injury in anteroseptal leads", "diagnostic", "MI"),
    Statement("LMI", "lateral myocardial infarction", "diagnostic", "MI"),
    Statement("ISCIL", "ischemic in inferolateral leads", "diagnostic", "STTC"),
    Statement("LPFB", "left posterior fascicular block", "diagnostic", "CD", "445211001"),
    Statement("ISCAS", "ischemic in anteroseptal leads", "diagnostic", "STTC"),
    Statement("INJAL", "subendocardial injury in anterolateral leads", "diagnostic", "MI"),
    Statement("ISCLA", "ischemic in lateral leads", "diagnostic", "STTC"),
    Statement("RVH", "right ventricular hypertrophy", "diagnostic", "HYP", "89792004"),
    Statement("ANEUR", "ST-T changes compatible with ventricular aneurysm", "diagnostic", "STTC"),
    Statement("RAO/RAE", "right atrial overload/enlargement", "diagnostic", "HYP"),
    Statement("EL", "electrolytic disturbance or drug (former EDIS)", "diagnostic", "STTC"),
    Statement("WPW", "Wolf-Parkinson-White syndrome", "diagnostic", "CD", "74390002"),
    Statement("ILBBB", "incomplete left bundle branch block", "diagnostic", "CD", "251120003"),
    Statement("IPLMI", "inferoposterolateral myocardial infarction", "diagnostic", "MI"),
    Statement("ISCAN", "ischemic in anterior leads", "diagnostic", "STTC"),
    Statement("IPMI", "inferoposterior myocardial infarction", "diagnostic", "MI"),
    Statement("SEHYP", "septal hypertrophy", "diagnostic", "HYP"),
    Statement("INJIN", "subendocardial injury in inferior leads", "diagnostic", "MI"),
    Statement("INJLA", "subendocardial injury in lateral leads", "diagnostic", "MI"),
    Statement("PMI", "posterior myocardial infarction", "diagnostic", "MI"),
    Statement("3AVB", "third degree AV block", "diagnostic", "CD", "27885002"),
    Statement("INJIL", "subendocardial injury in inferolateral leads", "diagnostic", "MI"),
    Statement("2AVB", "second degree AV block", "diagnostic", "CD", "195042002"),
    Statement("ABQRS", "abnormal QRS", "form", "", "164951009"),
    Statement("PVC", "ventricular premature complex", "form", "", "427172004"),
    Statement("STD_", "non-specific ST depression", "form", ""),
    Statement("VCLVH", "voltage criteria (QRS) for left ventricular hypertrophy", "form", ""),
    Statement("QWAVE", "Q waves present", "form", "", "164917005"),
    Statement("LOWT", "low amplitude T-waves", "form", ""),
    Statement("NT_", "non-specific T-wave changes", "form", ""),
    Statement("PAC", "atrial premature complex", "form", "", "284470004"),
    Statement("LPR", "prolonged PR interval", "form", "", "164947007"),
    Statement("INVT", "inverted T-waves", "form", "", "59931005"),
    Statement("LVOLT", "low QRS voltages in the frontal and horizontal leads", "form", "", "251146004"),
    Statement("HVOLT", "high QRS voltage", "form", ""),
    Statement("TAB_", "T-wave abnormality", "form", "", "164934002"),
    Statement("STE_", "non-specific ST elevation", "form", ""),
    Statement("PRC(S)", "premature complex(es)", "form", ""),
    Statement("SR", "sinus rhythm", "rhythm", "", "426783006"),
    Statement("AFIB", "atrial fibrillation", "rhythm", "", "164889003"),
    Statement("STACH", "sinus tachycardia", "rhythm", "", "427084000"),
    Statement("SARRH", "sinus arrhythmia", "rhythm", "", "427393009"),
    Statement("SBRAD", "sinus bradycardia", "rhythm", "", "426177001"),
    Statement("PACE", "normal functioning artificial pacemaker", "rhythm", "", "10370003"),
    Statement("SVARR", "supraventricular arrhythmia", "rhythm", ""),
    Statement("BIGU", "bigeminal pattern (unknown origin, SV or Ventricular)", "rhythm", ""),
    Statement("AFLT", "atrial flutter", "rhythm", "", "164890007"),
    Statement("SVTAC", "supraventricular tachycardia", "rhythm", "", "426761007"),
    Statement("PSVT", "paroxysmal supraventricular tachycardia", "rhythm", "", "67198005"),
    Statement("TRIGU", "trigeminal pattern (unknown origin, SV or Ventricular)", "rhythm", ""),
)
SUPERCLASSES = ("NORM", "MI", "STTC", "CD", "HYP")
RHYTHM_STATEMENTS = tuple(s.code for s in STATEMENTS if "rhythm" in s.groups)
DIAGNOSTIC_STATEMENTS = tuple(s.code for s in STATEMENTS if "diagnostic" in s.groups)
FORM_STATEMENTS = tuple(s.code for s in STATEMENTS if "form" in s.groups)
SUPERCLASS_OF = {s.code: s.superclass for s in STATEMENTS if s.superclass}
DESCRIPTIONS = {s.code: s.description for s in STATEMENTS}
# Label to its code in each terminology, where there is one that says the same.
STATEMENT_CODES = {
    s.code: {"scp_ecg": s.code} | ({"snomed_ct": s.snomed_ct} if s.snomed_ct else {}) for s in STATEMENTS
}

KINDS = ("regression", "binary", "multi_class", "multi_label")
# What a regression may start from, and what its answer says where that could not be measured.
PRIORS = {"rr_interval_ms": "no RR interval was found"}


@dataclass(frozen=True)
class Task:
    """A clinical question that a head of the model answers.

    Args:
        name: the adapter's name; the head is `head_<name>`.
        kind: one of `KINDS`. A binary task has two labels and one output, the probability of the second label.
        description: one line for cards and menus.
        column: the dataset column that holds the truth: a number (regression), a label or its index (binary,
            multi_class), a list of labels (multi_label); None or NaN where it is not known.
        labels: the names of the classes, in the order of the outputs; empty for a regression.
        unit: the unit of a regression.
        center, spread: a regression is learned as (value - center) / spread.
        metric: the main metric, a key of `metrics.METRICS`; "mae" of a regression and "macro_auroc" otherwise where
            not given.
        prior: a measurement of the feature extractor that a regression starts from, one of `PRIORS`, or "".
        loss_weight: the weight of the task in joint training.
        codes: label to terminology ("snomed_ct", "scp_ecg") to code, for labels that have one.
        minimum: what a regression's quantity is never below, such as 0 of an age: its values and intervals end there.
            None: no such bound.
        parts: label of a multi-label task to the finer findings of which any one makes it true, as any infarction
            makes `MI` true. The head then also has an output for each of them, see `heads.read_head`.
        parts_task: the task whose labels the parts are.
        products: how many components of the embedding a head of labels multiplies with each other, see `heads`.
    """

    name: str
    kind: str
    description: str
    column: str
    labels: tuple[str, ...] = ()
    unit: str = ""
    center: float = 0.0
    spread: float = 1.0
    metric: str = ""
    prior: str = ""
    loss_weight: float = 1.0
    codes: dict[str, dict[str, str]] = field(default_factory=dict, hash=False)
    minimum: float | None = None
    parts: dict[str, list[str]] = field(default_factory=dict, hash=False)
    parts_task: str = ""
    products: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        if not self.name.isidentifier():
            raise ValueError(f"a task's name must be letters, digits and underscores, found {self.name!r}")
        if self.name in ("weight", "bias"):  # PEFT could not tell the head from its own parameters
            raise ValueError(f"a task cannot be called {self.name!r}; choose another name, such as body_{self.name}")
        if self.kind not in KINDS:
            raise ValueError(f"task {self.name}: kind must be one of {', '.join(KINDS)}, found {self.kind!r}")
        if self.kind == "regression" and self.labels:
            raise ValueError(f"task {self.name}: a regression has a unit and no labels, found {self.labels}")
        if self.kind != "regression" and len(self.labels) < 1 + (self.kind in ("binary", "multi_class")):
            raise ValueError(f"task {self.name}: a {self.kind} task needs its labels, found {self.labels}")
        if self.kind == "binary" and len(self.labels) != 2:
            raise ValueError(f"task {self.name}: a binary task has two labels, found {self.labels}")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"task {self.name}: a label occurs twice in {self.labels}")
        uncoded = sorted(set(self.codes) - set(self.labels))
        if uncoded:
            raise ValueError(f"task {self.name}: codes for {', '.join(uncoded)}, which are not among its labels")
        if self.prior and (self.prior not in PRIORS or self.kind != "regression"):
            raise ValueError(
                f"task {self.name}: prior must be empty, or for a regression {', '.join(PRIORS)}; found {self.prior!r}"
            )
        if not self.metric:
            object.__setattr__(self, "metric", "mae" if self.kind == "regression" else "macro_auroc")
        if not self.spread > 0:
            raise ValueError(f"task {self.name}: spread must be positive, found {self.spread}")
        if self.minimum is not None and (self.kind != "regression" or not math.isfinite(self.minimum)):
            raise ValueError(
                f"task {self.name}: minimum must be a finite number, of a regression; found {self.minimum} of a "
                f"{self.kind} task"
            )
        if self.parts and (
            self.kind != "multi_label" or set(self.parts) != set(self.labels) or not all(self.parts.values())
        ):
            raise ValueError(
                f"task {self.name}: parts must name some for every label of a multi-label task, found parts of "
                f"{', '.join(self.parts)} for a {self.kind} task with {', '.join(self.labels) or 'no labels'}"
            )
        if self.products < 0 or (self.products and self.kind not in ("binary", "multi_label")):
            raise ValueError(
                f"task {self.name}: products must be 0 or more, and are for binary and multi-label tasks, found "
                f"{self.products} of a {self.kind} task"
            )
        if bool(self.parts) != bool(self.parts_task):
            raise ValueError(f"task {self.name}: parts and parts_task go together, found only one of them")

    @property
    def num_outputs(self) -> int:
        """How many numbers the task's answer has."""
        return len(self.labels) if self.kind in ("multi_label", "multi_class") else 1

    @property
    def part_names(self) -> tuple[str, ...]:
        """The parts of all labels, in the order of the head's outputs for them."""
        return tuple(part for label in self.labels for part in self.parts.get(label, ()))

    @property
    def head_size(self) -> int:
        """How many numbers the head gives: those of the answer, then one for each part."""
        return self.num_outputs + len(self.part_names)

    def plain(self) -> "Task":
        """The same question, answered by a linear head for its labels alone."""
        return replace(self, parts={}, parts_task="", products=0)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The main metric, and of classes the accuracy beside it."""
        return tuple(dict.fromkeys((self.metric, *(("accuracy",) if self.kind == "multi_class" else ()))))

    @property
    def decimals(self) -> int:
        """How many decimals of a regression's value people read: two digits of its spread, none below one."""
        return max(0, 1 - math.floor(math.log10(self.spread)))

    def reads_like(self, other: "Task") -> bool:
        """Whether a head's outputs mean the same under both tasks."""
        facts = ("name", "kind", "labels", "center", "spread", "prior", "parts", "products")
        return all(getattr(self, fact) == getattr(other, fact) for fact in facts)

    def targets(self, values: Sequence[Any]) -> np.ndarray:
        """The truth of many records as numbers.

        Args:
            values: a dataset column, see `column`.

        Returns:
            float32 (records, outputs), NaN where unknown; a multi-class target is its one-hot row.

        Raises:
            ValueError: a label is not one of the task's, or a number is below its minimum.
        """
        targets = np.full((len(values), self.num_outputs), np.nan, dtype=np.float32)
        for row, value in zip(targets, values, strict=True):
            if value is None or (isinstance(value, (float, np.floating)) and math.isnan(value)):
                continue
            if self.kind == "regression":
                row[0] = value
                if self.minimum is not None and row[0] < self.minimum:
                    raise ValueError(
                        f"task {self.name}: the label {value} is below the minimum {self.minimum:g}; leave it empty "
                        "where it is not known, or give the task another minimum"
                    )
            elif self.kind == "binary":
                row[0] = self._index(value)
            else:
                row[:] = 0.0
                for label in [value] if self.kind == "multi_class" else value:
                    row[self._index(label)] = 1.0
        return targets

    def answers(self, logits: np.ndarray) -> np.ndarray:
        """What a head's outputs (records, outputs) mean: values in the task's unit, or probabilities."""
        logits = np.asarray(logits, dtype=np.float64)
        if self.kind == "regression":
            values = logits * self.spread + self.center
            return values if self.minimum is None else np.maximum(values, self.minimum)
        if self.kind == "multi_class":
            shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
            return shifted / shifted.sum(axis=-1, keepdims=True)
        return 1.0 / (1.0 + np.exp(-logits))

    def _index(self, label: Any) -> int:
        if isinstance(label, (int, np.integer)) and 0 <= label < len(self.labels):
            return int(label)
        if label in self.labels:
            return self.labels.index(label)
        raise ValueError(f"task {self.name}: label {label!r} is not one of {', '.join(self.labels)}")

    def to_dict(self) -> dict[str, Any]:
        """The task as plain JSON types, without what it has none of, as tasks were before there was such a thing."""
        values = asdict(self) | {"labels": list(self.labels)}
        later: dict[str, Any] = {"minimum": None, "parts": {}, "parts_task": "", "products": 0}
        return {name: value for name, value in values.items() if name not in later or value != later[name]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Task":
        """The task that `to_dict` wrote. Unknown keys are refused.

        Raises:
            ValueError: a key is unknown or missing, or a value is refused by the task.
        """
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"unknown task fields {', '.join(unknown)}; known are {', '.join(known)}; update ecg-moe for newer"
            )
        missing = [name for name in ("name", "kind", "description", "column") if name not in values]
        if missing:
            raise ValueError(f"a task needs {', '.join(missing)}; found {', '.join(sorted(values))}")
        return cls(**values)

    @classmethod
    def from_json_file(cls, path: str | Path) -> "Task":
        """Read a user's task."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


TASKS = {
    task.name: task
    for task in (
        Task(
            name="rr_interval",
            kind="regression",
            description="mean interval between heart beats",
            column="rr_interval_ms",
            unit="ms",
            center=850.0,
            spread=200.0,
            metric="mae",
            prior="rr_interval_ms",
            loss_weight=0.2,
            minimum=0.0,
        ),
        Task(
            name="age",
            kind="regression",
            description="age at the time of the recording",
            column="age",
            unit="years",
            center=60.0,
            spread=17.0,
            metric="mae",
            loss_weight=2.0,
            minimum=0.0,
        ),
        Task(
            name="sex",
            kind="binary",
            description="sex",
            column="sex",
            labels=("male", "female"),
            codes={"male": {"snomed_ct": "248153007"}, "female": {"snomed_ct": "248152002"}},
        ),
        Task(
            name="potassium",
            kind="multi_label",
            description="abnormal serum potassium",
            column="potassium",
            labels=("hypokalaemia", "hyperkalaemia"),
            codes={"hypokalaemia": {"snomed_ct": "43339004"}, "hyperkalaemia": {"snomed_ct": "14140009"}},
        ),
        Task(
            name="arrhythmia",
            kind="multi_label",
            description="the rhythm of the heart, as 12 SCP-ECG rhythm statements",
            column="arrhythmia",
            labels=RHYTHM_STATEMENTS,
            codes={code: STATEMENT_CODES[code] for code in RHYTHM_STATEMENTS},
            loss_weight=4.0,
        ),
        Task(
            name="statements",
            kind="multi_label",
            description="all 71 SCP-ECG statements of PTB-XL",
            column="statements",
            labels=tuple(s.code for s in STATEMENTS),
            codes=STATEMENT_CODES,
            loss_weight=20.0,
            products=32,
        ),
        Task(
            name="superclass",
            kind="multi_label",
            description="normal ECG, infarction, ST/T change, conduction disturbance, hypertrophy",
            column="superclass",
            labels=SUPERCLASSES,
            parts={name: [s.code for s in STATEMENTS if s.superclass == name] for name in SUPERCLASSES},
            parts_task="statements",
        ),
        Task(
            name="quality",
            kind="multi_label",
            description="remarks on the recording: baseline drift, static noise, burst noise, electrode problems",
            column="quality",
            labels=("baseline_drift", "static_noise", "burst_noise", "electrodes_problems"),
            loss_weight=0.5,
        ),
    )
}


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: there is none; the message lists the known ones.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known tasks are {', '.join(TASKS)}, or pass a task's JSON file")
    return TASKS[name]
