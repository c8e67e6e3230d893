"""The head as a convex problem on fixed features, solved to convergence.

Features are centred and scaled, x̃ = 20 (f - μ) / r, with μ their mean and r the mean of ‖f - μ‖, so that one penalty
suits every backbone. Logits are x̃ W̃ᵀ + b with W̃ = V, or, with a text prior P (prior.py), W̃_c = α_c P_c + V_c, where the
trust α is learned together with the head:

    probe         min over V, b:       (1/N) Σ CE + penalty ‖V‖² / N
    joint         min over α, V, b:    (1/N) Σ CE + penalty (‖V‖² / N + κ α²)                    one α for all classes
    per_class     α_c = ᾱ + a_c:       (1/N) Σ CE + penalty (‖V‖² / N + κ (Σ_c a_c² / C + ᾱ²))

What trust costs does not fade with N as what corrections cost does: the more images, the larger the V that fits them,
and a prior at a price that fades as well would be used to save on V whether it is right or not (LOG.md, 2026-11-25).
An image's CE may have a weight, by its class (balance.py). The solution is folded into a plain linear layer on the
pooled feature: W = 20 W̃ / r, b' = b - W μ.

A reference that is softer than the label also asks for smaller logits, and a solved head is not overconfident, as a
stepped network is: it would come out too doubtful. So W̃, α and b are fitted to the reference, and then multiplied by
the one number that is best for the labels in the very problem above (LOG.md, 2026-11-25).
Shapes: N images, F features, C classes, K coordinates of the images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tes import console
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
        return LinearHead(folded_CF.float().cpu(), (bias_C - folded_CF @ self.mean_F).float().cpu())


@dataclass(frozen=True)
class Prior:
    """A guess P (C, F) at the rows of W̃, float64 with rows of norm 1 (or 0), and how trust in it is learned."""

    rows_CF: Tensor
    form: str = "per_class"
    kappa: float = 0.2
    zero_shot_trust: float = 1.0


@dataclass(frozen=True)
class Solution:
    """A solved head, and the trust α_c (C,) in the prior's rows; None without a prior."""

    head: LinearHead
    trust_C: Tensor | None = None


@dataclass(frozen=True)
class HeadProblem:
    """One of the problems above.

    Attributes:
        penalty: `optim.head_penalty`.
        prior: P and the form; None: a probe.
        corrects: Whether V is solved for; without it the images only set α and b.
        device: Where it is solved, in float64; the solution is on the CPU.
        class_weight_C: What an image's CE is multiplied by, by its label, brought to a mean of 1 over the images.
    """

    penalty: float
    prior: Prior | None = None
    corrects: bool = True
    class_weight_C: Tensor | None = None
    device: str = "cpu"

    def solve(
        self,
        features_NF: Tensor,
        reference_NC: Tensor,
        target_NC: Tensor | None = None,
        tolerance: float = GRADIENT_TOLERANCE,
    ) -> Solution:
        """Return the minimum.

        Args:
            features_NF: Pooled features that do not move.
            reference_NC: The distribution per image that the head is fitted to: one-hot labels, or softer.
            target_NC: The labels, where the reference is softer: the logits' scale is fitted to them.
            tolerance: Largest entry of the gradient to stop at.

        Raises:
            TrainingError: A setting is so extreme that the solution is not finite.
        """
        try:
            return self._solve(features_NF, reference_NC, target_NC, tolerance)
        except torch.OutOfMemoryError:  # an accelerator's alone
            console.note("the head's problem is too large for the accelerator's memory and is solved on the CPU")
            return replace(self, device="cpu")._solve(features_NF.cpu(), reference_NC, target_NC, tolerance)

    def _solve(self, features_NF: Tensor, reference_NC: Tensor, target_NC: Tensor | None, tolerance: float) -> Solution:
        features_NF = features_NF.to(self.device)
        standardize = Standardizer.fit(features_NF)
        x_NF = standardize(features_NF)
        reference_NC = reference_NC.to(x_NF)
        target_NC = None if target_NC is None else target_NC.to(x_NF)
        (num_images, num_features), num_classes = x_NF.shape, reference_NC.shape[1]
        x_NK, basis_FK = _coordinates(x_NF) if self.corrects else (x_NF[:, :0], x_NF.new_zeros(num_features, 0))
        prior_CF = None if self.prior is None else self.prior.rows_CF.to(x_NF)
        evidence_NC = None if prior_CF is None else x_NF @ prior_CF.T
        weight_N = self._weights(reference_NC if target_NC is None else target_NC)
        shrink = self.penalty / num_images
        unknowns = _Unknowns(x_NK, num_classes, self.prior)
        _minimise(unknowns, x_NK, evidence_NC, reference_NC, weight_N, shrink, tolerance)
        with torch.no_grad():
            scale = 1.0
            if target_NC is not None:
                price = shrink * unknowns.size().item()
                scale = best_scale(unknowns(x_NK, evidence_NC), target_NC, price, weight_N)
            weight_CF = scale * unknowns.weight_CK @ basis_FK.T
            trust_C = None
            if prior_CF is not None:
                trust_C = scale * unknowns.trust()
                weight_CF = weight_CF + trust_C[:, None] * prior_CF
            head = standardize.fold(weight_CF, scale * unknowns.bias_C)
        if not (head.weight_CF.isfinite().all() and head.bias_C.isfinite().all()):
            raise TrainingError(
                f"The head's problem for {num_classes} classes has no finite solution; choose a more usual"
                " optim.head_penalty, or settings of the objective."
            )
        return Solution(head, None if trust_C is None else trust_C.float().cpu())

    def without_labels(self, pool_MF: Tensor) -> Solution:
        """Return the head at 0 shots: b = 0, α = `zero_shot_trust`, μ and r from unlabelled images (M, F)."""
        assert self.prior is not None and len(pool_MF), "refused before: nothing to start from"
        standardize = Standardizer.fit(pool_MF)
        prior_CF = self.prior.rows_CF.to(standardize.mean_F)
        trust_C = prior_CF.new_full((len(prior_CF),), self.prior.zero_shot_trust)
        head = standardize.fold(trust_C[:, None] * prior_CF, torch.zeros_like(trust_C))
        return Solution(head, trust_C.float().cpu())

    def _weights(self, target_NC: Tensor) -> Tensor | None:
        if self.class_weight_C is None:
            return None
        weight_N = target_NC @ self.class_weight_C.to(target_NC)
        return weight_N / weight_N.mean()


class _Unknowns(nn.Module):
    """What a problem is solved for: V in the images' coordinates, b and, with a prior, the trust α in it.

    α is kept in units in which its penalty is that of an entry of V: a parameter with a scale of its own costs L-BFGS
    iterations.
    """

    def __init__(self, x_NK: Tensor, num_classes: int, prior: Prior | None) -> None:
        super().__init__()
        num_images, num_coordinates = x_NK.shape
        self.weight_CK = nn.Parameter(x_NK.new_zeros(num_classes, num_coordinates))
        self.bias_C = nn.Parameter(x_NK.new_zeros(num_classes))
        self.common = self.own_C = None
        if prior is not None:
            self.kappa = prior.kappa * num_images / num_classes
            self.common = nn.Parameter(x_NK.new_zeros(()))
            if prior.form == "per_class":
                self.own_C = nn.Parameter(x_NK.new_zeros(num_classes))

    def forward(self, x_NK: Tensor, evidence_NC: Tensor | None) -> Tensor:
        """Return the logits (N, C); `evidence_NC` is what the prior says, x̃ Pᵀ."""
        logits_NC = torch.addmm(self.bias_C, x_NK, self.weight_CK.T)
        return logits_NC if evidence_NC is None else logits_NC + self.trust() * evidence_NC

    def trust(self) -> Tensor:
        """Return α (C,)."""
        assert self.common is not None, "there is a prior"
        num_classes = len(self.bias_C)
        alpha_C = (self.common / math.sqrt(self.kappa * num_classes)).expand(num_classes)
        return alpha_C if self.own_C is None else alpha_C + self.own_C / math.sqrt(self.kappa)

    def size(self) -> Tensor:
        """Return the sum of squares of what is penalised: everything but b."""
        return sum(unknown.square().sum() for unknown in self.parameters() if unknown is not self.bias_C)


def _minimise(
    unknowns: _Unknowns,
    x_NK: Tensor,
    evidence_NC: Tensor | None,
    reference_NC: Tensor,
    weight_N: Tensor | None,
    shrink: float,
    tolerance: float,
) -> None:
    optimizer = torch.optim.LBFGS(
        unknowns.parameters(),
        max_iter=MAX_ITERATIONS,
        history_size=20,
        tolerance_grad=tolerance,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        fit = soft_cross_entropy(unknowns(x_NK, evidence_NC), reference_NC, weight_N)
        loss = fit + shrink * unknowns.size()
        loss.backward()
        progress.advance(1)
        return loss

    num_images, num_classes = reference_NC.shape
    label = f"solving the head ({num_images} images, {num_classes} classes; often it needs fewer)"
    with torch.enable_grad(), console.progress(MAX_ITERATIONS, label, "evaluations") as progress:
        optimizer.step(closure)


def best_scale(logits_NC: Tensor, target_NC: Tensor, price: float, weight_N: Tensor | None = None) -> float:
    """Return s > 0 with the lowest CE(s · logits, target) + s² · price, a convex problem in one unknown.

    Args:
        logits_NC: Of a solved problem, bias included.
        target_NC: One-hot labels.
        price: What the head that made the logits pays for its weights.
        weight_N: Multiplies the images' CE.
    """
    from scipy.optimize import minimize_scalar

    def loss(log_scale: float) -> float:
        scale = math.exp(log_scale)
        return soft_cross_entropy(scale * logits_NC, target_NC, weight_N).item() + scale**2 * price

    return math.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-6}).x)


def _coordinates(x_NF: Tensor) -> tuple[Tensor, Tensor]:
    """Return the images in a smaller basis where they are few, and the basis (F, K).

    The penalty keeps every row of V within the span of the images, so nothing is lost.
    """
    num_images, num_features = x_NF.shape
    if num_images >= num_features:
        return x_NF, torch.eye(num_features, dtype=x_NF.dtype, device=x_NF.device)
    basis_FK, _ = torch.linalg.qr(x_NF.T)
    return x_NF @ basis_FK, basis_FK
