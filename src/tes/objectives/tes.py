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

from tes.config import ObjectiveConfig
from tes.objectives.base import ModelOutput, Objective, ObjectiveContext, soft_cross_entropy
from tes.objectives.text_head import TextHead


class TextSupervisedConfig(ObjectiveConfig):
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "objective.text_target_weight": 0.2,
            "objective.text_loss_weight": 0.4,
            "objective.temperature": 0.03,
            "objective.warm_projection": False,
            "text.templates": ["a photo of a {}"],
            "text.centre": False,
        }
    }

    name: Literal["tes"] = "tes"
    text_target_weight: Annotated[float, Field(ge=0, le=1)] = Field(
        0.2, description="λ_V: weight of softmax(t) in the target"
    )
    text_loss_weight: Annotated[float, Field(ge=0)] = Field(1.0, description="λ_T: weight of CE(t, y)")
    temperature: Annotated[float, Field(gt=0)] = Field(0.1, description="τ: divides the cosines to the class texts")
    warm_projection: bool = Field(
        True, description="fit h to the pre-trained features first, unless the start is random"
    )
    fit_steps: Annotated[int, Field(ge=1)] = Field(40, description="full-batch steps that fit h to fixed features")
    fit_penalty: Annotated[float, Field(ge=0)] = Field(0.1, description="decoupled weight decay of those steps")


class TextSupervised(Objective):
    """The objective above. Inference needs the backbone and (W, b) alone: no text encoder, no h, no Z."""

    Config: ClassVar[type[ObjectiveConfig]] = TextSupervisedConfig
    needs: ClassVar[frozenset[str]] = frozenset({"class_text"})
    default_start: ClassVar[str] = "auto"
    citation: ClassVar[str] = (
        "Wang, Xu, Hu, Yan, Sang, Qian: Improved Visual Fine-tuning with Natural Language Supervision. ICCV 2023"
    )
    config: TextSupervisedConfig

    def setup(self, context: ObjectiveContext) -> None:
        assert context.class_text_CD is not None, "`needs` has class_text"
        self.text_head = TextHead(context.num_features, context.class_text_CD, self.config.temperature, context.seed)

    def losses(self, out: ModelOutput, target_BC: Tensor) -> dict[str, Tensor]:
        t_BC = self.text_head(out.features_BF)
        return {
            "vision_loss": soft_cross_entropy(out.logits_BC, self._soften(target_BC, t_BC)),
            "text_loss": self.config.text_loss_weight * soft_cross_entropy(t_BC, target_BC),
        }

    def reference(self, out: ModelOutput, target_BC: Tensor) -> Tensor:
        return self._soften(target_BC, self.text_head(out.features_BF))

    def heads(self, out: ModelOutput) -> dict[str, Tensor]:
        return {"vision": out.logits_BC, "text": self.text_head(out.features_BF)}

    def fit_features(self, features_NF: Tensor, target_NC: Tensor) -> dict[str, float]:
        """Minimise CE(t, y) over h on all images at once, for a fixed number of steps: it is not convex.

        The loss does not see the scale of h's weights (batch norm and normalize remove it), so a penalty in the loss
        would only shrink them; as decoupled decay it sets how far each step turns them.
        """
        optimizer = torch.optim.AdamW(
            self.text_head.parameters(), lr=3e-3, weight_decay=self.config.fit_penalty, betas=(0.9, 0.99)
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.config.fit_steps)
        self.text_head.train()
        with torch.enable_grad():
            for _ in range(self.config.fit_steps):
                loss = soft_cross_entropy(self.text_head(features_NF), target_NC)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
        self.text_head.settle_norm(features_NF)
        with torch.no_grad():
            reference_NC = self.reference(ModelOutput(features_NF, features_NF), target_NC)
        # At 0 the reference is the label, and TeS is plain cross-entropy.
        return {"kl_label_to_reference": -(target_NC * reference_NC.clamp_min(1e-12).log()).sum(dim=1).mean().item()}

    def warm_start(self, features_NF: Tensor, target_NC: Tensor) -> dict[str, float]:
        # A random h sends the backbone wherever its random logits point, away from a head that already fits.
        return self.fit_features(features_NF, target_NC) if self.config.warm_projection else {}

    def _soften(self, target_BC: Tensor, t_BC: Tensor) -> Tensor:
        weight = self.config.text_target_weight
        return (1 - weight) * target_BC + weight * t_BC.detach().softmax(dim=1)
