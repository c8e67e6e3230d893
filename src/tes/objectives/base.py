"""The contract of an objective: what a batch of features, logits and targets should teach the network.

Shapes: B batch, N images, C classes, F features of the backbone, D dimensions of the text embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tes.config import ObjectiveConfig
from tes.errors import ConfigError, listing
from tes.models.backbone import SourceHead
from tes.predictions import HEADS

NEEDS = frozenset(
    {"class_text", "pretrained_features", "source_head", "trainable_backbone", "two_views", "whole_batch"}
    | {"frozen_teacher"}
)
"""What an objective may ask for: the classes' text, the training images' pre-trained features, the classifier of the
pre-training, a backbone that is trained, every image drawn twice, batches that are not split; and a network that
teaches, which nothing brings yet, so that settle.py refuses it."""


@dataclass(frozen=True)
class ModelOutput:
    """What the network says about a batch: the pooled feature that every head reads, and the vision head's logits.

    `weights` are the live weights in training, `backbone.*`, `head.weight`, `head.bias`, without frozen ones and
    buffers; None unless the objective `needs` a `trainable_backbone`. `key_features_BF` are the features of a second
    view of the same images under a slowly moving copy of the backbone, without a gradient; None unless it `needs`
    `two_views`.
    """

    features_BF: Tensor
    logits_BC: Tensor
    weights: Mapping[str, Tensor] | None = None
    key_features_BF: Tensor | None = None


@dataclass(frozen=True)
class ObjectiveContext:
    """What an objective may build on. Plain tensors: it never sees a loader, a file or the training loop.

    `features_NF` and `target_NC` are the training images' pre-trained features and labels; None from a random start,
    where nobody has computed them, unless the objective `needs` `pretrained_features`. `store` holds what one objective
    has solved and another can use, by a hash of all that it depends on; it lives as long as the comparison.
    `start_weights` are copies of `ModelOutput.weights` as training begins, None where those are.
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
    """Of `NEEDS`; checked before training."""
    is_seeded: ClassVar[bool] = True
    """Whether something in it depends on the seed, such as parameters of its own; where nothing does, a comparison
    solves the head of a data set that is used whole from one seed, which stands for all."""
    default_head: ClassVar[str] = "vision"
    """Of `HEADS`: the head that is shipped."""
    default_start: ClassVar[str] = "probe"
    citation: ClassVar[str] = ""
    key_momentum: float = 0.999
    """With `two_views`: the share of its weights that the slowly moving copy of the backbone keeps at a step."""

    def __init_subclass__(cls, **others: Any) -> None:
        super().__init_subclass__(**others)
        if unknown := cls.needs - NEEDS:
            raise ConfigError(
                f"`{cls.__name__}.needs`: {listing(sorted(unknown))} is none of {', '.join(sorted(NEEDS))}."
            )
        if cls.default_head not in HEADS:
            raise ConfigError(f"`{cls.__name__}.default_head`: `{cls.default_head}` is none of {', '.join(HEADS)}.")

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("class_weight_C", None, persistent=False)

    class_weight_C: Tensor | None
    """What an example's losses are multiplied by, by its class (`optim.class_weights`); None: nothing."""

    def example_weights(self, target_BC: Tensor) -> Tensor | None:
        """Return what each example's losses are multiplied by (B,): the weight of its class, or mixture of classes."""
        return None if self.class_weight_C is None else target_BC @ self.class_weight_C.to(target_BC)

    def setup(self, context: ObjectiveContext) -> None:
        """Build the objective's own parameters; called once, before training."""

    def fit_features(self, features_NF: Tensor, target_NC: Tensor) -> dict[str, float]:
        """Fit the objective's own parameters to features that do not move; return figures for run.json."""
        return {}

    def warm_start(self, features_NF: Tensor, target_NC: Tensor) -> dict[str, float]:
        """Prepare on the pre-trained features, where there are any, for training the whole network; return figures."""
        return {}

    def reference(self, out: ModelOutput, target_BC: Tensor) -> Tensor:
        """Return the distribution (B, C) that the vision head is fitted to, without a gradient. Default: the target."""
        return target_BC

    def losses(self, out: ModelOutput, target_BC: Tensor) -> dict[str, Tensor]:
        """Return the named losses of a batch, each a mean over it, already weighted; training minimises their sum.

        The targets are one-hot, or, where images are mixed, soft.
        """
        reference_BC, weight_B = self.reference(out, target_BC), self.example_weights(target_BC)
        return {"vision_loss": soft_cross_entropy(out.logits_BC, reference_BC, weight_B)}

    def after_step(self) -> None:
        """Follow up on a step of the optimiser, once per batch; called without a gradient."""

    def heads(self, out: ModelOutput) -> dict[str, Tensor]:
        """Return the logits (B, C) of every classifier that the network has, by their names in `HEADS`."""
        return {"vision": out.logits_BC}

    def remarks(self, figures: Mapping[str, float]) -> list[str]:
        """Return what the figures of `fit_features` or `warm_start` tell the user, in sentences."""
        return []


def soft_cross_entropy(logits_BC: Tensor, reference_BC: Tensor, weight_B: Tensor | None = None) -> Tensor:
    """Return the mean over the batch of -w sum_c reference_c log softmax(logits)_c, in float32 or wider; no w: 1."""
    loss_B = -(reference_BC * F.log_softmax(widened(logits_BC), dim=1)).sum(dim=1)
    return loss_B.mean() if weight_B is None else (weight_B * loss_B).mean()


def widened(x: Tensor) -> Tensor:
    """Return a tensor in float32, or as it is if it is wider."""
    return x if x.dtype == torch.float64 else x.float()


def content_hash(*tensors: Tensor, settings: Mapping[str, Any]) -> str:
    """Return a SHA-256 of tensors and settings: a key for `ObjectiveContext.store`."""
    digest = hashlib.sha256(repr(sorted(settings.items())).encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


@torch.no_grad()
def follow(slow: nn.Module, live: nn.Module, momentum: float) -> None:
    """Move a copy's parameters towards those of the module it was copied from: θ_k ← m θ_k + (1 - m) θ."""
    for behind, ahead in zip(slow.parameters(), live.parameters(), strict=True):
        behind.lerp_(ahead, 1 - momentum)
