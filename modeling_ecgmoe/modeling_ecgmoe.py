"""ECG-MoE: temporal features, a dual-path mixture of experts that knows the heart's period, a hierarchical fusion.

    signal (b, 12, t)
      -> TemporalFeatures            tokens (b, s, d), one every `token_stride` samples, and pooled waves (b, 2 c)
      -> MorphologyPath, RhythmPath  beats (b, 1 + n, d) and rhythm elements (b, m, d), through routed experts
      -> Fusion                      pooler_output (b, record_size); LoRA lives here alone
      -> heads["head_<task>"]        one linear layer for each task, and products of the embedding where it has some

Axes: b record, l lead, t sample, s token, n beat, m rhythm element, c, d channel, e expert, k chosen expert.
After Xu et al. 2026, arXiv 2603.04589, whose inner design is not public: the parts are theirs, their form is ours.
"""

import copy
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.integrations import use_experts_implementation
from transformers.utils import ModelOutput, is_peft_available

from .configuration_ecgmoe import EcgMoeConfig
from .encoder import EcgMoeEncoder, EcgMoeEncoderOutput
from .fusion import Fusion, QueryPooling
from .heads import PRODUCTS, Head, read_head
from .routing import Experts, MorphologyPath, RhythmPath, Router
from .tasks import Task
from .temporal import StateSpace, TemporalFeatures

PIPELINE_TASK = "ecg-analysis"
PIPELINES = {
    PIPELINE_TASK: {"impl": "pipeline_ecgmoe.EcgMoePipeline", "pt": ["AutoModelForTimeSeriesPrediction"]},
}

# As a decorator in routing.py it would make inference load what only models of transformers need.
use_experts_implementation(Experts)


@dataclass
class EcgMoeModelOutput(ModelOutput):
    """The embedding of each record.

    Args:
        pooler_output: (b, record_size).
        last_hidden_state: tokens (b, s, d).
        attentions: where asked for, the fusion's attention on the elements of tokens, morphology and rhythm.
        encoder: the backbone's output.
    """

    pooler_output: Tensor | None = None
    last_hidden_state: Tensor | None = None
    attentions: dict[str, Tensor] | None = None
    encoder: EcgMoeEncoderOutput | None = None


@dataclass
class EcgMoeTaskOutput(ModelOutput):
    """The answers of the heads.

    Args:
        loss: the weighted sum of the tasks' losses and of the router losses, where labels were given.
        logits: task to (b, outputs); a regression is standardised, see `Task`.
        losses: task to its own loss.
        pooler_output, attentions, encoder: see `EcgMoeModelOutput`.
    """

    loss: Tensor | None = None
    logits: dict[str, Tensor] | None = None
    losses: dict[str, Tensor] | None = None
    pooler_output: Tensor | None = None
    attentions: dict[str, Tensor] | None = None
    encoder: EcgMoeEncoderOutput | None = None


class EcgMoePreTrainedModel(PreTrainedModel):
    """Loading, saving and the initial weights of every ECG-MoE class."""

    config_class = EcgMoeConfig
    base_model_prefix = "ecgmoe"
    main_input_name = "input_values"
    input_modalities = ("time",)
    supports_gradient_checkpointing = False
    accepts_loss_kwargs = False  # the arguments beyond those that `forward` names are not transformers' own
    is_gradient_checkpointing = False  # PEFT asks by this name, and transformers warns whoever does
    # transformers looks for the experts in this file's source; they live in routing.py.
    _can_set_experts_implementation_cached_value = True
    _no_split_modules = ["TemporalFeatures", "MorphologyPath", "RhythmPath", "Fusion"]

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Dense evaluation unless asked otherwise: it is the fastest for experts this small."""
        return super().get_correct_experts_implementation(requested_experts or "eager")

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save weights, configuration and the code that loads them without this package being installed.

        transformers notes the saved class alone; a checkpoint with heads could then not be opened as an encoder, nor
        by a pipeline, whose code nothing here imports.
        """
        self.config.auto_map = {"AutoModel": f"{EcgMoeModel.__module__.split('.')[-1]}.{EcgMoeModel.__name__}"}
        code = Path(__file__).with_name("pipeline_ecgmoe.py")
        has_pipeline = isinstance(self, EcgMoeForTasks) and code.is_file()
        if has_pipeline:
            self.config.custom_pipelines = copy.deepcopy(PIPELINES)  # transformers writes classes into it
        super().save_pretrained(save_directory, *args, **kwargs)
        for file in [code, *map(Path, get_relative_import_files(code))] if has_pipeline else []:
            shutil.copyfile(file, Path(save_directory) / file.name)

    def set_adapter(self, adapter_name: list[str] | str) -> None:
        """Use the adapter of a task that `load_adapter` loaded.

        transformers would ask the heads of the other tasks for it too, which do not have it.
        """
        known = {adapter_name} if isinstance(adapter_name, str) else set(adapter_name)
        if is_peft_available() and known <= set(getattr(self, "peft_config", ())):
            from peft.functional import set_adapter

            set_adapter(self, adapter_name)
        else:
            super().set_adapter(adapter_name)  # which says what is missing

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Conv1d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=1.0 / math.sqrt(module.in_features), a=-2.0, b=2.0)
            if module.bias is not None:
                init.zeros_(module.bias)
            for name in PRODUCTS if isinstance(module, Head) and hasattr(module, "products") else ():
                init.zeros_(module.get_parameter(name))
        elif isinstance(module, StateSpace):
            # S4D-Lin: A_n = -1/2 + i pi n; steps from 0.002 to 0.2 tokens' time, log-uniform over the channels.
            orders = torch.arange(module.states, dtype=torch.float32)
            init.copy_(module.log_decay, torch.full_like(module.log_decay, math.log(0.5)))
            init.copy_(module.frequency, (math.pi * orders).expand(module.channels, -1))
            steps = torch.linspace(math.log(0.002), math.log(0.2), module.channels)
            init.copy_(module.log_step, steps)
            init.normal_(module.weight, std=1.0)
            init.ones_(module.skip)
        elif isinstance(module, TemporalFeatures):
            init.zeros_(module.gate_weight)
            init.zeros_(module.gate_bias)
        elif isinstance(module, Router):
            init.normal_(module.weight, std=std)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, std=1.0 / math.sqrt(self.config.hidden_size))
            init.normal_(module.down_proj, std=1.0 / math.sqrt(self.config.expert_size))
        elif isinstance(module, QueryPooling):
            init.normal_(module.queries, std=1.0)
        elif isinstance(module, MorphologyPath):
            init.normal_(module.mean_beat, std=std)
        elif isinstance(module, RhythmPath):
            init.normal_(module.kind, std=std)
        else:
            super()._init_weights(module)


class EcgMoeModel(EcgMoePreTrainedModel):
    """Backbone and fusion: an ECG in, its embedding out."""

    # The heads of a checkpoint are no part of it, and nobody has to be told so.
    _keys_to_ignore_on_load_unexpected = [r"^heads\.", r"^score\."]

    def __init__(self, config: EcgMoeConfig) -> None:
        super().__init__(config)
        self.encoder = EcgMoeEncoder(config)
        self.fusion = Fusion(config)
        self.post_init()

    def forward(
        self,
        input_values: Tensor | None = None,
        lead_mask: Tensor | None = None,
        sample_mask: Tensor | None = None,
        r_peaks: Tensor | None = None,
        rr_intervals_s: Tensor | None = None,
        period_s: Tensor | None = None,
        encoder_output: EcgMoeEncoderOutput | None = None,
        output_attentions: bool = False,
        **report: Any,
    ) -> EcgMoeModelOutput:
        r"""Embed a batch. `EcgMoeFeatureExtractor` makes all arguments.

        Args:
            input_values: (b, 12, t) at `config.sampling_rate`, in the feature extractor's scale, 0 where missing.
            lead_mask: bool (b, 12), *optional*, defaults to all leads present.
            sample_mask: bool (b, t), *optional*, defaults to no padding.
            r_peaks: (b, n) in samples, negative where there are no more, *optional*: without them the model treats the
                record as one in which no beat was found.
            rr_intervals_s: (b, n), seconds since the beat before, 0 where unknown, *optional*, from `r_peaks`.
            period_s: (b,), mean RR interval, 0 where unknown, *optional*, from `rr_intervals_s`.
            encoder_output: what `encoder` returned before, instead of the signal, *optional*.
            output_attentions: return the fusion's attention on tokens, beats and rhythm.
            report: `quality`, which the feature extractor gives with the signal and nothing here looks at, *optional*.

        Raises:
            TypeError: there is no such argument.
            ValueError: neither `input_values` nor `encoder_output` is given, or the shape is wrong.
        """
        check_report(report)
        if encoder_output is None:
            if input_values is None:
                raise ValueError("pass `input_values`, or an `encoder_output` computed before")
            encoder_output = self.encoder(input_values, lead_mask, sample_mask, r_peaks, rr_intervals_s, period_s)
        embedding, attentions = self.fusion(encoder_output)
        return EcgMoeModelOutput(
            pooler_output=embedding,
            last_hidden_state=encoder_output.last_hidden_state,
            attentions=attentions if output_attentions else None,
            encoder=encoder_output,
        )


class EcgMoeForTasks(EcgMoePreTrainedModel):
    """ECG-MoE with one head for each task of its configuration."""

    def __init__(self, config: EcgMoeConfig) -> None:
        super().__init__(config)
        self.ecgmoe = EcgMoeModel(config)
        self.tasks = {name: Task.from_dict(values) for name, values in (config.tasks or {}).items()}
        self.heads = nn.ModuleDict(
            {f"head_{name}": Head(config.record_size, task) for name, task in self.tasks.items()}
        )
        self.dropout = nn.Dropout(config.head_dropout)
        self.post_init()
        # post_init took over what the backbone keeps silent; here a head that no task names is worth a word.
        self._keys_to_ignore_on_load_unexpected = set[str]()

    def freeze_base_model(self) -> None:
        """Stop training everything but the heads."""
        for parameter in self.ecgmoe.parameters():
            parameter.requires_grad = False

    def add_task(self, task: Task) -> None:
        """Add a head, or replace the one of the same name, for a task that the checkpoint does not have."""
        self.config.tasks = {**(self.config.tasks or {}), task.name: task.to_dict()}
        self.tasks[task.name] = task
        head = Head(self.config.record_size, task)
        self.heads[f"head_{task.name}"] = head.to(self.device, self.dtype)
        self._init_weights(head)

    def remove_task(self, name: str) -> None:
        """Take away a head."""
        self.config.tasks = {key: task for key, task in (self.config.tasks or {}).items() if key != name}
        del self.tasks[name], self.heads[f"head_{name}"]

    def forward(
        self,
        input_values: Tensor | None = None,
        lead_mask: Tensor | None = None,
        sample_mask: Tensor | None = None,
        r_peaks: Tensor | None = None,
        rr_intervals_s: Tensor | None = None,
        period_s: Tensor | None = None,
        labels: dict[str, Tensor] | None = None,
        tasks: list[str] | None = None,
        encoder_output: EcgMoeEncoderOutput | None = None,
        output_attentions: bool = False,
        **report: Any,
    ) -> EcgMoeTaskOutput:
        r"""Answer the tasks.

        Args:
            labels: task to (b, outputs), as `Task.targets` gives them, NaN where unknown, *optional*.
            tasks: names of the heads to use, *optional*, defaults to all.

        See `EcgMoeModel.forward` for the others.
        """
        names = list(self.tasks) if tasks is None else tasks
        unknown = sorted(set(names) - set(self.tasks))
        if unknown:
            raise ValueError(f"no head for {', '.join(unknown)}; this model has {', '.join(self.tasks)}")
        output = self.ecgmoe(
            input_values,
            lead_mask,
            sample_mask,
            r_peaks,
            rr_intervals_s,
            period_s,
            encoder_output=encoder_output,
            output_attentions=output_attentions,
            **report,
        )
        embedding = self.dropout(output.pooler_output)
        logits = {
            name: read_head(self.heads[f"head_{name}"](embedding), self.tasks[name], output.encoder.period_s)
            for name in names
        }
        loss, losses = None, None
        if labels is not None:
            losses = {
                name: task_loss(self.tasks[name], logits[name], labels[name]) for name in names if name in labels
            }
            loss = torch.stack([self.tasks[name].loss_weight * value for name, value in losses.items()]).sum()
            if output.encoder.aux_loss is not None:
                loss = loss + output.encoder.aux_loss
        return EcgMoeTaskOutput(
            loss=loss,
            logits=logits,
            losses=losses,
            pooler_output=output.pooler_output,
            attentions=output.attentions,
            encoder=output.encoder,
        )


def check_report(report: dict[str, Any]) -> None:
    """Let the `quality` of the feature extractor's output pass, and refuse what no `forward` knows.

    Named in a signature it would be kept by transformers' Trainer, which then cannot collate it.

    Raises:
        TypeError: as for every function that lacks an argument.
    """
    unknown = sorted(set(report) - {"quality"})
    if unknown:
        raise TypeError(f"forward() has no argument {', '.join(unknown)}; leave it out")


def task_loss(task: Task, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of one task over the known labels: smooth L1 of standardised values, or (binary) cross-entropy.

    Args:
        logits: (b, outputs); labels: (b, outputs), NaN where unknown.

    Raises:
        ValueError: the shapes differ. (b, 1) against (b,) would broadcast to (b, b) and teach the mean.
    """
    if logits.shape != labels.shape:
        raise ValueError(f"task {task.name}: logits {tuple(logits.shape)} and labels {tuple(labels.shape)} must agree")
    known = torch.isfinite(labels)
    # In half precision a label far from nought is rounded by more than a task's spread.
    labels, logits = torch.where(known, labels, 0.0).float(), logits.float()
    if task.kind == "regression":
        standard = (labels - task.center) / task.spread
        each = functional.smooth_l1_loss(logits, standard, reduction="none", beta=0.1)
    elif task.kind == "multi_class":
        each = -(labels * functional.log_softmax(logits, dim=-1)).sum(dim=-1, keepdim=True)
        known = known.all(dim=-1, keepdim=True)
    else:
        each = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return torch.where(known, each, 0.0).sum() / known.sum().clamp(min=1)


EcgMoeConfig.register_for_auto_class()
EcgMoeModel.register_for_auto_class("AutoModel")
# A recording is a time series; no auto class says more than that of a model with heads of several kinds.
EcgMoeForTasks.register_for_auto_class("AutoModelForTimeSeriesPrediction")

__all__ = ["EcgMoeForTasks", "EcgMoeModel", "EcgMoePreTrainedModel"]
