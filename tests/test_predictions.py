from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tes.errors import RunError
from tes.predictions import Predictions

LOGITS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6),
    elements=st.floats(-(2.0**127), 2.0**127, width=32),
)


def example(heads=("vision", "text"), n: int = 4, num_classes: int = 3, seed: int = 0) -> Predictions:
    rng = np.random.default_rng(seed)
    logits = {head: rng.normal(0, 3, (n, num_classes)).astype(np.float32) for head in heads}
    return Predictions([f"a/{i}.jpg" for i in range(n)], rng.integers(0, num_classes, n), logits)


def write(path: Path, **arrays) -> Path:
    """Write a file of predictions whose parts are as given, whatever they are."""
    content = {"paths": np.array(["a", "b"]), "labels": np.array([0, 1]), "logits_vision": np.zeros((2, 3), np.float32)}
    np.savez(path, **{key: value for key, value in (content | arrays).items() if value is not None})
    return path


def test_what_is_saved_is_read_back_exactly(tmp_path):
    saved = Predictions(["é/ä b.jpg", "猫/1.png"], np.array([1, 0]), {"vision": np.float32([[1, 2], [3, -4]])})
    saved.save(tmp_path / "test.npz")
    loaded = Predictions.load(tmp_path / "test.npz")
    assert loaded.paths == saved.paths
    assert loaded.labels.dtype == np.int64 and loaded.labels.tolist() == [1, 0]
    assert list(loaded.logits) == ["vision"] and loaded.logits["vision"].dtype == np.float32
    np.testing.assert_array_equal(loaded.logits["vision"], saved.logits["vision"])


def test_the_file_has_the_documented_keys_and_needs_no_pickle(tmp_path):
    example().save(tmp_path / "test.npz")
    with np.load(tmp_path / "test.npz", allow_pickle=False) as file:
        assert set(file) == {"paths", "labels", "logits_vision", "logits_text"}
        assert file["paths"].dtype.kind == "U" and file["labels"].dtype == np.int64
        assert file["logits_text"].dtype == np.float32 and file["logits_text"].shape == (4, 3)


def test_equal_predictions_give_equal_bytes_and_leave_nothing_else_behind(tmp_path):
    example().save(tmp_path / "a.npz")
    example().save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def test_a_split_without_images_can_be_saved(tmp_path):
    Predictions([], np.zeros(0, np.int64), {"vision": np.zeros((0, 3), np.float32)}).save(tmp_path / "val.npz")
    assert len(Predictions.load(tmp_path / "val.npz")) == 0


def test_both_is_offered_only_where_both_heads_exist():
    assert example(["text", "vision"]).heads() == ["vision", "text", "both"]
    assert example(["vision"]).heads() == ["vision"]
    assert example(["text"]).heads() == ["text"]


def test_both_is_the_mean_of_the_two_probabilities():
    predictions = example()
    mean = (predictions.probabilities("vision") + predictions.probabilities("text")) / 2
    np.testing.assert_allclose(predictions.probabilities("both"), mean, rtol=1e-12)


def test_an_unknown_head_is_refused_with_those_there_are():
    with pytest.raises(RunError, match="head `both`; there are: vision"):
        example(["vision"]).probabilities("both")


@settings(deadline=None)
@given(LOGITS)
def test_probabilities_are_a_distribution_and_log_probabilities_are_finite_for_any_logits(logits):
    predictions = Predictions(["x"] * len(logits), np.zeros(len(logits), np.int64), {"vision": logits, "text": -logits})
    for head in predictions.heads():
        p = predictions.probabilities(head)
        assert p.dtype == np.float64 and (p >= 0).all()
        np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-12)
        assert np.isfinite(predictions.log_probabilities(head)).all()


@settings(deadline=None)
@given(LOGITS.map(lambda values: values % 50))
def test_probabilities_equal_the_plain_formula(logits):
    predictions = Predictions(["x"] * len(logits), np.zeros(len(logits), np.int64), {"vision": logits})
    exponentials = np.exp(logits.astype(np.float64))
    np.testing.assert_allclose(
        predictions.probabilities("vision"), exponentials / exponentials.sum(axis=1, keepdims=True), rtol=1e-12
    )


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RunError, match=r"There is no file of predictions `.*test\.npz`"):
        Predictions.load(tmp_path / "test.npz")


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut off", pickle.dumps({"labels": [1]})])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "test.npz").write_bytes(content)
    with pytest.raises(RunError, match=r"test\.npz"):
        Predictions.load(tmp_path / "test.npz")


def test_a_single_array_is_refused(tmp_path):
    with (tmp_path / "test.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(RunError, match="it has no `paths`"):
        Predictions.load(tmp_path / "test.npz")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(RunError, match="cannot be read"):
        Predictions.load(tmp_path)


def test_no_flipped_or_missing_byte_raises_anything_but_a_run_error(tmp_path):
    path = tmp_path / "test.npz"
    example(["vision"], n=2, num_classes=2).save(path)
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        for damaged in (
            content[:position],
            content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1 :],
        ):
            path.write_bytes(damaged)
            try:
                Predictions.load(path)
            except RunError as problem:
                assert "test.npz" in str(problem) and "\n" not in str(problem)


def test_pickled_objects_are_never_loaded(tmp_path):
    with pytest.raises(RunError, match="damaged"):
        Predictions.load(write(tmp_path / "test.npz", paths=np.array(["a", {}], dtype=object)))


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"labels": None}, "it has no `labels`"),
        ({"logits_vision": None}, "there are no logits"),
        ({"paths": np.array([1, 2])}, "`paths` are not a list of texts"),
        ({"paths": np.array(["a"])}, "1 paths and 2 labels"),
        ({"labels": np.array([0.0, 1.0])}, "`labels` should be whole numbers"),
        ({"labels": np.array([0, 3])}, r"the label 3 of `b` is outside 0\.\.2"),
        ({"labels": np.array([-1, 0])}, "the label -1 of `a`"),
        ({"logits_vision": np.zeros((3, 3), np.float32)}, "3 rows of logits"),
        ({"logits_vision": np.zeros(2, np.float32)}, r"should be fractions, \(n, C\)"),
        ({"logits_vision": np.zeros((2, 3), np.int64)}, r"should be fractions, \(n, C\)"),
        ({"logits_vision": np.zeros((2, 0), np.float32)}, "no classes"),
        ({"logits_vision": np.float32([[0, 0], [0, np.nan]])}, "`vision` for `b` are not finite"),
        ({"logits_vision": np.array([[1e300, 0], [0, 0]])}, "`vision` for `a` are not finite"),
        ({"logits_text": np.zeros((2, 4), np.float32)}, "different numbers of classes, vision 3, text 4"),
        ({"logits_both": np.zeros((2, 3), np.float32)}, "`both` is not a head"),
    ],
)
def test_parts_that_do_not_fit_are_named(tmp_path, parts, sentence):
    path = write(tmp_path / "test.npz", **parts)
    with pytest.raises(RunError, match=sentence) as caught:
        Predictions.load(path)
    assert "test.npz" in str(caught.value)


def test_logits_that_are_not_finite_are_refused_when_made():
    with pytest.raises(RunError, match=r"`vision` for `b\.jpg` are not finite"):
        Predictions(["a.jpg", "b.jpg"], np.array([0, 1]), {"vision": np.float32([[0, 1], [np.inf, 0]])})


def test_other_precisions_are_kept_as_float32():
    predictions = Predictions(["a"], np.array([0], np.int32), {"vision": np.array([[0.1, 0.2]], np.float16)})
    assert predictions.logits["vision"].dtype == np.float32 and predictions.labels.dtype == np.int64
