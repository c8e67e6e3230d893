"""What the vision head starts from."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from tes.engine.learner import one_hot
from tes.engine.solve import LinearHead, solve_head

NUM_FOLDS = 5


def random_head(num_features: int, num_classes: int, seed: int) -> LinearHead:
    """Return PyTorch's own random initialisation of a linear layer: the published way."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.Linear(num_features, num_classes)
    return LinearHead(layer.weight.detach(), layer.bias.detach())


def probe_head(features_NF: Tensor, labels_N: Tensor, num_classes: int, penalty: float) -> LinearHead:
    """Return the converged logistic regression on pre-trained features: a linear probe (Kumar et al. 2022)."""
    return solve_head(features_NF, one_hot(labels_N, num_classes), penalty)


def out_of_fold_logits(features_NF: Tensor, labels_N: Tensor, num_classes: int, penalty: float) -> Tensor:
    """Return the probe's logits (N, C) for every image from a fit that has not seen it, over 5 folds within classes.

    The basis for finding label errors: a model that was trained on a wrong label will not doubt it.
    """
    labels = labels_N.numpy()
    fold = np.empty(len(labels), dtype=int)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        fold[members] = np.arange(len(members)) % NUM_FOLDS
    logits_NC = torch.full((len(labels), num_classes), -math.inf)
    for k in np.unique(fold):
        held_out, rest = torch.from_numpy(fold == k), torch.from_numpy(fold != k)
        if not rest.any():
            return torch.zeros(len(labels), num_classes)
        head = probe_head(features_NF[rest], labels_N[rest], num_classes, penalty)
        logits_NC[held_out] = head.logits(features_NF[held_out])
    return logits_NC
