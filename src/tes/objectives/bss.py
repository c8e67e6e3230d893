"""Batch spectral shrinkage: the weakest directions of a batch's features are held to be what does not transfer.

loss = CE(v, y) + η Σ_{i ≤ k} σ_i²        σ_1 ≤ σ_2 ≤ …: the singular values of the batch's features (B, F)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from tes.config import ObjectiveConfig, Range
from tes.objectives.base import ModelOutput, Objective, widened


class BatchSpectralShrinkageConfig(ObjectiveConfig):
    search: ClassVar[Mapping[str, Range]] = {"objective.eta": Range(1e-4, 1e-1, log=True)}

    name: Literal["bss"] = "bss"
    eta: Annotated[float, Field(ge=0)] = Field(1e-3, description="η: weight of the smallest squared singular values")
    num_values: Annotated[int, Field(ge=1)] = Field(1, description="k: how many of them; at most min(B, F) count")


class BatchSpectralShrinkage(Objective):
    """The penalty above on top of cross-entropy. It is the whole batch's: its parts have other singular values."""

    Config: ClassVar[type[ObjectiveConfig]] = BatchSpectralShrinkageConfig
    needs: ClassVar[frozenset[str]] = frozenset({"trainable_backbone", "whole_batch"})
    citation: ClassVar[str] = (
        "Chen, Wang, Fu, Long, Wang: Catastrophic Forgetting Meets Negative Transfer:"
        " Batch Spectral Shrinkage for Safe Transfer Learning. NeurIPS 2019"
    )
    config: BatchSpectralShrinkageConfig

    def losses(self, out: ModelOutput, target_BC: Tensor) -> dict[str, Tensor]:
        smallest = singular_values(widened(out.features_BF))[-self.config.num_values :]
        return super().losses(out, target_BC) | {"spectral_loss": self.config.eta * smallest.square().sum()}


def singular_values(features_BF: Tensor) -> Tensor:
    """Return the singular values (min(B, F),), largest first; NaN where the features are not finite.

    From the features themselves: the eigenvalues of their Gram matrix lose all digits of a σ below 0.0003 of the
    largest. The gradient of Σ σ², 2 Σ σ_i u_i v_iᵀ, is finite where some are equal or zero.
    """
    try:
        return torch.linalg.svdvals(features_BF)
    except torch.linalg.LinAlgError:  # training has diverged: the loop says so, with the batch's files
        return features_BF.sum() * features_BF.new_full((min(features_BF.shape),), torch.nan)
