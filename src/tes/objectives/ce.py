"""Plain fine-tuning: cross-entropy to the labels. From the start `probe` it never sees a word of text."""

from __future__ import annotations

from typing import ClassVar, Literal

from tes.config import ObjectiveConfig
from tes.objectives.base import Objective


class CrossEntropyConfig(ObjectiveConfig):
    name: Literal["ce"] = "ce"


class CrossEntropy(Objective):
    """CE(v, y): the base contract as it stands."""

    Config: ClassVar[type[ObjectiveConfig]] = CrossEntropyConfig
    is_seeded: ClassVar[bool] = False
