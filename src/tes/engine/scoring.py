"""What a model says about images: of a split, or, out of fold, about the images that it is trained on."""

from __future__ import annotations

import numpy as np
import torch

from tes.config import Config
from tes.data.dataset import Dataset
from tes.data.splits import find_units
from tes.engine.balance import class_weights
from tes.engine.features import FrozenFeatures, compute_features
from tes.engine.fit import Given, head_problem
from tes.engine.learner import Learner
from tes.engine.memory import ImageMemory
from tes.engine.start import out_of_fold_logits
from tes.errors import TrainingError
from tes.predictions import Predictions


def predict(
    learner: Learner,
    dataset: Dataset,
    indices: np.ndarray,
    features: FrozenFeatures | None = None,
    memory: ImageMemory | None = None,
) -> Predictions:
    """Return every head's logits for the images `indices`.

    Images that can no longer be read are left out: rows are known by their paths.

    Args:
        learner: In whatever mode; left in eval mode.
        dataset: Which holds the images.
        indices: Which of them.
        features: Of its backbone, where that was not trained.
        memory: For images that others will ask for as well.
    """
    if features is not None:
        indices = features.readable(indices)
        features_NF = features(indices)
    else:
        wanted = dataset.present(indices)
        features_NF = compute_features(learner.backbone, dataset, wanted, learner.compute, memory)
        indices = dataset.present(wanted)
        features_NF = features_NF[np.isin(wanted, indices)]
    if not torch.isfinite(features_NF).all():
        raise TrainingError(
            "The trained network's features are not finite: training has diverged. Lower the learning rate (--lr), set"
            " optim.clip_norm=1, or use --precision fp32."
        )
    logits = {head: values_NC.numpy() for head, values_NC in learner.heads(features_NF).items()}
    return Predictions([dataset.paths[index] for index in indices], dataset.labels[indices], logits)


def out_of_fold(config: Config, given: Given) -> Predictions | None:
    """Return what the start's problem says about training images that it was not fitted to (5 folds).

    Images that are their class's only ones are left out, and where all are, there is nothing.
    """
    dataset = given.dataset
    indices = given.features.readable(dataset.indices("train"))
    labels_N = torch.from_numpy(dataset.labels[indices])
    units_N = find_units([dataset.sha1s[index] for index in indices], [dataset.groups[index] for index in indices])
    class_weight_C = class_weights(config.optim.class_weights, dataset.classes, labels_N.numpy())
    problem = head_problem(config, given.prior, class_weight_C)
    logits_NC, is_judged_N = out_of_fold_logits(
        problem, given.features(indices), labels_N, units_N, dataset.num_classes
    )
    if not is_judged_N.any():
        return None
    paths = [dataset.paths[index] for index in indices[is_judged_N.numpy()]]
    return Predictions(paths, labels_N[is_judged_N].numpy(), {"vision": logits_NC[is_judged_N].numpy()})
