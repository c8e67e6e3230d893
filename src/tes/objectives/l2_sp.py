"""Fine-tuning that is held near its starting point: a penalty on the distance to θ0, where weight decay pulls to 0.

loss = CE(v, y) + α/2 ‖θ - θ0‖² + β/2 ‖W‖²        θ: the backbone's trained weights, θ0: where they started
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from tes.config import ObjectiveConfig, Range
from tes.objectives.base import ModelOutput, Objective, ObjectiveContext


class L2SPConfig(ObjectiveConfig):
    search: ClassVar[Mapping[str, Range]] = {
        "objective.alpha": Range(1e-3, 0.1, log=True),
        "objective.beta": Range(1e-3, 0.1, log=True),
    }
    defaults: ClassVar[Mapping[str, Any]] = {"optim.weight_decay": 0.0}  # it stands in the place of weight decay

    name: Literal["l2_sp"] = "l2_sp"
    alpha: Annotated[float, Field(ge=0)] = Field(0.01, description="α: pulls the backbone to where it started")
    beta: Annotated[float, Field(ge=0)] = Field(0.01, description="β: pulls the vision head's weights to 0")


class L2SP(Objective):
    """The penalties above on top of cross-entropy. The head is new, so it has no θ0, and its bias is free."""

    Config: ClassVar[type[ObjectiveConfig]] = L2SPConfig
    needs: ClassVar[frozenset[str]] = frozenset({"trainable_backbone"})
    citation: ClassVar[str] = (
        "Li, Grandvalet, Davoine: Explicit Inductive Bias for Transfer Learning with Convolutional Networks. ICML 2018"
    )
    config: L2SPConfig

    def setup(self, context: ObjectiveContext) -> None:
        assert context.start_weights is not None, "`needs` has trainable_backbone"
        self.names = [name for name in context.start_weights if name.startswith("backbone.")]
        self.register_buffer("start_P", self._flat(context.start_weights), persistent=False)

    def losses(self, out: ModelOutput, target_BC: Tensor) -> dict[str, Tensor]:
        assert out.weights is not None, "`needs` has trainable_backbone"
        distance = (self._flat(out.weights) - self.start_P).square().sum()
        return super().losses(out, target_BC) | {
            "start_loss": self.config.alpha / 2 * distance,
            "head_loss": self.config.beta / 2 * out.weights["head.weight"].square().sum(),
        }

    def _flat(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the backbone's weights as one vector (P,)."""
        return torch.cat([weights[name].flatten() for name in self.names])
