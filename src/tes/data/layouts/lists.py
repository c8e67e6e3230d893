"""Data sets whose splits are text files, one image a line."""

from __future__ import annotations

import json
from pathlib import Path

from tes.data.layouts.base import Listing, class_at, damaged, missing, read_lines
from tes.data.source import Sample
from tes.data.task import Task


def aircraft(folder: Path, task: Task) -> Listing:
    """FGVC-Aircraft: `images_variant_{train,val,test}.txt` with "0481847 707-320", images in `images/`."""
    samples = []
    for split in task.splits:
        for line in read_lines(folder, f"images_variant_{split}.txt", task):
            image, _, variant = line.partition(" ")
            samples.append(Sample(f"images/{image}.jpg", variant.strip(), split))
    return Listing(samples)


def cub200(folder: Path, task: Task) -> Listing:
    """CUB-200-2011: images, their classes and whether they are for training, by number, in three files."""
    images = _numbered(folder, "images.txt", task)
    classes = _numbered(folder, "image_class_labels.txt", task)
    is_train = _numbered(folder, "train_test_split.txt", task)
    if not images.keys() == classes.keys() == is_train.keys():
        raise damaged(folder / "images.txt", task, "does not number the same images as the other two lists")
    samples = []
    for number, path in images.items():
        label = class_at(classes[number], task, f"`{folder / 'image_class_labels.txt'}`, image {number}")
        if path.partition("/")[0] != label:
            raise damaged(
                folder / "image_class_labels.txt", task, f"gives `{path}` the class `{label}`, where it does not lie"
            )
        samples.append(Sample(f"images/{path}", label, "train" if is_train[number] == "1" else "test"))
    return Listing(samples)


def dtd(folder: Path, task: Task) -> Listing:
    """DTD, partition 1: `labels/{train,val,test}1.txt` with "banded/banded_0002.jpg", images in `images/`."""
    return Listing(
        [
            Sample(f"images/{line}", line.partition("/")[0], split)
            for split in task.splits
            for line in read_lines(folder, f"labels/{split}1.txt", task)
        ]
    )


def food101(folder: Path, task: Task) -> Listing:
    """Food-101: `meta/{train,test}.txt` with "apple_pie/1005649", or the same as JSON; images in `images/`."""
    samples = []
    for split in task.splits:
        name = f"meta/{split}.txt"
        if (folder / name).exists():
            lines = read_lines(folder, name, task)
        else:
            lines = _json_lists(folder / "meta" / f"{split}.json", task)
        samples += [Sample(f"images/{line}.jpg", line.partition("/")[0], split) for line in lines]
    return Listing(samples)


def pets(folder: Path, task: Task) -> Listing:
    """Oxford-IIIT Pets: `annotations/{trainval,test}.txt` with "Abyssinian_100 1 1 1": image and class number."""
    samples = []
    for split, stem in (("train", "trainval"), ("test", "test")):
        name = f"annotations/{stem}.txt"
        for line in read_lines(folder, name, task):
            if line.startswith("#"):
                continue
            image, _, numbers = line.partition(" ")
            label = class_at(numbers.partition(" ")[0], task, f"`{folder / name}`, image {image}")
            if image.rpartition("_")[0] != label:
                raise damaged(folder / name, task, f"gives `{image}` the class `{label}`, which it is not named after")
            samples.append(Sample(f"images/{image}.jpg", label, split))
    return Listing(samples)


def sun397(folder: Path, task: Task) -> Listing:
    """SUN397, partition 1: `{Training,Testing}_01.txt` with "/a/abbey/sun_x.jpg", images below the same letters.

    The lists come in an archive of their own, so they may lie beside the images or in a folder `Partitions`.
    """
    samples = []
    for split, name in (("train", "Training_01.txt"), ("test", "Testing_01.txt")):
        places = [folder, folder / "Partitions", folder.parent / "Partitions", folder.parent]
        place = next((place for place in places if (place / name).is_file()), None)
        if place is None:
            raise missing(folder / name, task)
        for line in read_lines(place, name, task):
            path = line.lstrip("/")
            samples.append(Sample(path, path.partition("/")[2].rpartition("/")[0], split))
    return Listing(samples)


def _numbered(folder: Path, name: str, task: Task) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in read_lines(folder, name, task):
        number, _, value = line.partition(" ")
        if number in found:
            raise damaged(folder / name, task, f"has image {number} twice")
        found[number] = value.strip()
    return found


def _json_lists(file: Path, task: Task) -> list[str]:
    try:
        by_class = json.loads(file.read_text(encoding="utf-8"))
        return [line for lines in by_class.values() for line in lines if line.partition("/")[2]]
    except FileNotFoundError:
        raise missing(file.with_suffix(".txt"), task) from None
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as problem:
        raise damaged(file, task, f"is not the JSON that it should be ({problem})") from None
