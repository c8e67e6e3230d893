"""Temperatures and the ensemble's weight: the minimum they should be, and what cannot be fitted."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from tes.calibration import Calibration, fit_temperature, fit_text_weight, tempered
from tes.errors import RunError
from tes.predictions import Predictions


@pytest.fixture
def predictions():
    draws = np.random.default_rng(0)
    labels = draws.integers(0, 4, size=60)
    clues = np.eye(4)[labels]
    logits = {head: 3 * (clues + draws.normal(size=(60, 4))) for head in ("vision", "text")}
    return Predictions([str(index) for index in range(60)], labels, logits)


def nll(log_p, labels):
    return -log_p[np.arange(len(labels)), labels].mean()


def test_each_temperature_and_the_weight_minimise_the_nll(predictions):
    fitted, labels = Calibration.fit(predictions), predictions.labels
    for head in ("vision", "text", "both"):
        log_p = predictions.log_probabilities(head)
        best = minimize_scalar(lambda log_t: nll(tempered(log_p, np.exp(log_t)), labels), bounds=(-4, 4))  # noqa: B023
        assert fitted.temperature[head] == pytest.approx(np.exp(best.x), rel=1e-3) and best.x > 0.1
        assert nll(fitted.log_probabilities(predictions, head), labels) == pytest.approx(best.fun)
    vision, text = (np.exp(fitted.log_probabilities(predictions, head)) for head in ("vision", "text"))
    best = minimize_scalar(lambda w: nll(np.log((1 - w) * vision + w * text), labels), bounds=(0, 1))
    assert fitted.text_weight == pytest.approx(best.x, abs=1e-3)
    ensemble = np.exp(fitted.log_probabilities(predictions, "ensemble"))
    weight = fitted.text_weight
    assert np.allclose(ensemble, (1 - weight) * vision + weight * text)
    assert fitted.evaluate(predictions)["ensemble"]["nll"] == pytest.approx(best.fun)


def test_a_head_that_is_always_right_or_worse_than_chance_keeps_its_temperature():
    labels = np.array([0, 1, 2, 0])
    value, why = fit_temperature(tempered(4 * np.eye(3)[labels], 1.0), labels)
    assert value == 1 and "right about every" in why
    value, why = fit_temperature(tempered(-4 * np.eye(3)[labels], 1.0), labels)
    assert value == 1 and "no better than chance" in why


def test_a_useless_head_gets_no_weight():
    good, bad = np.log(np.full(5, 0.9)), np.log(np.full(5, 0.2))
    assert fit_text_weight(good, bad) == 0 and fit_text_weight(bad, good) == 1


def test_what_was_saved_is_read_and_a_damaged_file_is_refused(predictions, tmp_path):
    path = tmp_path / "calibration.json"
    assert Calibration.load(path) is None
    fitted = Calibration.fit(predictions)
    fitted.save(path)
    assert Calibration.load(path) == fitted
    text = path.read_text()
    for wrong in ("{}", "[]", text.replace('"vision": ', '"vision": -'), text.replace('"format": 1', '"format": 2')):
        path.write_text(wrong)
        with pytest.raises(RunError, match="tes calibrate"):
            Calibration.load(path)
