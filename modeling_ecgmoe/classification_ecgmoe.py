"""ECG-MoE with one head after transformers' own conventions, for its Trainer and for whatever else expects them."""

from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from .configuration_ecgmoe import EcgMoeConfig
from .modeling_ecgmoe import EcgMoeModel, EcgMoePreTrainedModel


class EcgMoeForSequenceClassification(EcgMoePreTrainedModel):
    """Backbone, fusion and one linear head of `config.num_labels` outputs.

    `EcgMoeForTasks` answers many questions at once and knows units, priors and unknown labels; this class answers one,
    the way every classifier of transformers does: names in `config.id2label`, the loss by `config.problem_type`
    ("regression", "single_label_classification" or "multi_label_classification").
    """

    def __init__(self, config: EcgMoeConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.ecgmoe = EcgMoeModel(config)
        self.dropout = nn.Dropout(config.head_dropout)
        self.score = nn.Linear(config.record_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_values: Tensor | None = None,
        lead_mask: Tensor | None = None,
        sample_mask: Tensor | None = None,
        r_peaks: Tensor | None = None,
        rr_intervals_s: Tensor | None = None,
        period_s: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool = False,
        **report: Any,
    ) -> SequenceClassifierOutput:
        r"""Classify a batch.

        Args:
            labels: int64 (b,) for one label of several, float (b, num_labels) for several of several, float (b,) for a
                regression, *optional*.

        See `EcgMoeModel.forward` for the others. The logits are (b, num_labels).
        """
        output = self.ecgmoe(
            input_values,
            lead_mask,
            sample_mask,
            r_peaks,
            rr_intervals_s,
            period_s,
            output_attentions=output_attentions,
            **report,
        )
        logits = self.score(self.dropout(output.pooler_output))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
            if output.encoder.aux_loss is not None:
                loss = loss + output.encoder.aux_loss
        attentions = tuple(output.attentions.values()) if output.attentions is not None else None
        return SequenceClassifierOutput(loss=loss, logits=logits, attentions=attentions)


EcgMoeForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
AutoModelForSequenceClassification.register(EcgMoeConfig, EcgMoeForSequenceClassification, exist_ok=True)

__all__ = ["EcgMoeForSequenceClassification"]
