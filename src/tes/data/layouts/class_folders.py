"""A data set of class folders without lists."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tes.data.images import SUFFIXES
from tes.data.layouts.base import Listing
from tes.data.source import Sample
from tes.data.task import Task
from tes.errors import DataError, listing

BACKGROUND = "BACKGROUND_Google"  # clutter: not one of the 101 classes
TRAIN_PER_CLASS = 30


def caltech101(folder: Path, task: Task) -> Listing:
    """Caltech-101: `<class>/image_0001.jpg` and so on.

    It has no official split. Ours: of every class, the 30 images whose SHA-256 of "class/file" is smallest are for
    training, the others for testing. The rule goes over all official names, so that a missing image moves no other.
    """
    samples = []
    for label, number in task.images_per_class.items():
        paths = [f"{label}/image_{index:04d}.jpg" for index in range(1, number + 1)]
        ranked = sorted(paths, key=lambda path: hashlib.sha256(path.encode()).hexdigest())
        samples += [
            Sample(path, label, "train" if rank < TRAIN_PER_CLASS else "test") for rank, path in enumerate(ranked)
        ]
    official = {sample.path for sample in samples}
    found = [
        f"{below.name}/{file.name}"
        for below in sorted(folder.iterdir())
        if below.is_dir() and below.name != BACKGROUND and not below.name.startswith(".")
        for file in sorted(below.iterdir())
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    ]
    if strange := [path for path in found if path not in official]:
        raise DataError(
            f"`{folder}` holds {len(strange)} images that are not of the official `{task.name}`: {listing(strange, 3)};"
            f" move them away, or get the data again from {task.home}."
        )
    return Listing(samples)
