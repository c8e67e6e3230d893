"""Which mistakes a model makes: classes taken for one another, and images it is sure and wrong about.

Shapes: n images, C classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tes.doubts import doubts
from tes.predictions import Predictions

NUM_PAIRS = 12
NUM_PER_PAIR = 4
NUM_ERRORS = 24
NUM_DOUBTS = 48


@dataclass(frozen=True)
class Confusion:
    """A class whose images are taken for another.

    Attributes:
        label: Index of the true class.
        predicted: Index of the class that its images are taken for.
        paths: These images, the surest mistake first.
        num_samples: How many images the true class has.
    """

    label: int
    predicted: int
    paths: list[str]
    num_samples: int


@dataclass(frozen=True)
class Mistake:
    """An image that is taken for another class, and with what probability."""

    path: str
    label: int
    predicted: int
    prob: float


def confusions(predictions: Predictions, head: str, limit: int = NUM_PAIRS) -> list[Confusion]:
    """Return the most frequent pairs (class, taken for), those with the larger share of their class first in ties."""
    found: dict[tuple[int, int], list[str]] = {}
    for mistake in mistakes(predictions, head):
        found.setdefault((mistake.label, mistake.predicted), []).append(mistake.path)
    num_C = np.bincount(predictions.labels, minlength=predictions.num_classes)
    order = sorted(found, key=lambda pair: (-len(found[pair]), num_C[pair[0]], pair))
    return [Confusion(*pair, found[pair], int(num_C[pair[0]])) for pair in order[:limit]]


def mistakes(predictions: Predictions, head: str) -> list[Mistake]:
    """Return the wrongly classified images, the one that the head was surest about first."""
    p_NC = predictions.probabilities(head)
    predicted_N, prob_N = p_NC.argmax(axis=1), p_NC.max(axis=1)
    wrong = np.flatnonzero(predicted_N != predictions.labels)
    order = wrong[np.lexsort((wrong, -prob_N[wrong]))]
    return [
        Mistake(predictions.paths[i], int(predictions.labels[i]), int(predicted_N[i]), float(prob_N[i])) for i in order
    ]


def worth_showing(predictions: Mapping[str, Predictions], head: str) -> list[str]:
    """Return the paths of the images that a report on a run wants to show, the most wanted first.

    Args:
        predictions: By split: `train` (out of fold), `val`, `test`, as far as there are any.
        head: The one that is shipped.
    """
    scored = next((predictions[split] for split in ("test", "val") if split in predictions), None)
    doubted = [doubt.path for doubt in doubts(predictions["train"])[:NUM_DOUBTS]] if "train" in predictions else []
    if scored is None:
        return doubted
    pairs = [path for pair in confusions(scored, head) for path in pair.paths[:NUM_PER_PAIR]]
    sure = [mistake.path for mistake in mistakes(scored, head)[:NUM_ERRORS]]
    return list(dict.fromkeys([*pairs, *sure, *doubted]))


def often_wrong(predictions: Iterable[tuple[Predictions, str]], limit: int = NUM_PAIRS) -> list[str]:
    """Return the images of the pairs that several runs confuse most, those that most of the runs mistake first.

    Args:
        predictions: Of each run, with the head to ask.
        limit: How many pairs.
    """
    by_pair: dict[tuple[int, int], Counter[str]] = {}
    for said, head in predictions:
        predicted_N = said.logits[head].argmax(axis=1) if head in said.logits else said.probabilities(head).argmax(1)
        for index in np.flatnonzero(predicted_N != said.labels):
            pair = (int(said.labels[index]), int(predicted_N[index]))
            by_pair.setdefault(pair, Counter())[said.paths[index]] += 1
    pairs = sorted(by_pair, key=lambda pair: (-by_pair[pair].total(), pair))[:limit]
    return [path for pair in pairs for path in _most_common(by_pair[pair], NUM_PER_PAIR)]


def _most_common(counts: Counter[str], limit: int) -> Sequence[str]:
    """Return the most frequent keys, in alphabetical order among equals."""
    return sorted(counts, key=lambda path: (-counts[path], path))[:limit]
