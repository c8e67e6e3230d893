"""What is known of the tasks of the paper: a file each in `tasks/`, data and not code.

A task is chosen by its name in place of a folder. Its file says which classes there are, in index order, how they are
divided, what is measured, and where the images are expected (`sources`, tried in order). The images, and the official
lists, are the user's: the file holds counts and a checksum to hold them against.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, model_validator

from tes.config import Settings
from tes.data.source import Sample
from tes.files import user_path

_FOLDER = Path(__file__).parent / "tasks"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML was built with it


class Folder(Settings):
    """A data set on disk, in its official layout: what its archives unpack to.

    Attributes:
        kind: Of source; others have other fields.
        layout: Which function of `layouts` reads it.
        folders: Where it can be below the data root; the first that is there is taken.
        markers: It is there if one of these is in it; none: if it exists.
        holds: What is in it, for a person.
    """

    kind: Literal["folder"]
    layout: str
    folders: tuple[str, ...]
    markers: tuple[str, ...] = ()
    holds: str

    def find(self, root: Path) -> Path | None:
        """Return the folder below `root` that holds the data, if any does."""
        for folder in (root / name for name in self.folders):
            if folder.is_dir() and (not self.markers or any((folder / marker).exists() for marker in self.markers)):
                return folder
        return None


class Download(Settings):
    """A file that the publisher of a data set serves.

    Attributes:
        url: http(s) address.
        md5: Of the file, as published; None: what is in it is held against the task's checksum.
        into: The folder below the data root that it is unpacked into, or put into if it is no archive.
        inner: The archive in this one that holds the images; the rest is not kept. Its folder is kept below `into`.
    """

    url: Annotated[str, Field(pattern="^https?://")]
    md5: Annotated[str, Field(pattern="^[0-9a-f]{32}$")] | None = None
    into: str = "."
    inner: str | None = None

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rpartition("/")[2]

    @property
    def is_archive(self) -> bool:
        """Whether it is to be unpacked."""
        return self.name.endswith((".tar", ".tar.gz", ".tgz", ".zip"))


class HubCopy(Settings):
    """A copy of the data set on the Hugging Face Hub, in Parquet files.

    Attributes:
        name: "owner/name".
        config: Which of the data sets under this name, if there are several.
        image: The images' column.
        label: The labels' column.
    """

    name: str
    config: str | None = None
    image: str = "image"
    label: str = "label"


class Templates(Settings):
    """Prompts with one `{}` for the name: the task's usual one, and CLIP's many."""

    single: str
    ensemble: tuple[str, ...]


class Resolution(Settings):
    """How the paper's recipes bring a training image to size.

    Attributes:
        policy: `padded_crop` of the small image, which is then enlarged; or `resized_crop`.
        crop_size: Side in pixels at which is cropped.
        size: Side of what the network sees.
    """

    policy: Literal["padded_crop", "resized_crop"]
    crop_size: int
    size: int


class Task(Settings):
    """One task.

    Attributes:
        name: As typed.
        title: As written.
        metric: The figure that selects and is reported first.
        splits: How many images each official split has.
        split_rule: Where the splits come from.
        checksum: `split_checksum` of the official lists.
        md5: Of the official files, where no lists are, by name.
        unverified: Why there is nothing to hold the lists against, where that is so.
        images_per_class: Where no lists are: class `c` has the files `c/image_0001.jpg` and so on.
        templates: Prompts.
        resolution: Of the paper's recipes.
        sources: Where the images can be, in order.
        downloads: Where the official files are.
        hub: Where a copy is.
        home: Web page.
        licence: Of the images.
        citation: Of the data set.
        classes: The readable name of every class, by its official label, in index order.
        also: Further names that published class texts have for a class.
    """

    name: str
    title: str
    metric: Literal["top1", "mean_per_class"]
    splits: dict[Literal["train", "val", "test"], int]
    split_rule: str
    checksum: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    md5: dict[str, str] = Field(default_factory=dict)
    unverified: str | None = None
    images_per_class: dict[str, int] = Field(default_factory=dict)
    templates: Templates
    resolution: Resolution
    sources: tuple[Folder, ...]
    downloads: tuple[Download, ...] = ()
    hub: HubCopy | None = None
    home: str
    licence: str
    citation: str
    classes: dict[str, str]
    also: dict[str, tuple[str, ...]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _says_what_it_is_held_against(self) -> Task:
        if bool(self.checksum or self.md5) == bool(self.unverified):
            raise ValueError("a task has a checksum (or md5), or says why not (unverified)")
        return self

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """The official labels, in index order."""
        return tuple(self.classes)

    @property
    def num_classes(self) -> int:
        """How many classes the official task has."""
        return len(self.classes)

    @property
    def places(self) -> tuple[Folder, ...]:
        """Where the images can be, in order: the official layout, then what `tes download` makes of the Hub's copy."""
        if self.hub is None:
            return self.sources
        holds = f"Parquet files of {self.hub.name}"
        return (*self.sources, Folder(kind="folder", layout="parquet", folders=(f"{self.name}-parquet",), holds=holds))


@functools.cache
def task_names() -> tuple[str, ...]:
    """Return the names of all tasks, sorted."""
    return tuple(sorted(file.stem for file in _FOLDER.glob("*.yaml")))


@functools.cache
def load_task(name: str) -> Task:
    """Return what is known of a task, one of `task_names()`."""
    assert name in task_names(), name
    tree = yaml.load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"), _LOADER)
    return Task(name=name, **tree)


def split_checksum(samples: Iterable[Sample]) -> str:
    """Return the SHA-256 over the sorted lines "path, tab, label, tab, split, line feed".

    Neither the order of the lists nor their line ends matter; every member, label and split does.
    """
    lines = sorted(f"{sample.path}\t{sample.label}\t{sample.split}\n" for sample in samples)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def data_root(root: str | None) -> Path:
    """Return the folder of the tasks' data sets: as given, else `$TES_DATA`, else `data`."""
    return user_path(root or os.environ.get("TES_DATA") or "data")
