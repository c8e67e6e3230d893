"""Text supervised fine-tuning (TeS): targets softened, example by example, by what a fixed text classifier says.

Wang, Xu, Hu, Yan, Sang, Qian: Improved Visual Fine-tuning with Natural Language Supervision. ICCV 2023 (2304.01489).

    v = W f + b                      vision logits: the classifier that is shipped
    u = normalize(h(f))              h: Linear - BatchNorm - ReLU - Linear, trained
    t = u Zᵀ / τ                     text logits; Z: frozen, unit-norm embeddings of the class names
    q = (1-λ_V) y + λ_V stopgrad(softmax(t))
    loss = CE(v, q) + λ_T CE(t, y)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from tes.config import ObjectiveConfig, Range
from tes.objectives.base import ModelOutput, ObjectiveContext, soft_cross_entropy
from tes.objectives.text_objective import TextObjective, TextObjectiveConfig


class TextSupervisedConfig(TextObjectiveConfig):
    search: ClassVar[Mapping[str, Range]] = {
        **TextObjectiveConfig.search,
        "objective.text_target_weight": Range(0.0, 0.5),
        "objective.text_loss_weight": Range(0.1, 3.0, log=True),
    }
    stepped: ClassVar[frozenset[str]] = frozenset({"objective.text_loss_weight"})
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "objective.text_target_weight": 0.2,
            "objective.text_loss_weight": 0.4,
            "objective.temperature": 0.03,
            "objective.warm_projection": False,
            "text.templates": ["a photo of a {}"],
            "text.centre": False,
        },
        # Controls: what of the gain is left without the names' meaning, without the softened target, without the
        # text loss and with a projection that never moves.
        "permuted-text": {"objective.text_rows": "permuted"},
        "random-text": {"objective.text_rows": "random"},
        "no-vision-target": {"objective.text_target_weight": 0.0},
        "frozen-projection": {"objective.train_projection": False, "objective.text_loss_weight": 0.0},
    }

    name: Literal["tes"] = "tes"
    text_target_weight: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="λ_V: weight of softmax(t) in the target; None: 0.05 for a solved head, 0.2 for all weights"
    )
    text_loss_weight: Annotated[float, Field(ge=0)] = Field(1.0, description="λ_T: weight of CE(t, y)")
    train_projection: bool = Field(
        True, description="train h; else it is fitted to the pre-trained features and stays, batch norm included"
    )

    def decide(self, train: str) -> dict[str, tuple[Any, str]]:
        if self.text_target_weight is not None:
            return {}
        if train == "head":
            # A solved head is not overconfident: more softening costs calibration (LOG.md, 2026-11-25).
            return {"text_target_weight": (0.05, "a solved head is well calibrated already")}
        return {"text_target_weight": (0.2, "the backbone is trained")}

    def check(self, start: str | None, train: str) -> None:
        if self.train_projection:
            return
        if train == "head":
            raise ValueError(
                "`objective.train_projection: false` changes nothing with `train: head`, where the projection does not"
                " move anyway; add `--train all`"
            )
        if start == "random":
            raise ValueError(
                "`objective.train_projection: false` needs a projection fitted to the pre-trained features, and a"
                " random start has none; use `--start probe`"
            )


class TextSupervised(TextObjective):
    """The objective above. Inference needs the backbone and (W, b) alone: no text encoder, no h, no Z."""

    Config: ClassVar[type[ObjectiveConfig]] = TextSupervisedConfig
    default_start: ClassVar[str] = "auto"
    citation: ClassVar[str] = (
        "Wang, Xu, Hu, Yan, Sang, Qian: Improved Visual Fine-tuning with Natural Language Supervision. ICCV 2023"
    )
    config: TextSupervisedConfig

    def setup(self, context: ObjectiveContext) -> None:
        super().setup(context)
        self.text_head.requires_grad_(self.config.train_projection)

    def train(self, mode: bool = True) -> TextSupervised:
        """Set the mode; a projection that is not trained keeps the batch norm's statistics that it was fitted with."""
        super().train(mode)
        if not self.config.train_projection:
            self.text_head.eval()
        return self

    def warm_start(self, features_NF: Tensor, target_NC: Tensor) -> dict[str, float]:
        if not self.config.train_projection:
            return self.fit_features(features_NF, target_NC)
        return super().warm_start(features_NF, target_NC)

    def losses(self, out: ModelOutput, target_BC: Tensor) -> dict[str, Tensor]:
        t_BC, weight_B = self.text_head(out.features_BF), self.example_weights(target_BC)
        return {
            "vision_loss": soft_cross_entropy(out.logits_BC, self._soften(target_BC, t_BC), weight_B),
            "text_loss": self.config.text_loss_weight * soft_cross_entropy(t_BC, target_BC, weight_B),
        }

    def reference(self, out: ModelOutput, target_BC: Tensor) -> Tensor:
        return self._soften(target_BC, self.text_head(out.features_BF))

    def heads(self, out: ModelOutput) -> dict[str, Tensor]:
        return {"vision": out.logits_BC, "text": self.text_head(out.features_BF)}

    def fit_features(self, features_NF: Tensor, target_NC: Tensor) -> dict[str, float]:
        """Fit h; return how far the reference is from the label: at 0, TeS is plain cross-entropy."""
        figures = super().fit_features(features_NF, target_NC)
        with torch.no_grad():
            reference_NC = self.reference(ModelOutput(features_NF, features_NF), target_NC)
        distance = -(target_NC * reference_NC.clamp_min(1e-12).log()).sum(dim=1).mean().item()
        return figures | {"kl_label_to_reference": distance}

    def remarks(self, figures: Mapping[str, float]) -> list[str]:
        if (distance := figures.get("kl_label_to_reference")) is None:
            return []
        return [f"KL(label ‖ softened target) is {distance:.3g} on average; at 0 this is plain cross-entropy"]

    def guess(self, target_BC: Tensor, t_BC: Tensor) -> Tensor:
        """Return the distribution (B, C) that softens the targets; no gradient flows from it into t."""
        return t_BC.detach().softmax(dim=1)

    def _soften(self, target_BC: Tensor, t_BC: Tensor) -> Tensor:
        weight = self.config.text_target_weight
        assert weight is not None, "settle() has decided it"
        return (1 - weight) * target_BC + weight * self.guess(target_BC, t_BC)
