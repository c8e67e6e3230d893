"""Bi-tuning: two contrastive losses beside cross-entropy, against keys that a slowly moving copy of the network makes.

loss = CE(v, y) + μ (CCE + CCL)

    h = normalize([f; 1]), w_c = normalize([W_c; b_c])         the feature and the class prototypes of the vision head
    z = normalize(projector(f))                                the projection
    CCE = - mean over positives k of log softmax(w_y · h_k / τ)   query: the prototype of the image's class, held fixed
    CCL = - mean over positives k of log softmax(z · z_k / τ)     query: the image's projection

The softmax runs over the image's own key and all keys in the queue; positives are its own key and the queued ones of
its class. Its own key is, for CCL, the projection of its second view by the copy, and for CCE h itself: that is how CCE
reaches the backbone. The queue holds the last K keys of every class; a class that has seen fewer has fewer.
Shapes: B batch, C classes, F features, H = F + 1, P dimensions of the projection, D = H + P, Q = C K queued keys.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from tes.config import ObjectiveConfig, Range
from tes.objectives.base import ModelOutput, Objective, ObjectiveContext, follow, widened


class BiTuningConfig(ObjectiveConfig):
    search: ClassVar[Mapping[str, Range]] = {
        "objective.contrastive_loss_weight": Range(0.1, 3.0, log=True),
        "objective.temperature": Range(0.03, 0.3, log=True),
    }

    name: Literal["bi_tuning"] = "bi_tuning"
    contrastive_loss_weight: Annotated[float, Field(ge=0)] = Field(1.0, description="μ: weight of CCE and CCL")
    temperature: Annotated[float, Field(gt=0)] = Field(0.07, description="τ: divides the cosines to the keys")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.999, description="share that the copy keeps at a step")
    queue_size: Annotated[int, Field(ge=1)] = Field(40, description="K: keys per class")
    projection_dim: Annotated[int, Field(ge=1)] = Field(128, description="P: dimensions of the projection")


class BiTuning(Objective):
    """The losses above. The copy, the projector and the queue serve the training alone, and are not shipped.

    As in the authors' code, but that the queue begins empty, where theirs begins with random keys, and takes in a
    batch's keys after the step, for both losses alike. Keys need no copy of the classifier: none passes through it.
    """

    Config: ClassVar[type[ObjectiveConfig]] = BiTuningConfig
    needs: ClassVar[frozenset[str]] = frozenset({"trainable_backbone", "two_views"})
    citation: ClassVar[str] = (
        "Zhong, Ma, Wang, Kou, Long: Bi-Tuning: Efficient Transfer from Pre-Trained Models. ECML PKDD 2023"
    )
    config: BiTuningConfig

    def setup(self, context: ObjectiveContext) -> None:
        self.key_momentum = self.config.momentum
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            self.projector = nn.Linear(context.num_features, self.config.projection_dim)
        self.key_projector = copy.deepcopy(self.projector).requires_grad_(False)
        size = context.num_features + 1 + self.config.projection_dim
        queue_CKD = torch.zeros(context.num_classes, self.config.queue_size, size)
        self.register_buffer("queue_CKD", queue_CKD, persistent=False)
        self.register_buffer("num_seen_C", torch.zeros(context.num_classes, dtype=torch.long), persistent=False)
        self.waiting: list[tuple[Tensor, Tensor]] = []

    def losses(self, out: ModelOutput, target_BC: Tensor) -> dict[str, Tensor]:
        assert out.weights is not None and out.key_features_BF is not None, "`needs` has both"
        labels_B = target_BC.argmax(dim=1)
        h_BH, z_BP = _with_one(widened(out.features_BF)), normalize(self.projector(widened(out.features_BF)))
        with torch.no_grad():
            w_CH = normalize(torch.cat([out.weights["head.weight"], out.weights["head.bias"][:, None]], dim=1))
            key_features_BF = widened(out.key_features_BF)
            key_z_BP = normalize(self.key_projector(key_features_BF))
            self.waiting.append((torch.cat([_with_one(key_features_BF), key_z_BP], dim=1), labels_B))
        queue_h_QH, queue_z_QP = self.queue_CKD.flatten(0, 1).split([h_BH.shape[1], z_BP.shape[1]], dim=1)
        prototype_BH = w_CH[labels_B]
        cce = self._contrast((prototype_BH * h_BH).sum(dim=1), prototype_BH @ queue_h_QH.T, labels_B)
        ccl = self._contrast((z_BP * key_z_BP).sum(dim=1), z_BP @ queue_z_QP.T, labels_B)
        weight = self.config.contrastive_loss_weight
        return super().losses(out, target_BC) | {"cce_loss": weight * cce, "ccl_loss": weight * ccl}

    def after_step(self) -> None:
        """Move the projector's copy, and put the batch's keys into the queue, the last K of a class if it has more."""
        follow(self.key_projector, self.projector, self.config.momentum)
        keys_BD, labels_B = (torch.cat(parts) for parts in zip(*self.waiting))
        self.waiting.clear()
        same_BB = labels_B[:, None] == labels_B
        num_before_B, num_after_B = same_BB.tril(-1).sum(dim=1), same_BB.triu(1).sum(dim=1)
        slots_B = (self.num_seen_C[labels_B] + num_before_B) % self.config.queue_size
        is_kept_B = num_after_B < self.config.queue_size
        self.queue_CKD[labels_B[is_kept_B], slots_B[is_kept_B]] = keys_BD[is_kept_B]
        self.num_seen_C += labels_B.bincount(minlength=len(self.num_seen_C))

    def _contrast(self, own_B: Tensor, queued_BQ: Tensor, labels_B: Tensor) -> Tensor:
        """Return the loss from the queries' cosines to their own keys and to those in the queue."""
        num_classes, size, _ = self.queue_CKD.shape
        slots_K, classes_C = (torch.arange(n, device=own_B.device) for n in (size, num_classes))
        is_filled_Q = (slots_K < self.num_seen_C[:, None]).flatten()
        is_positive_BQ = is_filled_Q & (labels_B[:, None] == classes_C.repeat_interleave(size))
        logits_BQ = (queued_BQ / self.config.temperature).masked_fill(~is_filled_Q, -torch.inf)
        logits_B = own_B / self.config.temperature
        log_sum_B = torch.cat([logits_B[:, None], logits_BQ], dim=1).logsumexp(dim=1)
        mean_B = (logits_B + logits_BQ.where(is_positive_BQ, 0).sum(dim=1)) / (1 + is_positive_BQ.sum(dim=1))
        return (log_sum_B - mean_B).mean()


def _with_one(features_BF: Tensor) -> Tensor:
    """Return normalize([f; 1]) (B, F + 1)."""
    return normalize(torch.cat([features_BF, features_BF.new_ones(len(features_BF), 1)], dim=1))
