"""The contract of an objective: what a batch of features, logits and targets should teach the network.

Shapes: B batch, N images, C classes, F features of the backbone, D dimensions of the text embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tes.config import ObjectiveConfig
from tes.models.backbone import SourceHead


@dataclass(frozen=True)
class ModelOutput:
    """What the network says about a batch: the pooled feature that every head reads, and the vision head's logits.

    `weights` are the live weights in training, `backbone.*`, `head.weight`, `head.bias`, without frozen ones and
    buffers; None unless the objective `needs` a `trainable_backbone`.
    """

    features_BF: Tensor
    logits_BC: Tensor
    weights: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class ObjectiveContext:
    """What an objective may build on. Plain tensors: it never sees a loader, a file or the training loop.

    `features_NF` and `target_NC` are the training images' pre-trained features and labels; None from a random start,
    where nobody has computed them. `store` holds what one objective has solved and another can use, by a hash of all
    that it depends on; it lives as long as the comparison. `start_weights` are copies of `ModelOutput.weights` as
    training begins, None where those are.
    """

    num_features: int
    num_classes: int
    seed: int
    class_text_CD: Tensor | None = None
    source_head: SourceHead | None = None
    features_NF: Tensor | None = None
    target_NC: Tensor | None = None
    store: MutableMapping[str, Any] = field(default_factory=dict)
    start_weights: Mapping[str, Tensor] | None = None


class Objective(nn.Module):
    """Cross-entropy to a reference distribution, one per example. Subclasses say which, and may add losses.

    An objective lives in one file and one line of the registry. It may own parameters (they are trained with the
    heads' learning rate), draws their initial values from a generator of its own, and never runs the network.
    """

    Config: ClassVar[type[ObjectiveConfig]]
    needs: ClassVar[frozenset[str]] = frozenset()
    """Of `class_text`, `frozen_teacher`, `source_head`, `trainable_backbone`, `two_views`; checked before loading."""
    default_head: ClassVar[str] = "vision"
    default_start: ClassVar[str] = "probe"
    citation: ClassVar[str] = ""

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__()
        self.config = config

    def setup(self, context: ObjectiveContext) -> None:
        """Build the objective's own parameters; called once, before training."""

    def fit_features(self, features_NF: Tensor, target_NC: Tensor) -> dict[str, float]:
        """Fit the objective's own parameters to features that do not move; return figures worth printing."""
        return {}

    def warm_start(self, features_NF: Tensor, target_NC: Tensor) -> dict[str, float]:
        """Prepare own parameters on the pre-trained features before the whole network is trained from a fitted head."""
        return {}

    def reference(self, out: ModelOutput, target_BC: Tensor) -> Tensor:
        """Return the distribution (B, C) that the vision head is fitted to, without a gradient. Default: the target."""
        return target_BC

    def losses(self, out: ModelOutput, target_BC: Tensor) -> dict[str, Tensor]:
        """Return the named losses of a batch, each a mean over it, already weighted; training minimises their sum.

        The targets are one-hot, or, where images are mixed, soft.
        """
        return {"vision_loss": soft_cross_entropy(out.logits_BC, self.reference(out, target_BC))}

    def heads(self, out: ModelOutput) -> dict[str, Tensor]:
        """Return the logits (B, C) of every classifier that the network has, by name; `default_head` is shipped."""
        return {"vision": out.logits_BC}


def soft_cross_entropy(logits_BC: Tensor, reference_BC: Tensor) -> Tensor:
    """Return the mean over the batch of -sum_c reference_c log softmax(logits)_c, computed in float32 or wider."""
    wide = logits_BC if logits_BC.dtype == torch.float64 else logits_BC.float()
    return -(reference_BC * F.log_softmax(wide, dim=1)).sum(dim=1).mean()
