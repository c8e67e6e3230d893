"""The text prior: what the pre-training classifier would say about new classes, carried over by their names.

A supervised backbone ships a head W_src (S, F) with named rows. Kernel ridge regression from a name's embedding to its
row, fitted on the S source classes, predicts a row for any name (predicting classifiers from text:
Elhoseiny et al. 2013, "Write a Classifier"):

    A = normalize(Z_src - m),  B = normalize(Z_target - m),  m the mean row of Z_src
    W̄ = W_src minus its mean row, scaled so that its rows have mean norm 1
    P = exp(γ (B Aᵀ - 1)) [exp(γ (A Aᵀ - 1)) + ρ I]⁻¹ W̄,   minus the mean row, then each row to norm 1

A CLIP image tower (Radford et al. 2021) has no such head, and needs none: it was trained so that
normalize(f projectionᵀ) · z is large where text z describes the image, so P = Z projection, finished in the same way.

Shapes: S source classes, C classes, D dimensions of the text embedding, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tes.text.controls import derangement

CONTROLS = ("lookup", "permuted")
MAX_SOURCE = 4000
"""Source classes that the regression is fitted on: time grows with the cube, and far names say little."""
SMALLEST_NORM = 1e-6


def predict_rows(
    target_CD: Tensor,
    source_SD: Tensor,
    weight_SF: Tensor,
    gamma: float,
    rho: float,
    control: str | None = None,
    seed: int = 0,
) -> Tensor:
    """Return P (C, F), float64, rows of norm 1; a row that says nothing (all names equal) is 0.

    Args:
        target_CD: Unit rows of the classes' texts, not centred.
        source_SD: Unit rows of the source classes' texts by the same encoder, not centred.
        weight_SF: The source head's rows.
        gamma: γ, how fast a name's say falls off with distance.
        rho: ρ, the ridge.
        control: What a comparison holds against it: `lookup` copies the row of the nearest source name, `permuted`
            gives each class the row of another one.
        seed: Of the permutation.
    """
    mean_D = source_SD.double().mean(dim=0)
    a_SD, b_CD = _directions(source_SD, mean_D), _directions(target_CD, mean_D)
    w_SF = weight_SF.double()
    w_SF = w_SF - w_SF.mean(dim=0)
    w_SF = w_SF / w_SF.norm(dim=1).mean()
    cosine_CS = b_CD @ a_SD.T
    if len(a_SD) > MAX_SOURCE:
        kept = cosine_CS.max(dim=0).values.topk(MAX_SOURCE).indices.sort().values
        a_SD, w_SF, cosine_CS = a_SD[kept], w_SF[kept], cosine_CS[:, kept]
    if control == "lookup":
        rows_CF = w_SF[cosine_CS.argmax(dim=1)]
    else:
        kernel_SS = torch.exp(gamma * (a_SD @ a_SD.T - 1))
        kernel_SS.diagonal().add_(rho)
        rows_CF = torch.exp(gamma * (cosine_CS - 1)) @ torch.linalg.solve(kernel_SS, w_SF)
    return _finished(rows_CF, control, seed)


def carry_rows(target_CD: Tensor, projection_DF: Tensor, control: str | None = None, seed: int = 0) -> Tensor:
    """Return P (C, F), float64, rows of norm 1, for an image tower that shares its space with the text encoder.

    Args:
        target_CD: Unit rows of the classes' texts, not centred.
        projection_DF: What carries the image tower's pooled feature to that space.
        control: `permuted` as above; there are no source names to look up.
        seed: Of the permutation.
    """
    assert control != "lookup", "settle() refuses it"
    return _finished(target_CD.double() @ projection_DF.double(), control, seed)


def _finished(rows_CF: Tensor, control: str | None, seed: int) -> Tensor:
    rows_CF = rows_CF - rows_CF.mean(dim=0)
    norms_C1 = rows_CF.norm(dim=1, keepdim=True)
    rows_CF = torch.where(
        norms_C1 < SMALLEST_NORM, torch.zeros_like(rows_CF), rows_CF / norms_C1.clamp_min(SMALLEST_NORM)
    )
    if control == "permuted":
        rows_CF = rows_CF[derangement(len(rows_CF), seed)]
    return rows_CF


def _directions(rows_ND: Tensor, mean_D: Tensor) -> Tensor:
    rest_ND = rows_ND.double() - mean_D
    return rest_ND / rest_ND.norm(dim=1, keepdim=True).clamp_min(1e-12)
