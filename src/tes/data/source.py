"""What a data source is: a list of labelled samples, and a way to read the bytes of each."""

from __future__ import annotations

import errno
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tes.errors import DataError, did_you_mean, listing
from tes.files import user_path
from tes.registry import Registry

SPLIT_WORDS = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}

sources = Registry(
    "data source",
    {
        "folder": "tes.data.folder:FolderSource",
        "csv": "tes.data.table:TableSource",
        "hf": "tes.data.hub:HubSource",
    },
    "tes.sources",
)


@dataclass(frozen=True)
class Sample:
    """One labelled image: `path` relative to the source's root, with `/`; `split` is train, val, test or None."""

    path: str
    label: str
    split: str | None = None
    group: str | None = None


class Source(ABC):
    """Labelled images from somewhere. One of these is one file in this folder, and one line in `sources`.

    Attributes:
        name: Short, fit for the name of a run folder.
        samples: Every image, readable or not. Either all have a split or none.
        notes: What was left out on the way, in sentences.
        root: The folder that the images lie in, if they are files.
        class_names: The readable name of every label, in the order of the class index; None: the labels are sorted,
            and names derived from them.
        aliases: Further names, by label, under which published class texts may know a class.
        templates: Prompts that suit the classes, where the user sets none.
        ensemble: Many prompts that suit the classes, taken where the user asks for `ensemble`.
        crop_size: Side at which training images are cut before they are enlarged, where they are that small.
        metric: The figure that selects and is reported first: `mean_per_class` or `top1`.
        coverage: How many images there are and how many the official list has, where some are missing.
        official: (found, official) number of `classes`, and of images for every split of a task's official list.
    """

    name: str
    samples: Sequence[Sample]
    notes: Sequence[str] = ()
    root: Path | None = None
    class_names: Mapping[str, str] | None = None
    aliases: Mapping[str, tuple[str, ...]] = {}
    templates: tuple[str, ...] | None = None
    ensemble: tuple[str, ...] | None = None
    crop_size: int | None = None
    metric: str = "mean_per_class"
    coverage: tuple[int, int] | None = None
    official: Mapping[str, tuple[int, int]] | None = None

    @abstractmethod
    def read(self, sample: Sample) -> bytes:
        """Return the image file's content.

        Raises:
            OSError: It cannot be read.
        """

    def locate(self, sample: Sample) -> Path | None:
        """Return the file that holds the image, or None; by its size and time a later scan knows it again."""
        return None


class LocalSource(Source):
    """A source whose samples are files below (or, by an absolute path, outside) the folder `root`."""

    def __init__(self, root: Path, name: str) -> None:
        self.root = root
        self.name = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "data"

    def read(self, sample: Sample) -> bytes:
        """Return the file's content."""
        file = self.locate(sample)
        mode = file.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a pipe would keep the reader waiting for ever
            raise OSError(errno.EINVAL, "not a regular file")
        return file.read_bytes()

    def locate(self, sample: Sample) -> Path:
        """Return the sample's file."""
        return self.root / sample.path


def open_source(ref: str, root: str | None = None, partial: bool = False) -> Source:
    """Open a task, a folder, a CSV or TSV file, or `NAME:REF` for a source that is registered as NAME.

    Args:
        ref: A word that names a task is the task; a folder that is called so here is written `./word`.
        root: Where tasks' data sets are; None: `$TES_DATA`, else `data`.
        partial: Accept a part of a task's official list.

    Raises:
        DataError: There is nothing there, or it is of no known kind.
    """
    from tes.data.task import task_names
    from tes.data.task_source import open_task

    if ref in task_names():
        return open_task(ref, root, partial)
    path = user_path(ref)
    kind, colon, rest = ref.partition(":")
    if not ref.strip():
        raise DataError("The data's name is empty; give a folder of class folders or a CSV.")
    if not path.exists() and colon and re.fullmatch(r"[A-Za-z][\w-]+", kind):
        return _registered(ref, kind, rest)
    if path.is_dir():
        return sources.get("folder")(ref)
    if path.suffix.lower() in (".csv", ".tsv"):
        return sources.get("csv")(ref)
    if path.exists():
        raise DataError(f"`{ref}` is neither a folder nor a CSV or TSV file; unpack an archive first.")
    raise no_such_path(path, "folder", task_names() if path.name == ref else ())


def no_such_path(path: Path, kind: str, others: Iterable[str] = ()) -> DataError:
    """Return the error for a path that does not exist, with the nearest name that does, or that is in `others`."""
    parent = path.parent
    if not parent.is_dir():
        return DataError(f"There is no {kind} `{path}`, and no folder `{parent}`; check the path.")
    try:
        names = [entry.name for entry in parent.iterdir() if not entry.name.startswith(".")]
    except OSError:
        names = []
    return DataError(f"There is no {kind} `{path}`.{did_you_mean(path.name, [*names, *others])}")


def _registered(ref: str, kind: str, rest: str) -> Source:
    if kind not in sources.names():
        what = "is a web address; download the images first" if rest.startswith("//") else "names no known data source"
        raise DataError(
            f"`{ref}` {what}.{did_you_mean(kind, sources.names())} Known: {listing(sources.names(), limit=20)}."
        )
    return sources.get(kind)(rest)
