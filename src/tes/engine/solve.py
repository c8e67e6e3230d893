"""The head as a convex problem on fixed features, solved to convergence.

Features are centred and scaled, x̃ = 20 (f - μ) / r, with μ their mean and r the mean of ‖f - μ‖, so that one penalty
suits every backbone. Then

    min over V, b:   (1/N) Σ CE(V x̃ + b, q)  +  (penalty/N) ‖V‖²

and the solution is folded into a plain linear layer on the pooled feature: W = 20 V / r, b' = b - W μ.
Shapes: N images, F features, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tes.errors import TrainingError
from tes.objectives.base import soft_cross_entropy

SCALE = 20.0
MAX_ITERATIONS = 1000
GRADIENT_TOLERANCE = 1e-6
"""Largest entry of the gradient at the solution; ten times as much moves the NLL of a test split by less than 0.001."""


@dataclass(frozen=True)
class LinearHead:
    """A linear classifier on the pooled feature, float32: logits = f Wᵀ + b."""

    weight_CF: Tensor
    bias_C: Tensor

    def logits(self, features_NF: Tensor) -> Tensor:
        """Return logits (N, C)."""
        return features_NF @ self.weight_CF.T + self.bias_C


@dataclass(frozen=True)
class Standardizer:
    """x̃ = 20 (f - μ) / r over the images that it was fitted to."""

    mean_F: Tensor
    radius: Tensor

    @staticmethod
    def fit(features_NF: Tensor) -> Standardizer:
        """Take μ and r from features (N, F)."""
        wide = features_NF.double()
        mean_F = wide.mean(dim=0)
        radius = (wide - mean_F).norm(dim=1).mean()
        return Standardizer(mean_F, radius.clamp_min(1e-12))

    def __call__(self, features_NF: Tensor) -> Tensor:
        return SCALE * (features_NF.double() - self.mean_F) / self.radius

    def fold(self, weight_CF: Tensor, bias_C: Tensor) -> LinearHead:
        """Return the head on plain features that gives the same logits as (weight, bias) on standardised ones."""
        folded_CF = SCALE * weight_CF / self.radius
        return LinearHead(folded_CF.float(), (bias_C - folded_CF @ self.mean_F).float())


def solve_head(
    features_NF: Tensor, reference_NC: Tensor, penalty: float, tolerance: float = GRADIENT_TOLERANCE
) -> LinearHead:
    """Return the head that minimises the problem above.

    Args:
        features_NF: Pooled features that do not move.
        reference_NC: The distribution per image that the head is fitted to: one-hot labels, or softer.
        penalty: `optim.head_penalty`.
        tolerance: Largest entry of the gradient to stop at.

    Raises:
        TrainingError: A setting is so extreme that the solution is not finite.
    """
    standardize = Standardizer.fit(features_NF)
    x_NF = standardize(features_NF)
    basis_FK = None
    if len(x_NF) < x_NF.shape[1]:
        # The penalty keeps every row of V within the span of the images: with few of them, solve in that small space.
        basis_FK, _ = torch.linalg.qr(x_NF.T)
        x_NF = x_NF @ basis_FK
    weight_CK, bias_C = _minimise(x_NF, reference_NC.to(x_NF.dtype), penalty, tolerance)
    weight_CF = weight_CK if basis_FK is None else weight_CK @ basis_FK.T
    head = standardize.fold(weight_CF, bias_C)
    if not (head.weight_CF.isfinite().all() and head.bias_C.isfinite().all()):
        raise TrainingError(
            "The head's problem has no finite solution; choose a more usual optim.head_penalty, or settings of the"
            " objective."
        )
    return head


def _minimise(x_NK: Tensor, reference_NC: Tensor, penalty: float, tolerance: float) -> tuple[Tensor, Tensor]:
    num_images, num_inputs = x_NK.shape
    weight_CK = x_NK.new_zeros(reference_NC.shape[1], num_inputs, requires_grad=True)
    bias_C = x_NK.new_zeros(reference_NC.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight_CK, bias_C],
        max_iter=MAX_ITERATIONS,
        history_size=20,
        tolerance_grad=tolerance,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        logits_NC = torch.addmm(bias_C, x_NK, weight_CK.T)
        loss = soft_cross_entropy(logits_NC, reference_NC) + penalty / num_images * weight_CK.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight_CK.detach(), bias_C.detach()
