"""Weights of classes: balanced ones, and one's own by name."""

from __future__ import annotations

import numpy as np
import pytest

from tes.data.classes_file import ClassInfo, derive_classes
from tes.engine.balance import class_weights
from tes.errors import ConfigError

CLASSES = derive_classes(["golden_retriever", "pug", "GreatDane"])
LABELS = np.repeat(np.arange(3), (30, 9, 1))


def test_balanced_weights_are_those_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.utils.class_weight")
    expected = sklearn.compute_class_weight("balanced", classes=np.arange(3), y=LABELS)
    np.testing.assert_allclose(class_weights("balanced", CLASSES, LABELS).numpy(), expected)


def test_own_weights_go_by_label_or_readable_name_with_a_mean_of_one_over_the_images():
    got = class_weights({"Golden Retriever": 2, "GreatDane": 5.0}, CLASSES, LABELS).numpy()
    order = [info.label for info in CLASSES]
    ratios = dict(zip(order, got / got[order.index("pug")]))
    assert ratios == pytest.approx({"golden_retriever": 2, "GreatDane": 5, "pug": 1})
    assert got[LABELS].mean() == pytest.approx(1)


def test_none_is_none_and_a_class_without_an_image_has_no_infinite_weight():
    assert class_weights("none", CLASSES, LABELS) is None
    assert class_weights("balanced", CLASSES, np.empty(0, dtype=np.int64)) is None
    assert np.isfinite(class_weights("balanced", CLASSES, LABELS[:-1]).numpy()).all()


@pytest.mark.parametrize(
    ("wanted", "words"),
    [({"poodle": 2}, "`poodle`"), ({"pugg": 2}, "did you mean `pug`"), ({"pug": 2, "Pug": 3}, "pug more than one")],
)
def test_names_that_cannot_be_meant_are_refused(wanted, words):
    with pytest.raises(ConfigError, match=words):
        class_weights(wanted, CLASSES, LABELS)


def test_a_name_that_two_classes_share_is_refused_with_both():
    classes = [ClassInfo("a_b", "a b"), ClassInfo("a-b", "a b")]
    with pytest.raises(ConfigError, match=r"it could mean `a_b` or `a-b`"):
        class_weights({"A B": 2}, classes, np.array([0, 1]))
