"""Data sets whose splits are MATLAB files. They hold arrays; nothing in them is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tes.data.layouts.base import Listing, class_at, damaged, missing
from tes.data.source import Sample
from tes.data.task import Task


def flowers102(folder: Path, task: Task) -> Listing:
    """Flowers-102: `setid.mat` has the image numbers of the splits, `imagelabels.mat` every image's class number."""
    numbers = _load(folder / "setid.mat", task, {"trnid", "valid", "tstid"})
    labels = _integers(folder / "imagelabels.mat", task, "labels", _load(folder / "imagelabels.mat", task, {"labels"}))
    samples = []
    for split, key in (("train", "trnid"), ("val", "valid"), ("test", "tstid")):
        for number in _integers(folder / "setid.mat", task, key, numbers):
            if not 1 <= number <= len(labels):
                raise damaged(folder / "imagelabels.mat", task, f"has no label for image {number} of setid.mat")
            label = class_at(labels[number - 1], task, f"`{folder / 'imagelabels.mat'}`, image {number}")
            samples.append(Sample(f"jpg/image_{number:05d}.jpg", label, split))
    return Listing(samples)


def cars(folder: Path, task: Task) -> Listing:
    """Stanford Cars: `devkit/cars_train_annos.mat`, `cars_test_annos_withlabels.mat`, `cars_{train,test}/00001.jpg`.

    The development kit's own `cars_test_annos.mat` has no labels; the file with labels is a download of its own.
    """
    samples = []
    for split, name in (("train", "cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        file = _in_devkit(folder, name)
        if file is None:
            raise missing(folder / name, task)
        annotations = np.atleast_1d(_load(file, task, {"annotations"})["annotations"])
        try:
            rows = [(str(row["fname"]), int(row["class"])) for row in annotations]
        except (ValueError, TypeError, IndexError) as problem:
            raise damaged(file, task, f"does not give every image a file name and a class ({problem})") from None
        samples += [
            Sample(f"cars_{split}/{image}", class_at(number, task, f"`{file}`, image {image}"), split)
            for image, number in rows
        ]
    meta = _in_devkit(folder, "cars_meta.mat")
    if meta is not None:
        names = np.atleast_1d(_load(meta, task, {"class_names"})["class_names"])
        if tuple(map(str, names)) != task.labels:
            raise damaged(meta, task, "has other classes than the official ones, or in another order")
    return Listing(samples)


def _in_devkit(folder: Path, name: str) -> Path | None:
    return next((place / name for place in (folder / "devkit", folder) if (place / name).is_file()), None)


def _load(file: Path, task: Task, keys: set[str]) -> dict[str, Any]:
    import scipy.io

    if not file.is_file():
        raise missing(file, task)
    try:
        content = scipy.io.loadmat(file, squeeze_me=True, variable_names=list(keys))
    except Exception as problem:  # on damaged files, nearly anything
        raise damaged(file, task, f"is not a MATLAB file that can be read ({type(problem).__name__})") from None
    if lacking := sorted(keys - content.keys()):
        raise damaged(file, task, f"has no `{lacking[0]}`")
    return content


def _integers(file: Path, task: Task, key: str, content: dict[str, Any]) -> list[int]:
    values = np.atleast_1d(content[key])
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.number) or not np.isfinite(values).all():
        raise damaged(file, task, f"has no row of numbers in `{key}`")
    return values.astype(np.int64).tolist()
