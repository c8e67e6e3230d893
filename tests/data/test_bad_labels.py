"""Labels and classes as people have them, each case as real files, and what becomes of it."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tes import data, text
from tes.config import DataConfig, TextConfig
from tes.errors import TextError


def images(folder: Path, number: int, seed: int = 0) -> None:
    folder.mkdir(parents=True)
    draw = np.random.default_rng([seed, *folder.name.encode()])
    for index in range(number):
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{index}.png")


def opened(root: Path, **settings: object):
    return data.open_dataset(DataConfig(source=str(root), **settings))


def test_unicode_and_emoji_names_are_kept(tmp_path):
    labels = ["日本語", "naïve_café", "🐈_tabby", "Ñandú"]
    for label in labels:
        images(tmp_path / label, 4)
    dataset = opened(tmp_path)
    assert [info.label for info in dataset.classes] == sorted(labels)
    assert {info.label: info.name for info in dataset.classes} == {
        "日本語": "日本語", "naïve_café": "naïve café", "🐈_tabby": "🐈 tabby", "Ñandú": "ñandú"
    }  # fmt: skip


def test_names_that_are_equal_once_they_are_readable_are_warned_of(tmp_path):
    for label in ("tabby_cat", "Tabby Cat", "dog"):
        images(tmp_path / label, 4)
    dataset = opened(tmp_path)
    assert dataset.num_classes == 3
    rows = np.array([[1, 0], [1, 0], [0, 1]], dtype="float32")
    np.savez(tmp_path / "rows.npz", names=np.array(["tabby_cat", "Tabby Cat", "dog"]), embeddings=rows)
    built = text.build(dataset.classes, TextConfig(encoder=f"file:{tmp_path / 'rows.npz'}"), centre=False)
    warnings = "\n".join(text.warnings(built, dataset.classes))
    assert "tabby_cat" in warnings and "Tabby Cat" in warnings


def test_a_class_of_one_image_is_trained_on_and_listed_as_untested(tmp_path):
    images(tmp_path / "one", 1)
    images(tmp_path / "many", 40)
    dataset = data.draw(opened(tmp_path), DataConfig(source=str(tmp_path)), seed=0)
    assert dataset.untested == ["one"] and dataset.labels[dataset.indices("train")].tolist().count(1) == 1
    assert any("No test image, so no score, for the class `one`" in note for note in dataset.notes)


def test_labels_that_disagree_with_the_folders_are_noted_and_win(tmp_path):
    for label in ("cat", "dog"):
        images(tmp_path / label, 6)
    rows = [(f"{label}/{index}.png", label) for label in ("cat", "dog") for index in range(6)]
    rows[0] = ("cat/0.png", "dog")
    with (tmp_path / "labels.csv").open("w", newline="") as out:
        csv.writer(out).writerows([("path", "label"), *rows])
    dataset = opened(tmp_path / "labels.csv")
    assert dataset.classes[dataset.labels[dataset.paths.index("cat/0.png")]].label == "dog"
    assert any("cat/0.png" in note for note in dataset.notes)


@pytest.mark.parametrize(
    ("rows", "names", "sentence"),
    [
        (np.array([[1.0, np.nan], [0.0, 1.0]]), ["cat", "dog"], "not finite"),
        (np.eye(3), ["cat", "dog"], "3"),
        (np.zeros((2, 4)), ["cat", "dog"], "zero"),
        (np.eye(2), ["cat", "mouse"], "dog"),
    ],
)
def test_text_rows_that_cannot_be_are_one_sentence(tmp_path, rows, names, sentence):
    for label in ("cat", "dog"):
        images(tmp_path / "photos" / label, 4)
    np.savez(tmp_path / "rows.npz", names=np.array(names), embeddings=rows.astype("float32"))
    classes = opened(tmp_path / "photos").classes
    with pytest.raises(TextError, match=sentence) as said:
        text.build(classes, TextConfig(encoder=f"file:{tmp_path / 'rows.npz'}"), centre=False)
    assert "\n" not in str(said.value)


@pytest.mark.slow
def test_ten_thousand_classes_open_and_get_their_text_rows(tmp_path):
    draw = np.random.default_rng(0)
    with (tmp_path / "many.csv").open("w", newline="") as out:
        table = csv.writer(out)
        table.writerow(("path", "label", "split"))
        for number in range(10_000):
            for split in ("train", "test"):
                name = f"{number}-{split}.png"
                Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / name)
                table.writerow((name, f"thing {number:05}", split))
    dataset = opened(tmp_path / "many.csv")
    assert dataset.num_classes == 10_000 and len(dataset.indices("test")) == 10_000
    rows = draw.normal(size=(10_000, 8)).astype("float32")
    np.savez(tmp_path / "rows.npz", names=np.array([info.label for info in dataset.classes]), embeddings=rows)
    built = text.build(dataset.classes, TextConfig(encoder=f"file:{tmp_path / 'rows.npz'}"), centre=False)
    assert built.uncentred.shape == (10_000, 8)
