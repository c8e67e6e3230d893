"""Miniatures of the tasks' data sets: a few noise images of three classes, in the true layouts and file formats."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

PER_CLASS = {"train": 2, "val": 1, "test": 1}
CLASSES = {  # number in the official order, counted from 1, and label
    "aircraft": {1: "707-320", 34: "A380", 100: "Yak-42"},
    "caltech101": {1: "Faces", 5: "accordion", 96: "water_lilly"},
    "cars": {
        1: "AM General Hummer SUV 2000",
        174: "Ram C/V Cargo Van Minivan 2012",
        196: "smart fortwo Convertible 2012",
    },
    "cifar10": {1: "airplane", 4: "cat", 10: "truck"},
    "cifar100": {1: "apple", 48: "maple_tree", 100: "worm"},
    "cub200": {1: "001.Black_footed_Albatross", 23: "023.Brandt_Cormorant", 200: "200.Common_Yellowthroat"},
    "dtd": {1: "banded", 31: "polka-dotted", 47: "zigzagged"},
    "flowers102": {1: "pink primrose", 78: "lotus lotus", 102: "blackberry lily"},
    "food101": {1: "apple_pie", 32: "donuts", 101: "waffles"},
    "pets": {1: "Abyssinian", 2: "american_bulldog", 37: "yorkshire_terrier"},
    "sun397": {1: "abbey", 9: "apartment_building/outdoor", 397: "youth_hostel"},
}
"""A miniature's (number, label); proven against the official lists where they are at hand."""


class Noise:
    """Writes images that all differ."""

    def __init__(self) -> None:
        self.draw = np.random.default_rng(0)

    def pixels(self, width: int = 20, height: int = 16) -> np.ndarray:
        return self.draw.integers(0, 256, (height, width, 3), dtype=np.uint8)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self.pixels()).save(path)


def members(task: str, *splits: str) -> Iterator[tuple[int, int, str, str]]:
    """Yield (image number from 1, class number, label, split)."""
    image = 0
    for split in splits:
        for number, label in CLASSES[task].items():
            for _ in range(PER_CLASS[split]):
                image += 1
                yield image, number, label, split


def write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def aircraft(root: Path, noise: Noise) -> None:
    folder = root / "fgvc-aircraft-2013b" / "data"
    lists: dict[str, list[str]] = {}
    for image, _, label, split in members("aircraft", "train", "val", "test"):
        lists.setdefault(split, []).append(f"{image:07d} {label}")
        noise.save(folder / "images" / f"{image:07d}.jpg")
    for split, lines in lists.items():
        write_lines(folder / f"images_variant_{split}.txt", lines)
    write_lines(folder / "variants.txt", list(CLASSES["aircraft"].values()))


def caltech101(root: Path, noise: Noise) -> None:
    folder = root / "caltech101" / "101_ObjectCategories"
    for label in CLASSES["caltech101"].values():
        for number in range(1, 32):  # so that some are for training and some for testing
            noise.save(folder / label / f"image_{number:04d}.jpg")
    noise.save(folder / "BACKGROUND_Google" / "image_0001.jpg")


def cars(root: Path, noise: Noise) -> None:
    folder = root / "stanford_cars"
    fields = [(name, "O") for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    for split, name in (("train", "devkit/cars_train_annos"), ("test", "cars_test_annos_withlabels")):
        rows = []
        for image, number, _, _ in members("cars", split):
            rows.append((1, 1, 9, 9, number, f"{image:05d}.jpg"))
            noise.save(folder / f"cars_{split}" / f"{image:05d}.jpg")
        (folder / f"{name}.mat").parent.mkdir(parents=True, exist_ok=True)
        scipy.io.savemat(folder / f"{name}.mat", {"annotations": np.array([rows], dtype=fields)[0]})


def _cifar(root: Path, noise: Noise, task: str, batches: dict[str, str], label_key: bytes) -> None:
    folder = root / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[task]
    folder.mkdir(parents=True)
    for batch, split in batches.items():
        rows = [number - 1 for _, number, _, _ in members(task, split)]
        pixels = np.stack([noise.pixels(32, 32).transpose(2, 0, 1).reshape(-1) for _ in rows])
        tree = {b"batch_label": batch.encode(), label_key: rows, b"data": pixels}
        (folder / batch).write_bytes(pickle.dumps(tree, protocol=2))


def cifar10(root: Path, noise: Noise) -> None:
    batches = {**{f"data_batch_{number}": "train" for number in range(1, 6)}, "test_batch": "test"}
    _cifar(root, noise, "cifar10", batches, b"labels")


def cifar100(root: Path, noise: Noise) -> None:
    _cifar(root, noise, "cifar100", {"train": "train", "test": "test"}, b"fine_labels")


def cub200(root: Path, noise: Noise) -> None:
    folder = root / "CUB_200_2011"
    images, classes, is_train = [], [], []
    for image, number, label, split in members("cub200", "train", "test"):
        path = f"{label}/{label.partition('.')[2]}_{image:04d}.jpg"
        images.append(f"{image} {path}")
        classes.append(f"{image} {number}")
        is_train.append(f"{image} {int(split == 'train')}")
        noise.save(folder / "images" / path)
    write_lines(folder / "images.txt", images)
    write_lines(folder / "image_class_labels.txt", classes)
    write_lines(folder / "train_test_split.txt", is_train)
    write_lines(folder / "classes.txt", [f"{number} {label}" for number, label in CLASSES["cub200"].items()])


def dtd(root: Path, noise: Noise) -> None:
    folder = root / "dtd"
    lists: dict[str, list[str]] = {}
    for image, _, label, split in members("dtd", "train", "val", "test"):
        lists.setdefault(split, []).append(f"{label}/{label}_{image:04d}.jpg")
        noise.save(folder / "images" / lists[split][-1])
    for split, lines in lists.items():
        write_lines(folder / "labels" / f"{split}1.txt", lines)


def flowers102(root: Path, noise: Noise) -> None:
    folder = root / "flowers-102"
    labels, numbers = [], {"train": [], "val": [], "test": []}
    for image, number, _, split in members("flowers102", "train", "val", "test"):
        labels.append(number)
        numbers[split].append(image)
        noise.save(folder / "jpg" / f"image_{image:05d}.jpg")
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.array([labels], dtype=np.uint8)})
    keys = {"trnid": "train", "valid": "val", "tstid": "test"}
    scipy.io.savemat(folder / "setid.mat", {key: np.array([numbers[split]], np.uint16) for key, split in keys.items()})


def food101(root: Path, noise: Noise) -> None:
    folder = root / "food-101"
    lists: dict[str, list[str]] = {}
    for image, _, label, split in members("food101", "train", "test"):
        lists.setdefault(split, []).append(f"{label}/{image}")
        noise.save(folder / "images" / f"{label}/{image}.jpg")
    for split, lines in lists.items():
        write_lines(folder / "meta" / f"{split}.txt", lines)


def pets(root: Path, noise: Noise) -> None:
    folder = root / "oxford-iiit-pet"
    lists: dict[str, list[str]] = {}
    for image, number, label, split in members("pets", "train", "test"):
        lists.setdefault(split, []).append(f"{label}_{image} {number} 1 1")
        noise.save(folder / "images" / f"{label}_{image}.jpg")
    write_lines(folder / "annotations" / "trainval.txt", lists["train"])
    write_lines(folder / "annotations" / "test.txt", lists["test"])


def sun397(root: Path, noise: Noise) -> None:
    folder = root / "SUN397"
    lists: dict[str, list[str]] = {}
    for image, _, label, split in members("sun397", "train", "test"):
        lists.setdefault(split, []).append(f"/{label[0]}/{label}/sun_{image}.jpg")
        noise.save(folder / lists[split][-1].lstrip("/"))
    write_lines(folder / "Training_01.txt", lists["train"])
    write_lines(folder / "Testing_01.txt", lists["test"])


BUILDERS: dict[str, Callable[[Path, Noise], None]] = {
    build.__name__: build
    for build in (aircraft, caltech101, cars, cifar10, cifar100, cub200, dtd, flowers102, food101, pets, sun397)
}


def build(task: str, root: Path) -> Path:
    """Write a task's miniature below a folder, a data root, and return that."""
    BUILDERS[task](root, Noise())
    return root


def as_food_json(folder: Path) -> None:
    """Replace Food-101's lists by the same as JSON, which the archive has as well."""
    for split in ("train", "test"):
        lines = (folder / "meta" / f"{split}.txt").read_text().split()
        by_class: dict[str, list[str]] = {}
        for line in lines:
            by_class.setdefault(line.partition("/")[0], []).append(line)
        (folder / "meta" / f"{split}.json").write_text(json.dumps(by_class))
        (folder / "meta" / f"{split}.txt").unlink()
