"""What the readers of official layouts return, and what they share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tes.data.source import Sample
from tes.data.task import Task
from tes.errors import DataError


class Packed(Protocol):
    """Images that are not files of their own."""

    def read(self, path: str) -> bytes:
        """Return the image as a file's content."""

    def locate(self, path: str) -> Path:
        """Return the file that holds it."""


@dataclass(frozen=True)
class Listing:
    """What the lists of a data set say, whether or not every image is there.

    Attributes:
        samples: Each with its path below the folder, its label and its split.
        packed: Where the images are, if they are not files below the folder: those of `samples` are then all there.
        has_official_paths: Whether the paths are those that the task's checksum is over.
    """

    samples: list[Sample]
    packed: Packed | None = None
    has_official_paths: bool = True


def read_lines(folder: Path, name: str, task: Task) -> list[str]:
    """Return the lines of a list that are not empty, without white space at their ends.

    Raises:
        DataError: It is absent or no text.
    """
    try:
        text = (folder / name).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise missing(folder / name, task) from None
    except (OSError, UnicodeDecodeError) as problem:
        raise damaged(folder / name, task, f"cannot be read ({problem})") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def class_at(number: str | int, task: Task, where: str) -> str:
    """Return the label of class `number`, counted from 1 as official lists do.

    Raises:
        DataError: There is no such class.
    """
    try:
        index = int(number)
    except (TypeError, ValueError):
        index = 0
    if not 1 <= index <= task.num_classes:
        raise DataError(
            f"{where}: `{number}` is not one of the classes 1 to {task.num_classes} of `{task.name}`; get the list"
            f" again from {task.home}."
        )
    return task.labels[index - 1]


def missing(file: Path, task: Task) -> DataError:
    """Return the error for a file of the layout that is not there."""
    return DataError(
        f"`{task.name}` needs `{file}`, which is not there; the layout is {task.sources[0].holds} (from {task.home})."
    )


def damaged(file: Path, task: Task, why: str) -> DataError:
    """Return the error for a file of the layout that is not what it should be."""
    return DataError(f"`{file}` {why}; get it again from {task.home}.")
