"""Configuration of ECG-MoE: facts of the architecture and of the signal it expects, nothing about training."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .leads import LEADS
from .tasks import TASKS, Task

FAMILIES = ("conv", "ssm", "patch", "trend", "period")
PATHS = ("morphology", "rhythm")
PRETRAINING_TASKS = ("statements", "superclass", "arrhythmia", "age", "sex", "rr_interval", "quality")


@strict
class EcgMoeConfig(PreTrainedConfig):
    r"""
    The signal (fixed by the weights):

    leads (`list[str]`): the order of the rows of `input_values`.
    sampling_rate (`int`): Hz of `input_values`.
    token_stride (`int`): samples between two tokens.

    The backbone:

    families (`list[str]`): temporal feature families, a subset of conv, ssm, patch, trend, period.
    paths (`list[str]`): mixture-of-experts paths, a subset of morphology, rhythm.
    hidden_size (`int`): width D of tokens and beats.
    conv_channels (`list[int]`): widths of the stem at strides 2, 4, 8 and 16.
    conv_kernels (`list[int]`): kernel lengths there.
    conv_blocks (`list[int]`): residual blocks of the stem at strides 4, 8 and 16.
    ssm_channels, ssm_states, ssm_layers (`int`): width, states a channel and depth of the state-space family.
    patch_channels, patch_layers (`int`): width and depth of the patch transformer.
    trend_window_s (`float`): the moving average that splits trend and residual, in seconds.
    phase_bins (`int`): bins of one heart cycle in the period family.
    beat_window_s (`list[float]`): start and end of a beat's window around its R peak, in seconds.
    beat_size (`int`): inner width of the beat encoder.
    path_layers (`int`): attention and mixture layers of each path.
    rhythm_pool (`int`): tokens joined into one coarse token of the rhythm path.
    num_attention_heads (`int`): heads of every attention.

    The experts:

    num_experts, num_experts_per_tok (`int`): routed experts of a layer, and how many of them see a token.
    expert_size (`int`): inner width of an expert; the shared expert has the same.
    router_aux_loss_coef, router_z_loss_coef (`float`): weights of the two router losses.
    period_aware (`bool`): whether tokens and beats know their cardiac phase and RR interval.

    The fusion:

    num_queries (`int`): learned queries of each path.
    fusion_size (`int`): inner width of the record level's feed-forward layer.
    record_size (`int`): width of the record's embedding, `pooler_output`.

    Regularisation: dropout, head_dropout, drop_path (`float`); memory_dropout (`float`), the share of records for
    which the fusion goes without what it pooled from tokens, beats or rhythm, each by itself.

    tasks (`dict`): the heads of the checkpoint, name to `Task.to_dict()`.
    """

    model_type = "ecgmoe"
    keys_to_ignore_at_inference = ["encoder", "aux_loss"]

    leads: list[str] | tuple[str, ...] = LEADS
    sampling_rate: int = 100
    token_stride: int = 16
    families: list[str] | tuple[str, ...] = ("conv", "ssm", "period")
    paths: list[str] | tuple[str, ...] = PATHS
    hidden_size: int = 128
    conv_channels: list[int] | tuple[int, ...] = (32, 64, 128, 192)
    conv_kernels: list[int] | tuple[int, ...] = (9, 3, 3, 3)
    conv_blocks: list[int] | tuple[int, ...] = (1, 1, 1)
    ssm_channels: int = 96
    ssm_states: int = 16
    ssm_layers: int = 1
    patch_channels: int = 96
    patch_layers: int = 1
    trend_window_s: float = 0.8
    phase_bins: int = 48
    beat_window_s: list[float] | tuple[float, ...] = (-0.27, 0.45)
    beat_size: int = 128
    path_layers: int = 1
    rhythm_pool: int = 3
    num_attention_heads: int = 4
    num_experts: int = 4
    num_experts_per_tok: int = 2
    expert_size: int = 64
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001
    period_aware: bool = True
    num_queries: int = 2
    fusion_size: int = 256
    record_size: int = 256
    dropout: float = 0.1
    head_dropout: float = 0.3
    drop_path: float = 0.1
    memory_dropout: float = 0.3
    initializer_range: float = 0.02
    tasks: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.tasks is None:
            # Parts come with the closed forms that end the training, see linear_heads.py.
            self.tasks = {name: TASKS[name].plain().to_dict() for name in PRETRAINING_TASKS}
        if __name__.startswith("modeling_ecgmoe."):
            # The entry asks for the code in the checkpoint's folder; whoever has this package has the pipeline in it.
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)
        _check_names("families", self.families, FAMILIES)
        _check_names("paths", self.paths, PATHS)
        if self.token_stride != 16:
            raise ValueError(f"token_stride must be 16, the stride of the residual network, found {self.token_stride}")
        for name in ("hidden_size", "patch_channels"):
            if getattr(self, name) % (2 * self.num_attention_heads):
                raise ValueError(
                    f"{name}={getattr(self, name)} must be a multiple of 2 * num_attention_heads="
                    f"{2 * self.num_attention_heads}"
                )
        for name, length in (("conv_channels", 4), ("conv_kernels", 4), ("conv_blocks", 3)):
            if len(getattr(self, name)) != length:
                raise ValueError(f"{name} must have {length} entries, found {list(getattr(self, name))}")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} must lie between 1 and num_experts={self.num_experts}"
            )
        if not self.beat_window_s[0] < 0 < self.beat_window_s[1]:
            raise ValueError(f"beat_window_s must span the R peak, found {self.beat_window_s}")
        for name, task in self.tasks.items():
            if Task.from_dict(task).name != name:
                raise ValueError(f"tasks: key {name!r} holds task {task['name']!r}")

    def task(self, name: str) -> Task:
        """The task behind a head."""
        tasks = self.tasks or {}
        if name not in tasks:
            raise ValueError(f"no head for task {name!r}; this checkpoint has {', '.join(tasks)}")
        return Task.from_dict(tasks[name])

    @staticmethod
    def editable_fields() -> tuple[str, ...]:
        """The fields that may differ from the pretrained ones when a model is adapted; the others describe weights."""
        return (
            "tasks",
            "dropout",
            "head_dropout",
            "drop_path",
            "memory_dropout",
            "router_aux_loss_coef",
            "router_z_loss_coef",
        )


def _check_names(field: str, found: list[str] | tuple[str, ...], known: tuple[str, ...]) -> None:
    if not found or len(set(found)) != len(found) or not set(found) <= set(known):
        raise ValueError(f"{field} must be one or more of {', '.join(known)}, each once; found {list(found)}")


__all__ = ["EcgMoeConfig"]
