"""Cross-entropy to labels that leave a little probability to every class (Szegedy et al., CVPR 2016)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from tes.config import ObjectiveConfig, Range
from tes.objectives.base import ModelOutput, Objective


class LabelSmoothingConfig(ObjectiveConfig):
    search: ClassVar[Mapping[str, Range]] = {"objective.smoothing": Range(0.02, 0.3, log=True)}

    name: Literal["label_smoothing"] = "label_smoothing"
    smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="probability spread evenly over all classes"
    )


class LabelSmoothing(Objective):
    """CE(v, (1 - ε) y + ε/C)."""

    Config: ClassVar[type[ObjectiveConfig]] = LabelSmoothingConfig
    is_seeded: ClassVar[bool] = False
    citation: ClassVar[str] = (
        "Szegedy, Vanhoucke, Ioffe, Shlens, Wojna: Rethinking the Inception Architecture for Computer Vision. CVPR 2016"
    )
    config: LabelSmoothingConfig

    def reference(self, out: ModelOutput, target_BC: Tensor) -> Tensor:
        smoothing = self.config.smoothing
        return (1 - smoothing) * target_BC + smoothing / target_BC.shape[1]
