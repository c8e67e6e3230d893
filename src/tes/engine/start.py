"""What the vision head starts from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from tes.engine.learner import one_hot
from tes.engine.solve import HeadProblem, LinearHead

NUM_FOLDS = 5


def random_head(num_features: int, num_classes: int, seed: int) -> LinearHead:
    """Return PyTorch's own random initialisation of a linear layer: the published way."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.Linear(num_features, num_classes)
    return LinearHead(layer.weight.detach(), layer.bias.detach())


def out_of_fold_logits(
    problem: HeadProblem, features_NF: Tensor, labels_N: Tensor, units_N: np.ndarray, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Return logits (N, C) for every image from a head that was solved without it, over 5 folds within classes.

    And which images (N,) such a head can judge: those of whose class it has seen another unit. It would be sure of all
    others that they are of some other class.

    The basis for finding label errors: a model that was trained on a wrong label will not doubt it. Images of one unit
    (identical, or of one group) share a fold, or a copy in the other folds would vouch for the label.
    """
    fold_of: dict[int, int] = {}
    for label in range(num_classes):
        members = units_N[labels_N.numpy() == label].tolist()
        new = [unit for unit in dict.fromkeys(members) if unit not in fold_of]
        fold_of |= {unit: number % NUM_FOLDS for number, unit in enumerate(new)}
    fold_N = torch.tensor([fold_of[unit] for unit in units_N.tolist()])
    logits_NC = torch.zeros(len(labels_N), num_classes)
    is_judged_N = torch.zeros(len(labels_N), dtype=torch.bool)
    for fold in range(NUM_FOLDS):
        held_out = fold_N == fold
        if held_out.any() and not held_out.all():
            target_NC = one_hot(labels_N[~held_out], num_classes)
            head = problem.solve(features_NF[~held_out], target_NC, tolerance=1e-4).head  # doubts need no more digits
            logits_NC[held_out] = head.logits(features_NF[held_out])
            is_judged_N |= held_out & torch.isin(labels_N, labels_N[~held_out])
    return logits_NC, is_judged_N
