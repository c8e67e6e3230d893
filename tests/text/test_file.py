from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tes.config import TextConfig
from tes.data.classes_file import ClassInfo, derive_classes
from tes.errors import TextError
from tes.text import build, text_report
from tes.text.encoder import open_encoder

CLASSES = [ClassInfo("Sea_Horse", "sea horse"), ClassInfo("tick", "tick"), ClassInfo("pear", "pear")]
ROWS = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)


def write(path: Path, names, rows) -> TextConfig:
    np.savez(path, names=names, embeddings=rows)
    return TextConfig(encoder=f"file:{path}")


def unit(rows) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_rows_are_found_by_name_in_any_order_and_extra_ones_are_counted(tmp_path):
    rows = np.concatenate([ROWS, np.ones((2, 5), np.float32)])[[4, 2, 0, 3, 1]]
    text = build(CLASSES, write(tmp_path / "r.npz", ["x", "pear", "Sea_Horse", "y", "tick"], rows), centre=False)
    np.testing.assert_allclose(text.Z, unit(ROWS), atol=1e-6)
    assert text.Z.dtype == np.float32
    assert text.labels == ("Sea_Horse", "tick", "pear")
    assert text.prompts == ((), (), ())
    assert text.notes == ("2 of 5 rows of `r.npz` name no class here: ignored.",)


@pytest.mark.parametrize("name", ["Sea_Horse", "sea horse", "sea-horse", "SEA HORSE"])
def test_a_row_may_carry_the_label_the_readable_name_or_nearly_that(tmp_path, name):
    text = build(CLASSES, write(tmp_path / "r.npz", [name, "tick", "pear"], ROWS), centre=False)
    np.testing.assert_allclose(text.Z, unit(ROWS), atol=1e-6)


def test_the_exact_label_wins_over_a_like_name(tmp_path):
    rows = np.concatenate([ROWS, ROWS[:1] + 1])
    text = build(CLASSES, write(tmp_path / "r.npz", ["Sea_Horse", "tick", "pear", "sea-horse"], rows), centre=False)
    np.testing.assert_allclose(text.Z, unit(ROWS), atol=1e-6)


def test_half_precision_and_safetensors_are_read(tmp_path):
    long = (100 * ROWS).astype(np.float16)
    path = tmp_path / "r.safetensors"
    save_file({"embeddings": long}, path, {"names": json.dumps(["Sea_Horse", "tick", "pear"])})
    text = build(CLASSES, TextConfig(encoder=f"file:{path}"), centre=False)
    np.testing.assert_allclose(text.Z, unit(long), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(text.Z, axis=1), 1, atol=1e-6)


def test_missing_rows_are_listed_beside_the_rows_that_nothing_has(tmp_path):
    config = write(tmp_path / "r.npz", ["sea horse", "ticks", "peer"], ROWS)
    with pytest.raises(TextError, match=r"no row for 2 of 3 classes: tick, pear; .*no class has: ticks, peer"):
        build(CLASSES, config, centre=False)


def test_a_class_may_have_two_rows_only_if_they_are_equal(tmp_path):
    names = ["Sea_Horse", "tick", "pear", "pear"]
    text = build(CLASSES, write(tmp_path / "same.npz", names, ROWS[[0, 1, 2, 2]]), centre=False)
    np.testing.assert_allclose(text.Z, unit(ROWS), atol=1e-6)
    with pytest.raises(TextError, match="2 different rows for the class `pear`"):
        build(CLASSES, write(tmp_path / "differ.npz", names, ROWS[[0, 1, 2, 1]]), centre=False)


@pytest.mark.parametrize(
    ("names", "rows", "message"),
    [
        (["Sea_Horse", "tick", "pear"], np.where(np.eye(3, 5) > 0, np.nan, ROWS), "`Sea_Horse` has values .* not fini"),
        (["Sea_Horse", "tick", "pear"], np.where(np.eye(3, 5) > 0, np.inf, ROWS), "`Sea_Horse` has values .* not fini"),
        (["Sea_Horse", "tick", "pear"], ROWS * [[1], [0], [1]], "`tick` is zero"),
        (["Sea_Horse", "tick"], ROWS, "2 names for 3 rows"),
        (["Sea_Horse", "tick", "pear"], ROWS[0], r"of shape \(5,\)"),
        (["Sea_Horse", "tick", "pear"], ROWS[:, :0], r"of shape \(3, 0\)"),
        (["Sea_Horse", "tick", "pear"], ROWS.astype(int), "numbers with a point"),
        ([1, 2, 3], ROWS, "must be a list of words"),
    ],
)
def test_rows_that_cannot_be_meant_are_refused(tmp_path, names, rows, message):
    with pytest.raises(TextError, match=message):
        build(CLASSES, write(tmp_path / "r.npz", names, rows), centre=False)


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickled_content_is_refused_and_never_run(tmp_path):
    sprung = tmp_path / "sprung"
    names = np.array(["Sea_Horse", "tick", Trap(sprung)], dtype=object)
    objects = write(tmp_path / "objects.npz", names, ROWS)
    pickled = tmp_path / "pickled.npz"
    pickled.write_bytes(pickle.dumps(Trap(sprung)))
    for config in (objects, TextConfig(encoder=f"file:{pickled}")):
        with pytest.raises(TextError, match="pickled objects, which could run code and are never opened"):
            build(CLASSES, config, centre=False)
    assert not sprung.exists()
    np.load(tmp_path / "objects.npz", allow_pickle=True)["names"]
    assert sprung.exists(), "the trap works, where it is opened"


def test_a_file_that_is_absent_damaged_or_of_another_kind_is_explained(tmp_path):
    cases = {
        "gone.npz": (None, "There is no file"),
        "rows.csv": (b"a,b", r"neither \.npz nor \.safetensors"),
        "cut.npz": (b"PK\x03\x04 and then nothing", "cannot be read"),
        "empty.npz": (b"", "cannot be read"),
        "cut.safetensors": (b"1234", "cannot be read"),
    }
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(TextError, match=message):
            build(CLASSES, TextConfig(encoder=f"file:{tmp_path / name}"), centre=False)
    with (tmp_path / "bare.npz").open("wb") as out:
        np.save(out, ROWS)
    with pytest.raises(TextError, match="one bare array"):
        build(CLASSES, TextConfig(encoder=f"file:{tmp_path / 'bare.npz'}"), centre=False)
    np.savez(tmp_path / "keys.npz", labels=["a"], embeddings=ROWS)
    with pytest.raises(TextError, match="no array `names`; it has: labels, embeddings"):
        build(CLASSES, TextConfig(encoder=f"file:{tmp_path / 'keys.npz'}"), centre=False)
    save_file({"embeddings": ROWS}, tmp_path / "nameless.safetensors")
    with pytest.raises(TextError, match="must carry `names`"):
        build(CLASSES, TextConfig(encoder=f"file:{tmp_path / 'nameless.safetensors'}"), centre=False)


def test_templates_and_descriptions_are_said_to_be_unused(tmp_path):
    config = write(tmp_path / "r.npz", ["Sea_Horse", "tick", "pear"], ROWS)
    assert build(CLASSES, config, centre=False).notes == ()
    [note] = build(CLASSES, config.model_copy(update={"templates": ("a {}",)}), centre=False).notes
    assert "not used" in note
    described = [ClassInfo("Sea_Horse", "sea horse", descriptions=("A fish.",)), *CLASSES[1:]]
    [note] = build(described, config, centre=False).notes
    assert "not used" in note


def test_a_file_cannot_embed_sentences(tmp_path):
    encoder = open_encoder(write(tmp_path / "r.npz", ["Sea_Horse", "tick", "pear"], ROWS))
    assert not encoder.can_embed_sentences
    with pytest.raises(TextError, match="cannot embed sentences"):
        encoder.embed(["a photo of a pear"])


def test_the_clip_rows_of_caltech_are_read_and_their_four_duplicates_reported(shared):
    path = shared / "text" / "caltech101_clip_vitb32_55classes.npz"
    with np.load(path) as stored:
        labels, rows = sorted(stored["names"].tolist()), dict(zip(stored["names"].tolist(), stored["embeddings"]))
    classes = derive_classes(labels)
    for centre in (False, True):
        text = build(classes, TextConfig(encoder=f"file:{path}"), centre=centre)
        np.testing.assert_allclose(text.uncentred, [rows[label] for label in labels], atol=1e-5)
        report = text_report(text, classes)
        pairs = {frozenset(pair) for pair in report["duplicates"]}
        assert len(pairs) == 4
        assert {frozenset({"Faces", "Faces_easy"}), frozenset({"flamingo", "flamingo_head"})} < pairs
        assert any("4 pairs of classes have one and the same row" in sentence for sentence in report["verdict"])


def test_rows_of_a_large_vocabulary_serve_the_classes_that_it_names(shared):
    path = shared / "text" / "objects_clip_vitb32.npz"
    classes = derive_classes(["Aerosol-Can", "airplane", "alarm_clock"])
    text = build(classes, TextConfig(encoder=f"file:{path}"), centre=True)
    assert text.Z.shape == (3, 512)
    assert "1585 of 1588 rows" in text.notes[0]


def test_a_compressed_file_that_was_altered_is_explained(tmp_path):
    path = tmp_path / "rows.npz"
    np.savez_compressed(path, names=np.array(["a", "b"]), embeddings=np.arange(2000.0).reshape(2, 1000))
    content = bytearray(path.read_bytes())
    content[1000:1040] = b"\xff" * 40
    path.write_bytes(content)
    with pytest.raises(TextError, match=r"cannot be read as \.npz"):
        build(derive_classes(["a", "b"]), TextConfig(encoder=f"file:{path}"), centre=False)
