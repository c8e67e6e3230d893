"""Classes of unequal size: weights on the images' losses, or an order in which every class comes as often.

    balanced    w_c = N / (C n_c)      n_c of the N training images are of class c, as in scikit-learn

An image's loss is multiplied by the weight of its class, brought to a mean of 1 over the training images, so that the
head's penalty and the learning rate mean what they did; of a mixed image the weights are mixed as its labels are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tes.data.classes_file import ClassInfo
from tes.data.names import NameIndex
from tes.errors import ConfigError, listing


def class_weights(
    wanted: str | Mapping[str, float], classes: Sequence[ClassInfo], labels_N: np.ndarray
) -> Tensor | None:
    """Return a weight per class (C,), float64, with mean 1 over the images; None for `none`.

    Args:
        wanted: `none`, `balanced`, or weights by class name; classes that are not named have 1.
        classes: In index order.
        labels_N: The training images' classes, (n,).

    Raises:
        ConfigError: A name is not one of the classes, or two names mean the same.
    """
    counts_C = np.bincount(labels_N, minlength=len(classes))
    if wanted == "none" or not len(labels_N):
        return None
    weight_C = np.ones(len(classes))
    if isinstance(wanted, str):
        weight_C = len(labels_N) / (len(classes) * np.maximum(counts_C, 1))
    else:
        place = {info.label: index for index, info in enumerate(classes)}
        index = NameIndex({info.label: [info.name] for info in classes})
        found = {name: index.find(name) for name in wanted}
        if wrong := [name for name, labels in found.items() if len(labels) != 1]:
            named = listing([index.describe_unknown(name) for name in wrong])
            raise ConfigError(f"`optim.class_weights` names what is not one class of the data: {named}.")
        labels = [labels[0] for labels in found.values()]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ConfigError(f"`optim.class_weights` gives {listing(twice)} more than one weight; keep one.")
        for name, (label,) in found.items():
            weight_C[place[label]] = wanted[name]
    return torch.from_numpy(weight_C / (weight_C[labels_N].mean()))


def balanced_epoch(indices: np.ndarray, labels: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Return as many images as `indices`, every class as often, up to one, in random order.

    Within a class its images take turns: none comes a second time before all others have come.

    Args:
        indices: The training images.
        labels: The classes of all images of the data set.
        draw: The epoch's generator.
    """
    present = draw.permutation(np.unique(labels[indices]))
    share, more = divmod(len(indices), len(present))
    parts = [
        np.resize(draw.permutation(indices[labels[indices] == label]), share + (place < more))
        for place, label in enumerate(present)
    ]
    return draw.permutation(np.concatenate(parts))
