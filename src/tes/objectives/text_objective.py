"""What the objectives with a text head share: its settings, and h, fitted to fixed features once for all of them.

Shapes: N images, C classes, F features, D dimensions of the text embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tes.config import ObjectiveConfig, Range
from tes.objectives.base import Objective, ObjectiveContext, content_hash
from tes.objectives.text_head import TextHead, fit_text_head
from tes.text.controls import derangement


class TextObjectiveConfig(ObjectiveConfig):
    search: ClassVar[Mapping[str, Range]] = {"objective.temperature": Range(0.03, 0.3, log=True)}

    temperature: Annotated[float, Field(gt=0)] = Field(0.1, description="τ: divides the cosines to the class texts")
    text_rows: Literal["own", "permuted", "random"] = Field(
        "own", description="controls: each class has another's row of Z, or a random direction; the prior keeps its own"
    )
    warm_projection: bool = Field(
        True, description="fit h to the pre-trained features first, unless the start is random"
    )
    fit_steps: Annotated[int, Field(ge=1)] = Field(40, description="full-batch steps that fit h to fixed features")
    fit_penalty: Annotated[float, Field(ge=0)] = Field(0.1, description="decoupled weight decay of those steps")


class TextObjective(Objective):
    """Base of objectives that own a text head, `text_head`. Subclasses say what it is for."""

    needs: ClassVar[frozenset[str]] = frozenset({"class_text"})
    config: TextObjectiveConfig

    def setup(self, context: ObjectiveContext) -> None:
        assert context.class_text_CD is not None, "`needs` has class_text"
        self.seed, self.store = context.seed, context.store
        self.rows_CD = class_rows(context.class_text_CD, self.config.text_rows, context.seed)
        self.text_head = TextHead(context.num_features, self.rows_CD, self.config.temperature, self.seed)

    def fit_features(self, features_NF: Tensor, target_NC: Tensor) -> dict[str, float]:
        """Put the fitted h in place."""
        self.text_head.load_state_dict(self.fitted_head(features_NF, target_NC).state_dict())
        self.text_head.eval()
        return {}

    def warm_start(self, features_NF: Tensor, target_NC: Tensor) -> dict[str, float]:
        # A random h sends the backbone wherever its random logits point, away from a head that already fits.
        return self.fit_features(features_NF, target_NC) if self.config.warm_projection else {}

    def fitted_head(self, features_NF: Tensor, target_NC: Tensor) -> TextHead:
        """Return the head fitted to fixed features: from the store if any arm has fitted it to the same."""
        settings = {
            "temperature": self.config.temperature,
            "fit_steps": self.config.fit_steps,
            "fit_penalty": self.config.fit_penalty,
            "seed": self.seed,
        }
        weight_N = self.example_weights(target_NC)
        weighted = () if weight_N is None else (weight_N,)
        key = f"text_head {content_hash(features_NF, target_NC, self.rows_CD, *weighted, settings=settings)}"
        if key not in self.store:
            head = fit_text_head(features_NF, target_NC, self.rows_CD, weight_N=weight_N, **settings)
            self.store[key] = {name: tensor.cpu() for name, tensor in head.state_dict().items()}
        head = TextHead(features_NF.shape[1], self.rows_CD, self.config.temperature, self.seed)
        head.load_state_dict(self.store[key])
        return head.to(features_NF).eval()


def class_rows(class_text_CD: Tensor, which: str, seed: int) -> Tensor:
    """Return the rows of Z (C, D) that `text_rows` names: `own`, `permuted` by a derangement, or `random` unit rows."""
    if which == "permuted":
        return class_text_CD[torch.from_numpy(derangement(len(class_text_CD), seed)).to(class_text_CD.device)]
    if which == "random":
        rows = np.random.default_rng(seed).standard_normal(class_text_CD.shape)
        return torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True)).to(class_text_CD)
    return class_text_CD
