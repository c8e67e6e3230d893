from __future__ import annotations

import csv
import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, f1_score, log_loss, precision_recall_fscore_support
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix

from tes.errors import DataError, RunError
from tes.metrics import (
    PER_CLASS_COLUMNS,
    ClassCounts,
    evaluate_split,
    expected_calibration_error,
    per_class_table,
    top_k_accuracy,
    write_per_class_csv,
)
from tes.predictions import Predictions


@dataclass(frozen=True)
class Named:
    label: str
    name: str


def named(num_classes: int) -> list[Named]:
    return [Named(f"c_{index}", f"c {index}") for index in range(num_classes)]


def predictions_of(logits, labels, **others) -> Predictions:
    logits = np.asarray(logits, dtype=np.float32)
    return Predictions(
        [f"{i}.png" for i in range(len(labels))], np.asarray(labels, np.int64), {"vision": logits, **others}
    )


def random_predictions(n: int = 300, num_classes: int = 7, seed: int = 0, heads=("vision", "text")) -> Predictions:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, n)
    logits = {}
    for head in heads:
        logits[head] = rng.normal(0, 1.5, (n, num_classes)).astype(np.float32)
        logits[head][np.arange(n), labels] += 1.5
    return Predictions([f"{i}.png" for i in range(n)], labels, logits)


@st.composite
def small_predictions(draw) -> Predictions:
    """Few classes, few values: ties, absent classes and single images come up all the time."""
    n, num_classes = draw(st.integers(1, 12)), draw(st.integers(1, 8))
    row = st.lists(st.sampled_from([-60.0, -1.0, 0.0, 0.0, 1.0, 60.0]), min_size=num_classes, max_size=num_classes)
    logits = {draw(st.sampled_from(["vision", "text"])): np.float32(draw(st.lists(row, min_size=n, max_size=n)))}
    if "vision" in logits and draw(st.booleans()):
        # No ties here: whether two means of two softmaxes are equal is a matter of rounding.
        logits["text"] = np.random.default_rng(draw(st.integers(0, 99))).normal(size=(n, num_classes))
    labels = draw(st.lists(st.integers(0, num_classes - 1), min_size=n, max_size=n))
    return Predictions([f"{i}.png" for i in range(n)], np.array(labels), logits)


def naive_metrics(predictions: Predictions, head: str, coarse: list[str]) -> dict:
    """The definitions, image by image and class by class, in plain Python."""
    labels = predictions.labels.tolist()
    probabilities = []
    for i in range(len(labels)):
        rows = []
        for own in ("vision", "text") if head == "both" else (head,):
            logits = [float(value) for value in predictions.logits[own][i]]
            exponentials = [math.exp(value - max(logits)) for value in logits]
            rows.append([value / math.fsum(exponentials) for value in exponentials])
        probabilities.append([math.fsum(column) / len(rows) for column in zip(*rows)])
    C = predictions.num_classes
    ranked = [sorted(range(C), key=lambda c: (-round(math.log(row[c]), 9), c)) for row in probabilities]
    predicted = [order[0] for order in ranked]

    recalls, f1s = [], []
    for c in range(C):
        tp = sum(y == c and p == c for y, p in zip(labels, predicted))
        fn = sum(y == c and p != c for y, p in zip(labels, predicted))
        fp = sum(y != c and p == c for y, p in zip(labels, predicted))
        if tp + fn:
            recalls.append(tp / (tp + fn))
        if tp + fn + fp:
            f1s.append(2 * tp / (2 * tp + fn + fp))

    ece = 0.0
    for b in range(15):
        inside = [i for i, row in enumerate(probabilities) if b / 15 < max(row) - 1e-9 <= (b + 1) / 15]
        if inside:
            accuracy = sum(predicted[i] == labels[i] for i in inside) / len(inside)
            confidence = sum(max(probabilities[i]) for i in inside) / len(inside)
            ece += len(inside) / len(labels) * abs(accuracy - confidence)

    n = len(labels)
    return {
        "top1": sum(p == y for p, y in zip(predicted, labels)) / n,
        "top5": sum(y in order[:5] for order, y in zip(ranked, labels)) / n if C >= 5 else None,
        "mean_per_class": sum(recalls) / len(recalls),
        "macro_f1": sum(f1s) / len(f1s),
        "nll": -sum(math.log(row[y]) for row, y in zip(probabilities, labels)) / n,
        "ece": ece,
        "coarse_top1": sum(coarse[p] == coarse[y] for p, y in zip(predicted, labels)) / n,
    }


@settings(max_examples=150, deadline=None)
@given(small_predictions())
def test_every_metric_equals_its_definition_written_as_loops(predictions):
    coarse = [f"coarse {c // 3}" for c in range(predictions.num_classes)]
    scored = evaluate_split(predictions, coarse)
    assert list(scored) == predictions.heads()
    for head, metrics in scored.items():
        expected = naive_metrics(predictions, head, coarse)
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            assert metrics[name] == (None if value is None else pytest.approx(value, abs=1e-9)), (head, name)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("head", ["vision", "text", "both"])
def test_metrics_agree_with_scikit_learn(head, seed):
    predictions = random_predictions(seed=seed)
    labels, probabilities = predictions.labels, predictions.probabilities(head)
    predicted = probabilities.argmax(axis=1)
    metrics = evaluate_split(predictions)[head]
    assert metrics["top1"] == pytest.approx((predicted == labels).mean())
    assert metrics["mean_per_class"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert metrics["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0))
    assert metrics["nll"] == pytest.approx(log_loss(labels, probabilities, labels=range(7)), rel=1e-9)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.filterwarnings("ignore:A single label was found")
def test_counts_by_class_give_the_figures_of_scikit_learn_for_any_labels_and_predictions(pairs):
    labels, predicted = (np.array(part, dtype=np.int64) for part in zip(*pairs))
    counts = ClassCounts.of(labels, predicted, 6)
    confusion = sklearn_confusion_matrix(labels, predicted, labels=range(6))
    assert counts.num_samples.tolist() == confusion.sum(axis=1).tolist()
    assert counts.num_predicted.tolist() == confusion.sum(axis=0).tolist()
    assert counts.num_right.tolist() == confusion.diagonal().tolist()
    assert counts.mean_per_class() == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert counts.macro_f1() == pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0))


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_classes_without_images_are_left_out_of_the_means():
    # Class 3 occurs nowhere, class 2 only as a prediction.
    predictions = predictions_of(np.eye(5)[[0, 1, 2, 1, 4]] * 5, [0, 1, 1, 0, 4])
    labels, predicted = predictions.labels, [0, 1, 2, 1, 4]
    metrics = evaluate_split(predictions)["vision"]
    assert metrics["mean_per_class"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert metrics["mean_per_class"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert metrics["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0))


def test_ties_go_to_the_class_with_the_lower_index_in_every_metric():
    metrics = evaluate_split(predictions_of(np.zeros((6, 6)), np.arange(6)))["vision"]
    assert metrics["top1"] == pytest.approx(1 / 6)
    assert metrics["top5"] == pytest.approx(5 / 6)
    assert metrics["nll"] == pytest.approx(math.log(6))
    assert metrics["ece"] == pytest.approx(0, abs=1e-12)


def test_top5_is_none_below_five_classes_and_there_from_five_on():
    assert evaluate_split(predictions_of(np.zeros((1, 4)), [3]))["vision"]["top5"] is None
    assert evaluate_split(predictions_of(np.zeros((1, 5)), [4]))["vision"]["top5"] == 1


def test_top_k_with_all_classes_is_always_right():
    predictions = random_predictions(n=50, heads=["vision"])
    assert top_k_accuracy(predictions.log_probabilities("vision"), predictions.labels, 7) == 1


def test_one_image_is_scored():
    metrics = evaluate_split(predictions_of([[0.0, 100.0]], [1]))["vision"]
    assert metrics == {"top1": 1, "top5": None, "mean_per_class": 1, "macro_f1": 1, "nll": 0, "ece": 0}
    assert math.copysign(1, metrics["nll"]) == 1


def test_a_sure_and_wrong_head_has_a_large_and_finite_nll():
    assert evaluate_split(predictions_of([[0.0, 5000.0]], [0]))["vision"]["nll"] == pytest.approx(5000)


def test_no_image_is_an_error_in_one_sentence():
    empty = predictions_of(np.zeros((0, 3)), [])
    for score in (evaluate_split, lambda predictions: per_class_table(predictions, named(3))):
        with pytest.raises(DataError, match="There is no image to score"):
            score(empty)


def test_metrics_are_plain_numbers_that_json_can_hold():
    for metrics in evaluate_split(random_predictions(), [str(c) for c in range(7)]).values():
        assert {type(value) for value in metrics.values()} == {float}


def test_coarse_accuracy_forgives_near_mistakes_and_is_absent_unless_all_classes_have_one():
    predictions = predictions_of(np.eye(3)[[1, 2, 2]], [0, 0, 2])
    assert evaluate_split(predictions, ["fruit", "fruit", "milk"])["vision"]["coarse_top1"] == pytest.approx(2 / 3)
    assert "coarse_top1" not in evaluate_split(predictions, ["fruit", None, "milk"])["vision"]
    assert "coarse_top1" not in evaluate_split(predictions)["vision"]


def test_calibration_error_is_small_for_calibrated_and_large_for_overconfident_probabilities():
    rng = np.random.default_rng(0)
    p_NC = rng.dirichlet(np.ones(4), 20_000)
    labels = (p_NC.cumsum(axis=1) < rng.random((20_000, 1))).sum(axis=1)
    assert expected_calibration_error(p_NC, labels) < 0.01
    sharpened = p_NC**3 / (p_NC**3).sum(axis=1, keepdims=True)
    assert expected_calibration_error(sharpened, labels) > 0.15


def test_the_bins_of_the_calibration_error_are_closed_on_the_right():
    # 0.8 = 12/15 belongs with 0.75 to the bin (11/15, 12/15], where the surpluses +0.2 and -0.75 meet.
    p_NC = np.array([[0.8, 0.2], [0.75, 0.25]])
    assert expected_calibration_error(p_NC, np.array([0, 1])) == pytest.approx(0.55 / 2)


@pytest.mark.parametrize("head", ["vision", "text", "both"])
def test_the_table_per_class_agrees_with_scikit_learn(head):
    predictions = random_predictions()
    rows = per_class_table(predictions, named(7), head)
    predicted = predictions.probabilities(head).argmax(axis=1)
    expected = np.array(precision_recall_fscore_support(predictions.labels, predicted)).T
    found = [[row["precision"], row["accuracy"], row["f1"], row["num_samples"]] for row in rows]
    np.testing.assert_allclose(np.array(found), expected)
    for c, row in enumerate(rows):
        wrong = predicted[(predictions.labels == c) & (predicted != c)]
        counts = np.bincount(wrong, minlength=7)
        assert (row["most_confused_with"], row["num_confused"]) == (f"c_{counts.argmax()}", counts.max())


def test_the_table_per_class_leaves_open_what_cannot_be_said():
    rows = per_class_table(predictions_of(np.eye(4)[[0, 2, 2]], [0, 1, 1]), named(4))
    assert [tuple(row) for row in rows] == [PER_CLASS_COLUMNS] * 4
    assert [tuple(row.values()) for row in rows] == [
        ("c_0", "c 0", 1, 1.0, 1.0, 1.0, None, 0),
        ("c_1", "c 1", 2, 0.0, None, 0.0, "c_2", 2),
        ("c_2", "c 2", 0, None, 0.0, 0.0, None, 0),
        ("c_3", "c 3", 0, None, None, None, None, 0),
    ]


def test_the_csv_per_class_reads_back_with_names_that_hold_commas_and_quotes(tmp_path):
    classes = [Named("a,b", 'the "ä"'), Named("plain", "plain")]
    write_per_class_csv(tmp_path / "per_class.csv", predictions_of([[1, 0], [1, 0]], [0, 1]), classes)
    with (tmp_path / "per_class.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == PER_CLASS_COLUMNS
    assert (rows[0]["label"], rows[0]["name"], rows[0]["accuracy"]) == ("a,b", 'the "ä"', "1.0")
    assert (rows[1]["precision"], rows[1]["most_confused_with"]) == ("", "a,b")


def test_the_table_of_a_head_that_is_not_there_is_refused():
    with pytest.raises(RunError, match="head `text`"):
        per_class_table(random_predictions(heads=["vision"]), named(7), "text")
