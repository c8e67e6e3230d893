"""The text head alone: CE(t, y), and t predicts. Cross-entropy where FLYP has its contrastive loss, frozen rows Z.

The cross-entropy ablation of Goyal, Kumar, Garg, Kolter, Raghunathan: Finetune Like You Pretrain. CVPR 2023.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from tes.config import ObjectiveConfig
from tes.objectives.base import ModelOutput, soft_cross_entropy
from tes.objectives.text_objective import TextObjective, TextObjectiveConfig


class TextCrossEntropyConfig(TextObjectiveConfig):
    name: Literal["text_ce"] = "text_ce"


class TextCrossEntropy(TextObjective):
    """CE(t, y). The vision head stays what the start made it, and is no classifier of the run."""

    Config: ClassVar[type[ObjectiveConfig]] = TextCrossEntropyConfig
    default_head: ClassVar[str] = "text"
    citation: ClassVar[str] = (
        "Goyal, Kumar, Garg, Kolter, Raghunathan: Finetune Like You Pretrain:"
        " Improved Finetuning of Zero-Shot Vision Models. CVPR 2023"
    )

    def losses(self, out: ModelOutput, target_BC: Tensor) -> dict[str, Tensor]:
        t_BC = self.text_head(out.features_BF)
        return {"text_loss": soft_cross_entropy(t_BC, target_BC, self.example_weights(target_BC))}

    def heads(self, out: ModelOutput) -> dict[str, Tensor]:
        return {"text": self.text_head(out.features_BF)}
