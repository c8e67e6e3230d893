"""Which labels a model doubts: the one place that says what doubt is.

Shapes: n images, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tes.predictions import Predictions


@dataclass(frozen=True)
class Doubt:
    """What a model that had not seen an image thinks of its label.

    Attributes:
        path: The image, relative to the data.
        label: Index of the class that the data says.
        suggested: Index of the class that the model finds most probable; None where it is the label.
        doubt: 0..1.
    """

    path: str
    label: int
    suggested: int | None
    doubt: float


def doubts(predictions: Predictions) -> list[Doubt]:
    """Return the images, the most doubted label first.

    The doubt is 1 - p(label | image). That p comes from a model that was not fitted to the image is what makes it a
    doubt: a model agrees with the labels that it was trained on.
    Source: self-confidence in Northcutt, Jiang and Chuang, "Confident Learning", JAIR 2021, section 3.2.

    Args:
        predictions: Out of fold, as in a run's predictions/train.npz; the first head is asked.
    """
    p_NC = predictions.probabilities(predictions.heads()[0])
    labels = predictions.labels
    doubt_N = 1 - p_NC[np.arange(len(labels)), labels]
    likeliest_N = p_NC.argmax(axis=1)
    order = np.lexsort((predictions.paths, -doubt_N))
    return [
        Doubt(
            path=predictions.paths[index],
            label=int(labels[index]),
            suggested=int(likeliest_N[index]) if likeliest_N[index] != labels[index] else None,
            doubt=float(doubt_N[index]),
        )
        for index in order
    ]
