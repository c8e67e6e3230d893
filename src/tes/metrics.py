"""How good predictions are: every metric from one pass over saved predictions, each image counted once.

All metrics are fractions, 0..1 (`nll` is in nats). Ties go to the class with the lower index, everywhere.
Shapes: n images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tes.errors import DataError
from tes.files import csv_text, write_atomic
from tes.predictions import Predictions

NUM_BINS = 15
METRICS = {
    "mean_per_class": "mean per class",
    "top1": "top-1",
    "top5": "top-5",
    "macro_f1": "macro F1",
    "coarse_top1": "coarse top-1",
    "nll": "NLL",
    "ece": "ECE",
}
"""What the figures are called where a person reads them."""
LOSSES = ("nll", "ece")
"""Those that are no shares of the images, and the better the lower."""
PER_CLASS_COLUMNS = (
    "label", "name", "num_samples", "accuracy", "precision", "f1", "most_confused_with", "num_confused",
)  # fmt: skip


def ordered(primary: str) -> dict[str, str]:
    """Return `METRICS` with the primary metric, which a data set names (`Dataset.metric`), first."""
    return {primary: METRICS[primary]} | METRICS


class NamedClass(Protocol):
    """A class as the data calls it (`label`) and as a person does (`name`)."""

    @property
    def label(self) -> str: ...

    @property
    def name(self) -> str: ...


def evaluate_split(predictions: Predictions, coarse: Sequence[str | None] | None = None) -> dict[str, dict[str, Any]]:
    """Score every head.

    Args:
        predictions: Logits of a split.
        coarse: The C classes' coarse classes, in index order. Left out, or None for some class: no `coarse_top1`.

    Returns:
        Head (`vision`, `text`, `both`) to `top1`, `top5` (None below 5 classes), `mean_per_class`, `macro_f1`, `nll`,
        `ece`, and `coarse_top1`: the share of images whose predicted class lies in the right coarse class.

    Raises:
        DataError: There is no image to score.
    """
    _check_not_empty(predictions)
    return {head: _evaluate(predictions, head, coarse) for head in predictions.heads()}


def _evaluate(predictions: Predictions, head: str, coarse: Sequence[str | None] | None) -> dict[str, Any]:
    labels, num_classes = predictions.labels, predictions.num_classes
    log_p_NC = predictions.log_probabilities(head)
    predicted = log_p_NC.argmax(axis=1)
    counts = ClassCounts.of(labels, predicted, num_classes)
    metrics = {
        "top1": float((predicted == labels).mean()),
        "top5": top_k_accuracy(log_p_NC, labels, 5) if num_classes >= 5 else None,
        "mean_per_class": counts.mean_per_class(),
        "macro_f1": counts.macro_f1(),
        "nll": negative_log_likelihood(log_p_NC, labels),
        "ece": expected_calibration_error(np.exp(log_p_NC), labels),
    }
    if coarse is not None and None not in coarse:
        assert len(coarse) == num_classes, f"{len(coarse)} coarse names for {num_classes} classes"
        coarse_of = np.unique(np.asarray(coarse, dtype=np.str_), return_inverse=True)[1]
        metrics["coarse_top1"] = float((coarse_of[predicted] == coarse_of[labels]).mean())
    return metrics


def top_k_accuracy(scores_NC: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Return the share of images whose class is among the k highest scores.

    Args:
        scores_NC: (n, C), higher is more probable.
        labels: (n,) int64.
        k: How many classes may be named.
    """
    own_N1 = np.take_along_axis(scores_NC, labels[:, None], axis=1)
    is_earlier_NC = np.arange(scores_NC.shape[1]) < labels[:, None]
    num_ahead = ((scores_NC > own_N1) | ((scores_NC == own_N1) & is_earlier_NC)).sum(axis=1)
    return float((num_ahead < k).mean())


@dataclass(frozen=True)
class ClassCounts:
    """Of each class (C,): its images, those that were predicted as it, and those of them that are its own.

    The margins and the diagonal of the confusion matrix, which for 10,000 classes would take 800 MB.
    """

    num_samples: np.ndarray
    num_predicted: np.ndarray
    num_right: np.ndarray

    @staticmethod
    def of(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> ClassCounts:
        """Count by true classes (n,) and predicted ones (n,)."""
        parts = (labels, predicted, labels[labels == predicted])
        return ClassCounts(*(np.bincount(part, minlength=num_classes) for part in parts))

    def mean_per_class(self) -> float:
        """Return the mean over classes of each class's accuracy; classes without images are left out.

        Equals scikit-learn's `balanced_accuracy_score`.
        """
        is_present = self.num_samples > 0
        return float((self.num_right[is_present] / self.num_samples[is_present]).mean())

    def macro_f1(self) -> float:
        """Return the mean of F1 = 2 TP / (2 TP + FP + FN) over the classes that occur as a label or as a prediction.

        Equals scikit-learn's `f1_score(average="macro", zero_division=0)`.
        """
        occurrences = self.num_samples + self.num_predicted
        occurs = occurrences > 0
        return float((2 * self.num_right[occurs] / occurrences[occurs]).mean())


def negative_log_likelihood(log_p_NC: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean of -log p(true class | image), in nats.

    Args:
        log_p_NC: (n, C) log-probabilities. They come from logits without passing through probabilities, so that they
            are finite however sure and wrong a head is, and need no clipping.
        labels: (n,) int64.
    """
    # + 0.0 turns the -0.0 of a certain and right head into 0.0.
    return float(-np.take_along_axis(log_p_NC, labels[:, None], axis=1).mean()) + 0.0


def image_losses(predictions: Predictions, head: str) -> np.ndarray:
    """Return -log p(true class | image) of every image, (n,), in nats."""
    log_p_NC = predictions.log_probabilities(head)
    return -np.take_along_axis(log_p_NC, predictions.labels[:, None], axis=1)[:, 0]


def expected_calibration_error(p_NC: np.ndarray, labels: np.ndarray, num_bins: int = NUM_BINS) -> float:
    """Return the mean over images of |accuracy - mean confidence| of the bin that the image's confidence falls in.

    The confidence is the top probability; the bins (0, 1/15], (1/15, 2/15], … are equally wide.
    Source: Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, eq. 3.

    Args:
        p_NC: (n, C) probabilities.
        labels: (n,) int64.
        num_bins: Number of bins.
    """
    confidence_N = p_NC.max(axis=1)
    bins = calibration_bins(confidence_N, p_NC.argmax(axis=1) == labels, num_bins)
    return float(np.sum(bins.num * np.abs(bins.accuracy - bins.confidence)) / len(labels))


@dataclass(frozen=True)
class CalibrationBins:
    """Images by confidence: (K,) each; of an empty bin, accuracy and confidence are 0."""

    num: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray


def calibration_bins(confidence_N: np.ndarray, is_correct_N: np.ndarray, num_bins: int = NUM_BINS) -> CalibrationBins:
    """Return what a reliability diagram shows: accuracy and mean confidence of images of like confidence.

    Args:
        confidence_N: The top probabilities, (n,).
        is_correct_N: (n,) bool.
        num_bins: Number of bins, equally wide.
    """
    inner_edges = np.linspace(0, 1, num_bins + 1)[1:-1]
    # A confidence on an edge (1/3, 1/5: an untrained head) must not fall on either side of it by rounding.
    bins = np.digitize(confidence_N - 1e-9, inner_edges, right=True)
    num = np.bincount(bins, minlength=num_bins)
    sums = [np.bincount(bins, weights=values, minlength=num_bins) for values in (is_correct_N, confidence_N)]
    accuracy, confidence = (total / np.maximum(num, 1) for total in sums)
    return CalibrationBins(num, accuracy, confidence)


def per_class_table(
    predictions: Predictions, classes: Sequence[NamedClass], head: str = "vision"
) -> list[dict[str, Any]]:
    """Describe each class by one row, in index order.

    Args:
        predictions: Logits of a split.
        classes: The C classes, in index order.
        head: `vision`, `text` or `both`.

    Returns:
        Rows with the keys `PER_CLASS_COLUMNS`. `accuracy` is the class's recall, None without images; `precision` is
        None where the class was never predicted; `f1` is None where it occurs neither as a label nor as a prediction;
        `most_confused_with` is the label that its images are most often mistaken for, `num_confused` times, None and 0
        without mistakes.

    Raises:
        DataError: There is no image to score.
        RunError: There is no such head.
    """
    _check_not_empty(predictions)
    num_classes = predictions.num_classes
    assert len(classes) == num_classes, f"{len(classes)} classes for {num_classes} columns of logits"
    predicted = predictions.log_probabilities(head).argmax(axis=1)
    counts = ClassCounts.of(predictions.labels, predicted, num_classes)
    rows = []
    for index, named in enumerate(classes):
        num_right, num_samples = int(counts.num_right[index]), int(counts.num_samples[index])
        num_predicted = int(counts.num_predicted[index])
        mistaken_for = np.bincount(predicted[(predictions.labels == index) & (predicted != index)], minlength=1)
        other = int(mistaken_for.argmax())
        num_confused = int(mistaken_for[other])
        rows.append(
            {
                "label": named.label,
                "name": named.name,
                "num_samples": num_samples,
                "accuracy": num_right / num_samples if num_samples else None,
                "precision": num_right / num_predicted if num_predicted else None,
                "f1": 2 * num_right / (num_samples + num_predicted) if num_samples + num_predicted else None,
                "most_confused_with": classes[other].label if num_confused else None,
                "num_confused": num_confused,
            }
        )
    return rows


def write_per_class_csv(
    path: Path | str, predictions: Predictions, classes: Sequence[NamedClass], head: str = "vision"
) -> None:
    """Write `per_class_table` as CSV, whole or not at all; what is None is an empty cell."""
    rows = per_class_table(predictions, classes, head)
    write_atomic(Path(path), csv_text(PER_CLASS_COLUMNS, ([row[name] for name in PER_CLASS_COLUMNS] for row in rows)))


def _check_not_empty(predictions: Predictions) -> None:
    if len(predictions) == 0:
        raise DataError("There is no image to score: the split is empty; choose a split, or data, with images in it.")
