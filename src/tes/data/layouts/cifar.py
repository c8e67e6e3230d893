"""CIFAR-10 and CIFAR-100: images packed in batches, as Python pickles or as plain bytes.

A pickle can run code when it is loaded. These need nothing but dictionaries, lists, text, numbers and arrays, so an
unpickler is used that builds nothing else, and arrays itself, as a record of what the file says about them.
"""

# N images, each of 3072 bytes: 1024 red, 1024 green, 1024 blue, in rows from the top

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from tes.data.layouts.base import Listing, class_at, damaged, missing
from tes.data.source import Sample
from tes.data.task import Task

SIDE = 32
NUM_BYTES = 3 * SIDE * SIDE
BATCHES = {
    10: {**{f"data_batch_{number}": "train" for number in range(1, 6)}, "test_batch": "test"},
    100: {"train": "train", "test": "test"},
}
LABEL_KEYS = {10: "labels", 100: "fine_labels"}
NAMES = {10: ("batches.meta", "label_names"), 100: ("meta", "fine_label_names")}
NUM_LABEL_BYTES = {10: 1, 100: 2}
"""In the binary version, before every image; the last of them is the class (CIFAR-100's first is the coarse one)."""


class Batches:
    """Images by "batch/row". They are given as PPM files: no compression, so that equal pixels are equal bytes
    (and one SHA-1) on every machine, which PNG does not promise."""

    def __init__(self) -> None:
        self.files: dict[str, Path] = {}
        self.pixels: dict[str, np.ndarray] = {}

    def read(self, path: str) -> bytes:
        """Return an image as a PPM file's content."""
        batch, _, row = path.partition("/")
        pixels = self.pixels[batch][int(row)].reshape(3, SIDE, SIDE).transpose(1, 2, 0)
        return b"P6 %d %d 255\n" % (SIDE, SIDE) + pixels.tobytes()

    def locate(self, path: str) -> Path:
        """Return the batch's file."""
        return self.files[path.partition("/")[0]]


def cifar(folder: Path, task: Task) -> Listing:
    """Read the batches that are there, `data_batch_1` or `data_batch_1.bin`; the names' order is held against ours."""
    num_classes = task.num_classes
    batches, samples = Batches(), []
    for name, split in BATCHES[num_classes].items():
        file = next((file for file in (folder / name, folder / f"{name}.bin") if file.is_file()), None)
        if file is None:
            continue
        if file.suffix:
            pixels, labels = _from_bytes(file, task)
        else:
            pixels, labels = _from_pickle(file, task)
        batches.files[name], batches.pixels[name] = file, pixels
        samples += [
            Sample(f"{name}/{row:05d}", class_at(label + 1, task, f"`{file}`, image {row}"), split)
            for row, label in enumerate(labels)
        ]
    if not samples:
        raise missing(folder / next(iter(BATCHES[num_classes])), task)
    _check_names(folder, task)
    return Listing(samples, batches)


def _from_bytes(file: Path, task: Task) -> tuple[np.ndarray, list[int]]:
    before = NUM_LABEL_BYTES[task.num_classes]
    content = np.frombuffer(file.read_bytes(), dtype=np.uint8)
    if len(content) % (before + NUM_BYTES):
        raise damaged(file, task, f"is not a whole number of images ({len(content)} bytes)")
    rows = content.reshape(-1, before + NUM_BYTES)
    return rows[:, before:], rows[:, before - 1].tolist()


def _from_pickle(file: Path, task: Task) -> tuple[np.ndarray, list[int]]:
    batch = _unpickle(file, task)
    labels = batch.get(LABEL_KEYS[task.num_classes])
    pixels = batch.get("data")
    if not isinstance(pixels, _Array) or not isinstance(labels, list) or not all(type(n) is int for n in labels):
        raise damaged(file, task, "is not a CIFAR batch: it lacks the images or their labels")
    rows = pixels.bytes_of_rows(NUM_BYTES)
    if rows is None or len(rows) != len(labels):
        raise damaged(file, task, f"does not hold {NUM_BYTES} bytes for each of its {len(labels)} labels")
    return rows, labels


def _check_names(folder: Path, task: Task) -> None:
    name, key = NAMES[task.num_classes]
    if (folder / name).is_file():
        found = _unpickle(folder / name, task).get(key)
        names = [_text(label) for label in found] if isinstance(found, list) else []
    elif (lines := folder / ("batches.meta.txt" if task.num_classes == 10 else "fine_label_names.txt")).is_file():
        name, names = lines.name, lines.read_text(encoding="utf-8", errors="replace").split()
    else:
        return
    if tuple(names) != task.labels:
        raise damaged(folder / name, task, "has other classes than the official ones, or in another order")


def _unpickle(file: Path, task: Task) -> dict[str, Any]:
    """Return the dictionary in a pickle, its keys as text.

    Raises:
        DataError: It holds something else, asks for anything that a batch does not need, or is not the official file.
    """
    content = file.read_bytes()
    try:
        tree = _Unpickler(io.BytesIO(content)).load()
    except _ForbiddenError as asked:
        raise damaged(file, task, f"is not a CIFAR batch: it asks to run `{asked}`, so it was not opened") from None
    except Exception as problem:  # on damaged files, nearly anything
        raise damaged(file, task, f"is not a CIFAR batch ({type(problem).__name__})") from None
    if not isinstance(tree, dict):
        raise damaged(file, task, "is not a CIFAR batch")
    return {_text(key): value for key, value in tree.items()}


def _text(value: Any) -> str:
    """Return text that Python 2 wrote as bytes."""
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


class _ForbiddenError(Exception):
    pass


class _DType:
    """Stands for numpy.dtype: the element type by its name, `u1`."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = _text(name)

    def __setstate__(self, state: Any) -> None:
        pass  # byte order and alignment, which one byte does not have


class _Array:
    """Stands for numpy.ndarray: what the pickle says of it."""

    def __init__(self, *_: Any) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def bytes_of_rows(self, length: int) -> np.ndarray | None:
        """Return the array as (N, length) uint8, or None where it is nothing of the kind."""
        match self.state:
            case [
                _,
                [int(num_rows), int(width)],
                _DType(name="u1" | "uint8"),
                is_fortran,
                (bytes() | bytearray()) as raw,
            ]:
                if width == length and num_rows * width == len(raw):
                    order = "F" if is_fortran else "C"
                    return np.frombuffer(bytes(raw), dtype=np.uint8).reshape((num_rows, width), order=order)
        return None


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> _Array:
    array = _Array()
    array.state = (1, shape, dtype, order == "F", raw)
    return array


def _latin_1(value: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise _ForbiddenError(f"_codecs.encode to {encoding}")
    return value.encode("latin-1")


_KNOWN = {
    ("_codecs", "encode"): _latin_1,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}
"""All that an array, and bytes where they were pickled for Python 2, are made with; and our stand-ins."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: io.BytesIO) -> None:
        super().__init__(content, encoding="bytes")

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for what the pickle asks for."""
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise _ForbiddenError(f"{module}.{name}") from None
