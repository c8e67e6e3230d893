from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from tes.config import TextConfig
from tes.data.classes_file import ClassInfo
from tes.errors import TextError
from tes.text import TextClassifier, build
from tes.text.encoder import TextEncoder, encoders, open_encoder

CLASSES = [
    ClassInfo("Sea_Horse", "sea horse"),
    ClassInfo("tick", "tick", descriptions=("The tick.", "red")),
    ClassInfo("pear", "pear", prompts=("the green pear",)),
]


def unit(rows) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float64)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_a_row_is_the_direction_of_the_mean_of_its_prompts_directions(bert_folder):
    config = TextConfig(encoder=f"bert:{bert_folder}", templates=("a photo of a {}", "the {}."))
    text = build(CLASSES, config, centre=False)
    encode = open_encoder(config).encode
    expected = [
        unit(unit(encode(["a photo of a sea horse", "the sea horse."])).mean(axis=0)),
        unit(unit(encode(["The tick.", "tick: red"])).mean(axis=0)),
        unit(encode(["the green pear"])[0]),
    ]
    np.testing.assert_allclose(text.Z, expected, atol=1e-5)
    assert text.prompts[1] == ("The tick.", "tick: red")
    assert text.names == ("sea horse", "tick", "pear")
    assert text.centre is None
    assert text.encoder == f"bert:{bert_folder}"


def test_centring_subtracts_the_mean_row_and_can_be_undone(bert_folder):
    config = TextConfig(encoder=f"bert:{bert_folder}")
    plain, centred = build(CLASSES, config, centre=False), build(CLASSES, config, centre=True)
    mean = plain.Z.astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(centred.centre, mean, atol=1e-6)
    np.testing.assert_allclose(centred.Z, unit(plain.Z - mean), atol=1e-5)
    np.testing.assert_allclose(centred.uncentred, plain.Z, atol=1e-5)
    assert centred.Z.dtype == centred.centre.dtype == np.float32


def test_classes_that_all_have_the_same_text_are_refused(bert_folder):
    config = TextConfig(encoder=f"bert:{bert_folder}")
    same = [ClassInfo("a", "pear"), ClassInfo("b", "pear")]
    for centre in (False, True):
        with pytest.raises(TextError, match="All 2 classes have the same text"):
            build(same, config, centre=centre)


def test_some_classes_with_the_same_text_get_the_same_row(bert_folder):
    config = TextConfig(encoder=f"bert:{bert_folder}")
    text = build([ClassInfo("a", "pear"), ClassInfo("b", "pear"), ClassInfo("c", "tick")], config, centre=True)
    np.testing.assert_array_equal(text.Z[0], text.Z[1])
    np.testing.assert_allclose(np.linalg.norm(text.Z, axis=1), 1, atol=1e-6)


def test_other_classes_or_another_order_are_refused():
    text = TextClassifier(("a", "b", "c"), ("a", "b", "c"), ((), (), ()), np.eye(3, dtype=np.float32), None, "test")
    text.aligned_with([ClassInfo(label, label) for label in "abc"])
    with pytest.raises(TextError, match="Row 1 of the text classifier is `b`, class 1 of the data is `c`; the order"):
        text.aligned_with([ClassInfo(label, label) for label in "acb"])
    with pytest.raises(TextError, match="Row 2 of the text classifier is `c`, class 2 of the data is `d`; build"):
        text.aligned_with([ClassInfo(label, label) for label in "abd"])
    with pytest.raises(TextError, match="3 rows, the data 2 classes"):
        text.aligned_with([ClassInfo(label, label) for label in "ab"])


EMBED_AND_LOOK = """
import sys
from tes.config import TextConfig
from tes.data.classes_file import ClassInfo
from tes.text import build

text = build([ClassInfo("pear", "pear"), ClassInfo("tick", "tick")], TextConfig(encoder=sys.argv[1]), centre=False)
print(text.Z.tobytes().hex(), "torch" in sys.modules, "transformers" in sys.modules)
"""


def test_embeddings_come_from_the_cache_without_a_network_being_loaded(bert_folder, own_cache):
    encoder = f"bert:{bert_folder}"
    text = build([ClassInfo("pear", "pear"), ClassInfo("tick", "tick")], TextConfig(encoder=encoder), centre=False)
    assert len(list((own_cache / "text").iterdir())) == 1
    again = subprocess.run(
        [sys.executable, "-c", EMBED_AND_LOOK, encoder],
        env={**os.environ, "TES_CACHE": str(own_cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert again.stdout.split() == [text.Z.tobytes().hex(), "False", "False"]


@encoders.register("counting")
class CountingEncoder(TextEncoder):
    """An encoder of another package: writes down what it is asked for, and embeds a sentence by its letters."""

    asked: list[list[str]]

    def __init__(self, identifier, config):
        super().__init__(identifier, config)
        self.spec = self.fingerprint = f"counting:{identifier}"

    def encode(self, sentences):
        type(self).asked.append(list(sentences))
        return np.array([[sentence.count(letter) + 1 for letter in "aeiou"] for sentence in sentences], np.float32)


@pytest.fixture
def asked() -> list[list[str]]:
    CountingEncoder.asked = []
    return CountingEncoder.asked


def test_a_sentence_is_embedded_once_and_again_only_for_another_encoder(asked):
    pears = [ClassInfo("a", "pear"), ClassInfo("b", "pear"), ClassInfo("c", "tick")]
    first = build(pears, TextConfig(encoder="counting:1"), centre=False)
    assert asked == [["a photo of a pear", "a photo of a tick"]]
    np.testing.assert_array_equal(build(pears, TextConfig(encoder="counting:1"), centre=False).Z, first.Z)
    assert len(asked) == 1
    build(pears, TextConfig(encoder="counting:2"), centre=False)
    build(pears, TextConfig(encoder="counting:2", templates=("{}",)), centre=False)
    assert len(asked) == 3


@pytest.mark.parametrize("damage", ["cut", "empty", "other shape", "not finite"])
def test_a_damaged_cache_is_computed_again_and_mended(asked, own_cache, damage):
    config = TextConfig(encoder="counting:1")
    text = build(CLASSES, config, centre=False)
    [path] = (own_cache / "text").iterdir()
    rows = np.load(path)["embeddings"]
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        np.savez(path, embeddings=rows[:1] if damage == "other shape" else rows * np.float32("nan"))
    np.testing.assert_array_equal(build(CLASSES, config, centre=False).Z, text.Z)
    build(CLASSES, config, centre=False)
    assert len(asked) == 2


def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(asked, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TES_CACHE", str(tmp_path / "file" / "cache"))
    assert build(CLASSES, TextConfig(encoder="counting:1"), centre=False).Z.shape == (3, 5)
    assert "could not be kept" in capsys.readouterr().err
