"""How sure a run should be: temperatures and the weight of the text head, fitted to val, from saved predictions alone.

A head's log-probabilities are divided by T > 0 and normalised again: Guo, Pleiss, Sun and Weinberger, "On Calibration
of Modern Neural Networks", ICML 2017, section 4.2. The predicted class stays. The ensemble is
(1 - w) vision + w text of the tempered probabilities. Shapes: n images, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tes.errors import RunError
from tes.files import read_json, write_json
from tes.metrics import evaluate_split
from tes.predictions import Predictions

FORMAT = 1
MAX_SHARPENING = 100.0
"""1/T: beyond, probabilities are 0 and 1 to most displays."""


@dataclass(frozen=True)
class Calibration:
    """What was fitted to a run's validation images.

    Attributes:
        temperature: T of each head, by name.
        text_weight: w of the ensemble; None where the run has one head.
        num_samples: The validation images.
        notes: What could not be fitted, by head.
    """

    temperature: Mapping[str, float]
    text_weight: float | None
    num_samples: int
    notes: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def fit(predictions: Predictions) -> Calibration:
        """Minimise the NLL of validation images, head by head, then over w.

        Raises:
            RunError: There is no image.
        """
        if not len(predictions):
            raise RunError("There is no validation image to fit a temperature to.")
        temperature, notes = {}, {}
        for head in predictions.heads():
            temperature[head], note = fit_temperature(predictions.log_probabilities(head), predictions.labels)
            if note is not None:
                notes[head] = note
        weight = None
        if {"vision", "text"} <= temperature.keys():
            own = [
                np.take_along_axis(
                    tempered(predictions.log_probabilities(head), temperature[head]),
                    predictions.labels[:, None],
                    axis=1,
                )[:, 0]
                for head in ("vision", "text")
            ]
            weight = fit_text_weight(*own)
        return Calibration(temperature, weight, len(predictions), notes)

    def log_probabilities(self, predictions: Predictions, head: str) -> np.ndarray:
        """Return calibrated log p(class | image), (n, C); `ensemble` is a head here."""
        if head != "ensemble":
            return tempered(predictions.log_probabilities(head), self.temperature[head])
        assert self.text_weight is not None, "only where there are two heads"
        parts = [self.log_probabilities(predictions, head) for head in ("vision", "text")]
        with np.errstate(divide="ignore"):
            shares = np.log([1 - self.text_weight, self.text_weight])
        return np.logaddexp(parts[0] + shares[0], parts[1] + shares[1])

    def evaluate(self, predictions: Predictions, coarse: Any = None) -> dict[str, dict[str, Any]]:
        """Return the metrics of every head after calibration, and of the ensemble, as `evaluate_split` does."""
        heads = [head for head in predictions.heads() if head in self.temperature]
        if self.text_weight is not None and "both" in heads:
            heads.append("ensemble")
        return {
            # The logs of probabilities are logits like any others.
            head: evaluate_split(
                Predictions(
                    predictions.paths, predictions.labels, {"vision": self.log_probabilities(predictions, head)}
                ),
                coarse,
            )["vision"]
            for head in heads
        }

    def save(self, path: Path) -> None:
        """Write calibration.json."""
        values = {"format": FORMAT, "num_samples": self.num_samples, "temperature": dict(self.temperature)}
        write_json(path, values | {"text_weight": self.text_weight, "notes": dict(self.notes)})

    @staticmethod
    def load(path: Path) -> Calibration | None:
        """Read what `save` wrote; None where there is no file.

        Raises:
            RunError: It is damaged.
        """
        if not path.is_file():
            return None
        values = read_json(path, RunError)
        try:
            if values["format"] != FORMAT:
                raise ValueError(f"format {values['format']!r}")
            temperature = {str(head): float(value) for head, value in values["temperature"].items()}
            weight = None if values["text_weight"] is None else float(values["text_weight"])
            num_samples, notes = int(values["num_samples"]), dict(values["notes"])
            if not all(0 < value < math.inf for value in temperature.values()):
                raise ValueError("a temperature is not above 0")
            if weight is not None and not 0 <= weight <= 1:
                raise ValueError("the text's weight is not in 0..1")
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            raise RunError(f"`{path}` is damaged ({problem}); write it again with `tes calibrate`.") from None
        return Calibration(temperature, weight, num_samples, notes)


def tempered(log_p_NC: np.ndarray, temperature: float) -> np.ndarray:
    """Return log softmax(log p / T), (n, C)."""
    scaled_NC = log_p_NC / temperature
    scaled_NC = scaled_NC - scaled_NC.max(axis=1, keepdims=True)
    return scaled_NC - np.log(np.exp(scaled_NC).sum(axis=1, keepdims=True))


def fit_temperature(log_p_NC: np.ndarray, labels: np.ndarray) -> tuple[float, str | None]:
    """Return the T > 0 with the lowest NLL, or 1 and why there is none."""
    temperature = best_temperature(log_p_NC, labels)
    if temperature == 1 / MAX_SHARPENING:
        return 1.0, "it is right about every validation image, which tells nothing about doubt: T stays 1"
    if temperature == MAX_SHARPENING:
        return 1.0, "it is no better than chance on the validation images: T stays 1"
    return temperature, None


def best_temperature(log_p_NC: np.ndarray, labels: np.ndarray) -> float:
    """Return the T with the lowest NLL between 1 / `MAX_SHARPENING` and `MAX_SHARPENING`.

    The NLL is convex in 1/T, so that its minimum is the root of its slope, mean(E_p[log p] - log p_y).
    """
    from scipy.optimize import brentq

    def slope(sharpening: float) -> float:
        p_NC = np.exp(tempered(log_p_NC, 1 / sharpening))
        own = np.take_along_axis(log_p_NC, labels[:, None], axis=1)[:, 0]
        return float(((p_NC * log_p_NC).sum(axis=1) - own).mean())

    if slope(MAX_SHARPENING) <= 0:
        return 1 / MAX_SHARPENING
    if slope(1 / MAX_SHARPENING) >= 0:
        return MAX_SHARPENING
    return 1 / float(brentq(slope, 1 / MAX_SHARPENING, MAX_SHARPENING, xtol=1e-10))


def fit_text_weight(vision_n: np.ndarray, text_n: np.ndarray) -> float:
    """Return the w in 0..1 with the lowest -mean log((1 - w) p_vision + w p_text), which is convex in w.

    Args:
        vision_n: log p(true class) by the vision head, (n,).
        text_n: By the text head.
    """
    from scipy.optimize import brentq

    ratio_n = np.exp(np.clip(text_n - vision_n, -500, 500))

    def slope(weight: float) -> float:
        return float(-((ratio_n - 1) / (1 + weight * (ratio_n - 1))).mean())

    if slope(0.0) >= 0:
        return 0.0
    if slope(1.0) <= 0:
        return 1.0
    return float(brentq(slope, 0.0, 1.0, xtol=1e-12))
