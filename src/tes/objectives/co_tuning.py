"""Co-Tuning: the classifier of the pre-training is kept, and told which of its classes each new class resembles.

loss = CE(v, y) + λ CE(W_src f + b_src, p(y_s | y))        W_src, b_src: the source head, trained further

The relationship p(y_s | y_t), one distribution over the source classes per class, is learned once, from what the
pre-trained network says about the training images, p(y_s | x) = softmax((W_src f + b_src) / T):

    direct     p(y_s | y_t) = mean of p(y_s | x) over the images of class y_t
    reverse    p(y_t | y_s) by logistic regression from p(y_s | x) to y, read at one-hot source classes;
               p(y_s | y_t) ∝ p(y_t | y_s) p(y_s), with p(y_s) = mean of p(y_s | x)

Shapes: N images, C classes, S source classes, F features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tes.config import ObjectiveConfig, Range
from tes.errors import ConfigError
from tes.objectives.base import ModelOutput, Objective, ObjectiveContext, content_hash, soft_cross_entropy, widened

MIN_HELD_OUT = 20
"""Fewer images cannot tell penalties apart."""
HELD_OUT_EVERY = 5
INVERSE_PENALTIES = tuple(10.0**power for power in range(-4, 5))
"""From strong to weak, as scikit-learn's C: Σ CE + ‖W‖² / 2C. The authors' range, at decades."""
MAX_ITERATIONS = 100


class CoTuningConfig(ObjectiveConfig):
    search: ClassVar[Mapping[str, Range]] = {"objective.source_loss_weight": Range(0.3, 10.0, log=True)}

    name: Literal["co_tuning"] = "co_tuning"
    source_loss_weight: Annotated[float, Field(ge=0)] = Field(2.3, description="λ: weight of the source head's loss")
    relationship: Literal["direct", "reverse"] | None = Field(
        None, description=f"how p(y_s | y_t) is learned; None: reverse where {MIN_HELD_OUT} images can be held out"
    )
    source_temperature: Annotated[float, Field(gt=0)] = Field(
        1.13, description="T: calibrates the source head; the authors' for ImageNet, since there are no source images"
    )


class CoTuning(Objective):
    """The losses above. Only the vision head is shipped.

    The authors calibrate the source head on source images and choose the regression's penalty on a validation split.
    Here there are no source images, so T is a setting, and a fifth of the training images of each class that has two
    or more is held out for the penalty; with fewer than `MIN_HELD_OUT` such images the direct approach is taken.
    """

    Config: ClassVar[type[ObjectiveConfig]] = CoTuningConfig
    needs: ClassVar[frozenset[str]] = frozenset({"pretrained_features", "source_head", "trainable_backbone"})
    citation: ClassVar[str] = "You, Kou, Long, Wang: Co-Tuning for Transfer Learning. NeurIPS 2020"
    config: CoTuningConfig

    def setup(self, context: ObjectiveContext) -> None:
        head = context.source_head
        assert head is not None, "`needs` has source_head"
        self.store = context.store
        self.source_weight_SF = nn.Parameter(head.weight_SF.clone())
        self.source_bias_S = nn.Parameter(head.bias_S.clone())
        relationship_CS = head.weight_SF.new_zeros(context.num_classes, len(head.weight_SF))
        self.register_buffer("relationship_CS", relationship_CS, persistent=False)

    def warm_start(self, features_NF: Tensor, target_NC: Tensor) -> dict[str, float]:
        """Learn the relationship; return how."""
        with torch.no_grad():
            logits_NS = self._source_logits(features_NF).cpu().double()  # float64: not every accelerator has it
        source_NS = (logits_NS / self.config.source_temperature).softmax(dim=1)
        form = self.config.relationship
        key = f"relationship {content_hash(source_NS, target_NC, settings={'form': form})}"
        if key not in self.store:
            self.store[key] = learn_relationship(source_NS, target_NC.cpu().double(), form)
        relationship_CS, figures = self.store[key]
        self.relationship_CS.copy_(relationship_CS)
        return figures

    def remarks(self, figures: Mapping[str, float]) -> list[str]:
        how = "mean source prediction of each class"
        if figures["num_held_out"]:
            how = (
                f"logistic regression, C = {figures['inverse_penalty']:g} by {figures['num_held_out']} held-out images"
            )
        return [
            f"p(source class | class): {how}; source predictions at temperature {self.config.source_temperature:g}, a"
            " setting, since there are no source images to calibrate them on"
        ]

    def losses(self, out: ModelOutput, target_BC: Tensor) -> dict[str, Tensor]:
        source_BS, weight_B = target_BC @ self.relationship_CS, self.example_weights(target_BC)
        source_loss = soft_cross_entropy(self._source_logits(out.features_BF), source_BS, weight_B)
        return super().losses(out, target_BC) | {"source_loss": self.config.source_loss_weight * source_loss}

    def _source_logits(self, features_NF: Tensor) -> Tensor:
        return nn.functional.linear(widened(features_NF), self.source_weight_SF, self.source_bias_S)


def learn_relationship(source_NS: Tensor, target_NC: Tensor, form: str | None) -> tuple[Tensor, dict[str, float]]:
    """Return p(y_s | y_t) (C, S), rows that sum to 1, and figures on how it was learned.

    Args:
        source_NS: Calibrated source predictions p(y_s | x), float64.
        target_NC: One-hot labels, float64; every class has an image.
        form: `direct`, `reverse`, or None: see `CoTuningConfig.relationship`.

    Raises:
        ConfigError: `reverse`, and too few images can be held out.
    """
    is_held_out_N = held_out(target_NC)
    num_held_out = int(is_held_out_N.sum())
    if form == "reverse" and num_held_out < MIN_HELD_OUT:
        raise ConfigError(
            f"`objective.relationship: reverse` chooses a penalty on held-out training images, and {num_held_out} can"
            f" be held out where it takes {MIN_HELD_OUT}; leave the setting out, or give more shots."
        )
    if form == "direct" or num_held_out < MIN_HELD_OUT:
        return target_NC.T @ source_NS / target_NC.sum(dim=0)[:, None], {"num_held_out": 0}
    fitted, chosen = ~is_held_out_N, (math.inf, 0.0, 0.0)
    weight_CS = None
    for inverse_penalty in INVERSE_PENALTIES:
        weight_CS = fit_regression(source_NS[fitted], target_NC[fitted], inverse_penalty, weight_CS)
        logits_MC = source_NS[is_held_out_N] @ weight_CS.T
        scale, nll = calibrate(logits_MC, target_NC[is_held_out_N])
        chosen = min(chosen, (nll, inverse_penalty, scale))
    nll, inverse_penalty, scale = chosen
    weight_CS = fit_regression(source_NS, target_NC, inverse_penalty)
    log_joint_CS = (scale * weight_CS).log_softmax(dim=0) + source_NS.mean(dim=0).log()
    figures = {"num_held_out": num_held_out, "inverse_penalty": inverse_penalty, "scale": scale, "held_out_nll": nll}
    return log_joint_CS.softmax(dim=1), figures


def held_out(target_NC: Tensor) -> Tensor:
    """Return which images (N,) are held out: every fifth of a class, if it has two or more."""
    rank_N = (target_NC.cumsum(dim=0) * target_NC).sum(dim=1) - 1
    size_N = (target_NC * target_NC.sum(dim=0)).sum(dim=1)
    return (rank_N % HELD_OUT_EVERY == 0) & (size_N > 1)


def fit_regression(
    source_NS: Tensor, target_NC: Tensor, inverse_penalty: float, start_CS: Tensor | None = None
) -> Tensor:
    """Return W (C, S) that minimises Σ CE(W p, y) + ‖W‖² / 2C, without an intercept, as the authors do."""
    weight_CS = source_NS.new_zeros(target_NC.shape[1], source_NS.shape[1]) if start_CS is None else start_CS.clone()
    weight_CS.requires_grad_()
    shrink = 1 / (2 * inverse_penalty * len(source_NS))
    optimizer = torch.optim.LBFGS(
        [weight_CS], max_iter=MAX_ITERATIONS, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = soft_cross_entropy(source_NS @ weight_CS.T, target_NC) + shrink * weight_CS.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight_CS.detach()


def calibrate(logits_MC: Tensor, target_MC: Tensor) -> tuple[float, float]:
    """Return the factor on the logits that gives the lowest NLL, and that NLL."""
    from scipy.optimize import minimize_scalar

    def nll(log_scale: float) -> float:
        return soft_cross_entropy(math.exp(log_scale) * logits_MC, target_MC).item()

    found = minimize_scalar(nll, bounds=(-5, 10), method="bounded")
    return math.exp(found.x), float(found.fun)
