"""TeS with one soft label per class in place of one per image: what do per-image references add?

    q = (1-λ_V) y + λ_V softmax(z_y Zᵀ / τ_s)          loss = CE(v, q) + λ_T CE(t, y)

At τ the soft labels would be nearly one-hot (Z's rows are far apart, where u lies between them). So τ_s is the one at
which their mean entropy over the training images is that of softmax(t), t being h fitted to the pre-trained features;
from a random start there are no such features, and τ_s is τ unless it is set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from tes.config import ObjectiveConfig, Range
from tes.objectives.base import ObjectiveContext
from tes.objectives.tes import TextSupervised, TextSupervisedConfig

TEMPERATURES = (1e-4, 1e4)


class StaticTextConfig(TextSupervisedConfig):
    search: ClassVar[Mapping[str, Range]] = {
        key: TextSupervisedConfig.search[key] for key in ("objective.text_target_weight", "objective.text_loss_weight")
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # those of `tes` are about softmax(t)

    name: Literal["static_text"] = "static_text"
    static_temperature: Annotated[float, Field(gt=0)] | None = Field(
        None, description="τ_s; None: the soft labels are as uncertain as softmax(t); from a random start, τ"
    )


class StaticText(TextSupervised):
    """TeS with another reference, and nothing else changed."""

    Config: ClassVar[type[ObjectiveConfig]] = StaticTextConfig
    default_start: ClassVar[str] = "probe"
    config: StaticTextConfig

    def setup(self, context: ObjectiveContext) -> None:
        super().setup(context)
        rows_CD = self.text_head.class_text_CD
        self.static_temperature = self.config.static_temperature or self.config.temperature
        if self.config.static_temperature is None and context.features_NF is not None:
            assert context.target_NC is not None
            with torch.no_grad():
                t_NC = self.fitted_head(context.features_NF, context.target_NC)(context.features_NF)
            share_C = context.target_NC.mean(dim=0)
            self.static_temperature = matching_temperature(rows_CD, share_C, entropy(t_NC).mean().item())
        soft_CC = (rows_CD @ rows_CD.T / self.static_temperature).softmax(dim=1)
        self.register_buffer("soft_CC", soft_CC, persistent=False)

    def fit_features(self, features_NF: Tensor, target_NC: Tensor) -> dict[str, float]:
        return super().fit_features(features_NF, target_NC) | {"static_temperature": self.static_temperature}

    def guess(self, target_BC: Tensor, t_BC: Tensor) -> Tensor:
        return target_BC @ self.soft_CC


def entropy(logits_NC: Tensor) -> Tensor:
    """Return the entropy (N,) in nats of each row's softmax, float64 on the CPU."""
    log_NC = logits_NC.cpu().double().log_softmax(dim=1)
    return -(log_NC.exp() * log_NC).sum(dim=1)


def matching_temperature(rows_CD: Tensor, share_C: Tensor, wanted: float) -> float:
    """Return the τ_s at which Σ_c share_c H(softmax(z_c Zᵀ / τ_s)) is `wanted`, by bisection: H rises with τ_s.

    Equal rows of Z cannot be told apart at any temperature: where the entropy cannot be reached, the nearest end of
    `TEMPERATURES` is returned.
    """
    rows_CD = rows_CD.cpu().double()
    cosine_CC = rows_CD @ rows_CD.T
    share_C = share_C.to(cosine_CC)
    low, high = map(math.log, TEMPERATURES)
    for _ in range(60):
        middle = (low + high) / 2
        if (share_C * entropy(cosine_CC / math.exp(middle))).sum().item() < wanted:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)
