"""The network in training: backbone, vision head and objective as one module with one loss."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tes.engine.compute import Compute
from tes.engine.solve import LinearHead
from tes.models.backbone import Backbone
from tes.models.layers import batch_norms, frozen_modules
from tes.objectives.base import ModelOutput, Objective, follow


class Learner(nn.Module):
    """Backbone + head + objective. Only the backbone and the head are shipped.

    Attributes:
        key_backbone: A copy of the backbone that follows it slowly, for objectives that need `two_views`; else None.
    """

    def __init__(self, backbone: Backbone, head: LinearHead, objective: Objective, compute: Compute) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(head.weight_CF.shape[1], head.weight_CF.shape[0])
        self.set_head(head)
        self.objective = objective
        self.compute = compute
        has_keys = "two_views" in objective.needs
        self.key_backbone = copy.deepcopy(backbone).requires_grad_(False) if has_keys else None

    def forward(
        self, images_B3HW: Tensor, target_BC: Tensor, key_images_B3HW: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the objective's losses on a batch; `key_images_B3HW` is its second view."""
        key_features_BF = None
        with self.compute.autocast():
            features_BF = self.backbone(images_B3HW)
            if self.key_backbone is not None:
                with torch.no_grad():
                    key_features_BF = self.key_backbone(key_images_B3HW)
        return self.objective.losses(self.output(features_BF, key_features_BF), target_BC)

    def output(self, features_BF: Tensor, key_features_BF: Tensor | None = None) -> ModelOutput:
        """Return what the heads read, in float32: half precision is for the backbone alone."""
        features_BF = features_BF.float()
        key_features_BF = None if key_features_BF is None else key_features_BF.float()
        return ModelOutput(features_BF, self.head(features_BF), self.weights(), key_features_BF)

    def after_step(self) -> None:
        """Let what follows the weights follow them: the backbone's copy, and what the objective keeps."""
        if self.key_backbone is not None:
            follow(self.key_backbone, self.backbone, self.objective.key_momentum)
        with torch.no_grad():
            self.objective.after_step()

    def train(self, mode: bool = True) -> Learner:
        """Set the mode of everything but those parts of the backbone that are not trained: they stay in eval mode."""
        super().train(mode)
        for name in frozen_modules(self.backbone.network) if mode else ():
            for backbone in (self.backbone, self.key_backbone):
                if backbone is not None:
                    backbone.network.get_submodule(name).eval()
        return self

    def batch_norms(self) -> Iterator[nn.Module]:
        """Yield the batch norms of the backbone and of its copy; the objective's own are not pre-trained."""
        for backbone in (self.backbone, self.key_backbone):
            if backbone is not None:
                yield from batch_norms(backbone)

    def weights(self) -> dict[str, Tensor] | None:
        """Return the weights in training by their names in model.safetensors, if the objective asks for them."""
        if "trainable_backbone" not in self.objective.needs:
            return None
        backbone = self.backbone.network.named_parameters()
        trained = {f"backbone.{name}": weight for name, weight in backbone if weight.requires_grad}
        return trained | {"head.weight": self.head.weight, "head.bias": self.head.bias}

    @torch.inference_mode()
    def heads(self, features_NF: Tensor) -> dict[str, Tensor]:
        """Return every classifier's logits (N, C) for features already computed, on the CPU."""
        self.eval()
        parts = [self.objective.heads(self.output(part.to(self.compute.device))) for part in features_NF.split(4096)]
        return {name: torch.cat([part[name].float().cpu() for part in parts]) for name in parts[0]}

    @torch.no_grad()
    def set_head(self, head: LinearHead) -> None:
        """Put a solved head in place of the vision head."""
        self.head.weight.copy_(head.weight_CF)
        self.head.bias.copy_(head.bias_C)

    def linear_head(self) -> LinearHead:
        """Return a copy of the vision head as it stands."""
        return LinearHead(self.head.weight.detach().cpu().clone(), self.head.bias.detach().cpu().clone())


def one_hot(labels_B: Tensor, num_classes: int) -> Tensor:
    """Return targets (B, C) in float32."""
    return nn.functional.one_hot(labels_B, num_classes).float()
