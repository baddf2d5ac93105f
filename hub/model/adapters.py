"""Inference with many task adapters at once: LoRA on the fusion plus one head each, calibrated, in PEFT's format.

The backbone does not depend on the task. `MultiTask` computes it once and then runs the fusion of all tasks together.
It reads what PEFT saved without PEFT; `lora.py` trains and saves.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from transformers import PreTrainedConfig

from .adapter_card import CARD_FILE, AdapterCard
from .beats import mean_rr_error_ms
from .configuration_ecgmoe import EcgMoeConfig
from .encoder import EcgMoeEncoderOutput
from .feature_extraction_ecgmoe import EcgMoeFeatureExtractor, Prepared
from .folding import WEIGHTS_FILE, Backbone, folded
from .fusion import Fusion
from .heads import head_outputs, read_head
from .leads import LEADS
from .stacking import CONFIG_FILE, AdapterWeights, StackedFusion
from .temporal import mean_and_max
from .typicality import Typicality

if TYPE_CHECKING:
    from .modeling_ecgmoe import EcgMoeForTasks

logger = logging.getLogger(__name__)

# The configuration that adapters of the first release were trained on. Of later fields only values other than the
# default count: a new field must not orphan every adapter there is.
HASHED_FIELDS = (
    "leads",
    "sampling_rate",
    "token_stride",
    "families",
    "paths",
    "hidden_size",
    "conv_channels",
    "conv_kernels",
    "conv_blocks",
    "ssm_channels",
    "ssm_states",
    "ssm_layers",
    "patch_channels",
    "patch_layers",
    "trend_window_s",
    "phase_bins",
    "beat_window_s",
    "beat_size",
    "path_layers",
    "rhythm_pool",
    "num_attention_heads",
    "num_experts",
    "num_experts_per_tok",
    "expert_size",
    "period_aware",
    "num_queries",
    "fusion_size",
    "record_size",
    "initializer_range",
)
# Where `MultiTask.logits` puts what `typicality` looks at; no task can be called so.
FEATURES = "features of the backbone"
LEAD_I_ALONE = np.array([lead == "I" for lead in LEADS])
SIGNAL_KEYS = ("input_values", "lead_mask", "sample_mask", "r_peaks", "rr_intervals_s", "period_s")


def fingerprint(model: "EcgMoeForTasks | Backbone") -> str:
    """A short hash of configuration and weights of backbone and fusion: what an adapter must find unchanged.

    Heads do not count, and weights count at half precision, so that a copy saved in float16 is the same base.
    """
    config, config_class = model.config.to_dict(), type(model.config)
    # By what is below transformers' class: loaded from the Hub, a configuration is of a copy of ours.
    ours = config_class.__mro__[: config_class.__mro__.index(PreTrainedConfig)]
    own = {name for of in ours for name in of.__annotations__}
    plain = {name: json.loads(json.dumps(config[name], default=list)) for name in own}
    kept = {
        name: value
        for name, value in plain.items()
        if name not in model.config.editable_fields()
        and (name in HASHED_FIELDS or value != json.loads(json.dumps(getattr(config_class, name), default=list)))
    }
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for name, weight in sorted(getattr(model, "ecgmoe", model).state_dict().items()):
        if weight.is_floating_point():
            digest.update(name.encode())
            digest.update(weight.detach().cpu().to(torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass
class Explanation:
    """What the network looked at in the first window of a recording.

    Args:
        sampling_rate: Hz; input_mv: (12, samples); r_peaks_s: seconds.
        beat_experts, rhythm_experts: (elements, experts) probabilities of each path's last layer.
        beat_attention: (beats,) how much the fusion looks at each beat.
        family_weights: temporal family to its mean gate weight.
    """

    sampling_rate: int
    input_mv: np.ndarray
    r_peaks_s: list[float]
    beat_experts: np.ndarray
    rhythm_experts: np.ndarray
    beat_attention: np.ndarray
    family_weights: dict[str, float]


class MultiTask:
    """A backbone and any number of task adapters: one backbone pass, one batched fusion, all answers."""

    def __init__(self, model: "EcgMoeForTasks | Backbone", extractor: EcgMoeFeatureExtractor, name: str = "") -> None:
        """name: what the model is called, its folder or id, *optional*, from where it was loaded.

        `encoder` is made from the weights that the model has now, and computes in float32 whatever they came in:
        adapters do, and so do their calibrations.
        """
        backbone = model if isinstance(model, Backbone) else Backbone.of(model.eval()).float()
        self.config: EcgMoeConfig = model.config
        self.fusion: Fusion = backbone.fusion
        self.encoder = folded(backbone.encoder)
        self.extractor = extractor
        self.name = name or getattr(model, "name_or_path", "") or "a model in memory"
        self.base = fingerprint(model)
        self.cards: dict[str, AdapterCard] = {}
        self.typicality: Typicality | None = None
        self._model = None if isinstance(model, Backbone) else model
        self._is_exact = next(model.parameters()).dtype != torch.bfloat16
        self._weights: dict[str, AdapterWeights] = {}
        self._stacked: StackedFusion | None = None

    @property
    def model(self) -> "EcgMoeForTasks":
        """The model with the heads of its checkpoint, as transformers has it: loaded when first asked for."""
        if self._model is None:
            from .modeling_ecgmoe import EcgMoeForTasks

            self._model = EcgMoeForTasks.from_pretrained(folder_of(self.name), dtype=torch.float32).eval()
        return self._model

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.fusion.parameters()).device

    @classmethod
    def from_pretrained(
        cls, model: str | Path, tasks: Sequence[str] | None = None, revision: str | None = None
    ) -> "MultiTask":
        """Load a model and its adapters.

        Args:
            model: a folder, or an id on the Hub.
            tasks: names or ids of adapters, or folders that hold one or several; all that lie beside the model where
                not given. The adapters of the folder `x/model` lie in `x/adapters/<task>`, those of the id
                `me/ecg-moe` are `me/ecg-moe-<task>`.
            revision: of the model on the Hub.

        Names and ids of things on the Hub may end in a revision: `me/ecg-moe@v2`, `me/ecg-moe-age@v2`, `age@v2`.

        Of a model on the Hub, tasks without an adapter of their own there are passed over, and named in the log.

        Raises:
            FileNotFoundError: there is no model or no adapter; the message lists those there are.
            ValueError: an adapter was made for another base, or adapts more than the fusion; or the folder's
                `typicality.safetensors` is damaged or of another model.
        """
        folder = folder_of(model, revision)
        name = str(model) if revision is None else f"{model}@{revision}"
        many = cls(_load(folder), EcgMoeFeatureExtractor.from_pretrained(folder), name)
        many.typicality = Typicality.load(folder, many.base)
        for source in _adapter_sources(str(model), folder, tasks):
            try:
                many.load(source)
            except FileNotFoundError as error:
                if tasks is not None or Path(model).is_dir():
                    raise
                logger.warning("the task is left out: %s", error)
        return many

    def load(self, source: str | Path, revision: str | None = None) -> str:
        """Add the adapter of a folder or id, in place of one of the same task; returns the task's name.

        Args:
            source: a folder, or an id on the Hub, `me/ecg-moe-age` or `me/ecg-moe-age@v2`.
            revision: branch, tag or commit of an id.

        Raises:
            FileNotFoundError: there is no such adapter.
            ValueError: it was made for another base, or adapts more than the fusion. What was loaded stays.
        """
        folder = folder_of(source, revision)
        card = AdapterCard.load(folder)
        if card.base != self.base:
            rounded = "" if self._is_exact else "; its weights came in bfloat16, load them in float32 or float16"
            raise ValueError(
                f"the adapter {source} was trained on base {card.base} ({_base_name(folder)}), this model is "
                f"{self.base} ({self.name}); load the model it was made for{rounded}"
            )
        name = card.task.name
        self._weights[name] = AdapterWeights.load(folder, card.task, self.fusion)
        self.cards[name] = card
        self._stacked = None
        return name

    def unload(self, task: str) -> None:
        """Forget an adapter.

        Raises:
            ValueError: none of that task is loaded.
        """
        if task not in self.cards:
            raise ValueError(f"no adapter {task!r} is loaded; there are {', '.join(self.cards) or 'none'}")
        del self.cards[task], self._weights[task]
        self._stacked = None

    def adapter_size(self, task: str) -> int:
        """How many weights an adapter adds: its LoRA matrices and its head."""
        return self._weights[task].size

    def identity(self) -> dict[str, Any]:
        """What makes answers what they are: name and fingerprint of the model, and a hash of each adapter."""
        return {"model": self.name, "base": self.base, "adapters": {n: w.hash for n, w in self._weights.items()}}

    def prepare(self, signal: np.ndarray, sampling_rate: float, lead_names: Sequence[str]) -> Prepared:
        """Make a recording of any length ready; see `EcgMoeFeatureExtractor.prepare`."""
        return self.extractor.prepare(signal, sampling_rate, lead_names)

    def answer(self, prepared: Sequence[Prepared], batch_size: int = 32) -> list[dict[str, dict[str, Any]]]:
        """Answer all tasks for each recording; the windows of one are averaged, and a multi-label task also says in
        which of them its labels were found. Where a task starts from the RR intervals, windows without any count only
        if no other has some.

        Where the model knows what is typical, the `quality` of each recording then says how typical its windows of all
        twelve leads are, and whether the arms' electrodes are swapped there or in lead I alone; None of other leads.
        """
        windows = [window for record in prepared for window in record.windows]
        parts = [self.logits(windows[i : i + batch_size]) for i in range(0, len(windows), batch_size)]
        logits = {name: np.concatenate([part[name] for part in parts]) for name in self.cards} if parts else {}
        features = np.concatenate([part[FEATURES] for part in parts]) if parts and FEATURES in parts[0] else None
        answers, start = [], 0
        for record in prepared:
            end = start + len(record.windows)
            num_leads = int(min(window["lead_mask"].sum() for window in record.windows))
            if self.typicality is not None and features is not None:
                # It knows what is typical of twelve leads: of fewer, everything is untypical.
                masks = np.stack([window["lead_mask"] for window in record.windows])
                lead_i = (masks == LEAD_I_ALONE).all(axis=1)
                record.quality |= self.typicality.report(
                    features[start:end][masks.all(axis=1)], features[start:end][lead_i]
                )
            has_rr = np.array([(window["rr_intervals_s"] > 0).any() for window in record.windows])
            every = np.ones_like(has_rr)
            measured = has_rr if has_rr.any() else every
            errors_ms = np.array([mean_rr_error_ms(window["rr_intervals_s"]) for window in record.windows])
            error_ms = float(errors_ms[measured].mean())
            tasks = {}
            for name, card in self.cards.items():
                of_windows = logits[name][start:end]
                mean = of_windows[measured if card.task.prior else every].mean(axis=0)
                tasks[name] = card.answer(mean, num_leads, error_ms, bool(has_rr.any()))
                if card.task.kind == "multi_label" and end - start > 1:
                    starts_s = [window["start_s"] for window in record.windows]
                    tasks[name]["windows"] = card.found_in_windows(of_windows, starts_s)
            answers.append(tasks)
            start = end
        return answers

    @torch.inference_mode()
    def logits(self, windows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
        """task to logits (windows, outputs), from one backbone pass; where `typicality` is known, also `FEATURES`
        to what it looks at, (windows, 2 hidden_size)."""
        features = self.extractor.pad(windows, return_tensors="pt")
        encoded = self.encoder(**{name: features[name].to(self.device) for name in SIGNAL_KEYS})
        outputs = self.task_logits(encoded)
        if self.typicality is not None:
            outputs = outputs | {FEATURES: mean_and_max(*encoded.memories()["tokens"])}
        return {name: value.float().cpu().numpy() for name, value in outputs.items()}

    def fused(self) -> dict[str, AdapterWeights]:
        """The adapters that have to look at the recording, all where none has.

        A head of zeros, such as of an adapter that leaves a measurement as it is, reads nothing of its embedding.
        """
        reading = {name: weights for name, weights in self._weights.items() if weights.reads_embedding}
        return reading or self._weights

    def stacked(self) -> StackedFusion:
        """The fusion of the adapters that have to look at the recording."""
        if self._stacked is None:
            self._stacked = StackedFusion(self.fusion, list(self.fused().values()))
        return self._stacked

    def task_logits(self, encoded: EcgMoeEncoderOutput) -> dict[str, Tensor]:
        """task to logits (b, outputs), from what the backbone found."""
        if not self.cards:
            return {}
        assert encoded.period_s is not None  # the encoder always gives it
        embeddings = dict(zip(self.fused(), self.stacked()(encoded), strict=True))
        logits = {}
        for name, card in self.cards.items():
            head, seen = self._weights[name].head, embeddings.get(name)
            # Its length would be a constant to the tracer of an exported graph, its shape is not.
            own = head["bias"].expand(encoded.period_s.shape[0], -1) if seen is None else head_outputs(seen, head)
            logits[name] = read_head(own, card.task, encoded.period_s)
        return logits

    @torch.inference_mode()
    def explain(self, prepared: Prepared) -> Explanation:
        """What the network looked at in the first window, with the fusion as pretrained."""
        window = prepared.windows[0]
        features = self.extractor.pad([window], return_tensors="pt")
        encoder = self.encoder(**{name: features[name].to(self.device) for name in SIGNAL_KEYS})
        beats = len(window["r_peaks"])
        _, attentions = self.fusion(encoder)
        weights = encoder.family_weights[0][encoder.token_mask[0]].mean(dim=0)
        experts = self.config.num_experts
        beat_probs, rhythm_probs = (
            probs[-1][0].cpu().numpy() if probs else np.zeros((0, experts))
            for probs in (encoder.morphology_router_probs, encoder.rhythm_router_probs)
        )
        attention = attentions.get("morphology")
        return Explanation(
            sampling_rate=self.extractor.sampling_rate,
            input_mv=window["input_values"] * self.extractor.scale_mv,
            r_peaks_s=[float(peak) / self.extractor.sampling_rate for peak in window["r_peaks"]],
            beat_experts=beat_probs[1 : 1 + beats],
            rhythm_experts=rhythm_probs,
            beat_attention=np.zeros(beats) if attention is None else attention[0, 1 : 1 + beats].cpu().numpy(),
            family_weights={name: float(weight) for name, weight in zip(self.config.families, weights, strict=True)},
        )


def _load(folder: Path) -> "EcgMoeForTasks | Backbone":
    """The weights, by way of transformers only where they lie in several files: it takes seconds to import."""
    if (folder / WEIGHTS_FILE).is_file() or not (folder / f"{WEIGHTS_FILE}.index.json").is_file():
        return Backbone.load(folder)
    from .modeling_ecgmoe import EcgMoeForTasks

    return EcgMoeForTasks.from_pretrained(folder, dtype=torch.float32)


def default_model() -> Path:
    """The model of the source tree that holds this package.

    Raises:
        FileNotFoundError: the package is installed without it.
    """
    folder = Path(__file__).resolve().parent.parent / "hub" / "model"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError("no model lies beside this package; pass --model with a folder or an id on the Hub")
    return folder


def _base_name(folder: Path) -> str:
    """What an adapter calls its base."""
    config = folder / CONFIG_FILE
    values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return values.get("base_model_name_or_path") or "without a name"


def folder_of(source: str | Path, revision: str | None = None) -> Path:
    """The folder of a model or adapter, downloaded where it is an id on the Hub, `me/ecg-moe` or `me/ecg-moe@v2`.

    Raises:
        FileNotFoundError: it is neither a folder nor an id that the Hub gives out.
        ValueError: two revisions are named.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    repo_id, _, asked = str(source).partition("@")
    if asked and revision is not None and asked != revision:
        raise ValueError(f"{source} names revision {asked}, and revision={revision!r} was passed; pass one of them")
    try:
        return Path(snapshot_download(repo_id, revision=asked or revision))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{source} is neither a folder nor an id that the Hub gives out ({type(error).__name__}); check the "
            "spelling, the network and your login"
        ) from error


def _adapter_sources(model: str, folder: Path, tasks: Sequence[str] | None) -> list[str]:
    """Where the adapters of a model are."""
    beside = folder.parent / "adapters"
    found = [path.name for path in adapters_in(beside)] if Path(model).is_dir() else []
    if tasks is None and Path(model).is_dir():
        return [str(beside / name) for name in found]
    names = list(tasks) if tasks is not None else list(EcgMoeConfig.from_pretrained(folder).tasks or {})
    sources = []
    for name in names:
        if name in found:
            sources.append(str(beside / name))
        elif Path(name).is_dir() or "/" in name:
            sources += [str(path) for path in adapters_in(Path(name))] or [name]
        elif Path(model).is_dir():
            raise FileNotFoundError(f"no adapter {name!r} beside {model}; there are {', '.join(found) or 'none'}")
        else:
            sources.append(f"{model.partition('@')[0]}-{name}")
    return sources


def adapters_in(folder: Path) -> list[Path]:
    """The adapters that lie in a folder, each in one of its own; none where the folder is an adapter itself."""
    return [] if (folder / CARD_FILE).is_file() else sorted(path.parent for path in folder.glob(f"*/{CARD_FILE}"))
