"""A task's images: found below the data root, read by the official lists, and held against what is known of them."""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tes.data.layouts import READERS
from tes.data.layouts.base import Listing, damaged
from tes.data.source import LocalSource, Sample, Source
from tes.data.task import Folder, Task, data_root, load_task, split_checksum
from tes.errors import DataError, listing
from tes.files import md5_file


class TaskSource(LocalSource):
    """The images of a task in a folder of the official layout.

    Args:
        task: What is known of it.
        place: The layout.
        folder: Where it is.
        partial: Accept a part of the official list.

    Attributes:
        official: (found, official) number of classes, and of images per official split.

    Raises:
        DataError: The lists are not the official ones, or images are missing and `partial` does not allow for it.
    """

    def __init__(self, task: Task, place: Folder, folder: Path, partial: bool) -> None:
        super().__init__(folder, task.name)
        self.task = task
        self.metric = task.metric
        self.templates, self.ensemble = (task.templates.single,), task.templates.ensemble
        self.aliases = task.also
        self.crop_size = task.resolution.crop_size if task.resolution.policy == "padded_crop" else None
        listed = READERS[place.layout](folder, task)
        self.packed = listed.packed
        self.notes = _verify(task, folder, listed, partial)
        present = listed.samples if self.packed else _on_disk(folder, listed.samples)
        if not partial:
            _require_all(task, folder, listed.samples, present)
        self.samples = present
        if not self.samples:
            raise DataError(f"No image of `{task.name}` is in `{folder}`; {how_to_get(task)}.")
        found = Counter(sample.split for sample in self.samples)
        labels = {sample.label for sample in self.samples}
        self.class_names = {label: name for label, name in task.classes.items() if label in labels}
        self.official = {"classes": (len(labels), task.num_classes)}
        self.official |= {split: (found[split], number) for split, number in task.splits.items()}
        if len(self.samples) < sum(task.splits.values()):
            self.coverage = (len(self.samples), sum(task.splits.values()))
            self.notes.append(f"Found / official: {found_of_official(self.official)}.")

    def read(self, sample: Sample) -> bytes:
        """Return the image as a file's content."""
        return self.packed.read(sample.path) if self.packed else super().read(sample)

    def locate(self, sample: Sample) -> Path:
        """Return the file that holds the image."""
        return self.packed.locate(sample.path) if self.packed else super().locate(sample)


class TaskClasses(Source):
    """A task's classes, a sample each, for those who look at no image: the data need not be there."""

    def __init__(self, task: Task) -> None:
        self.name, self.class_names, self.aliases = task.name, task.classes, task.also
        self.templates, self.ensemble = (task.templates.single,), task.templates.ensemble
        self.samples = [Sample(label, label) for label in task.labels]

    def read(self, sample: Sample) -> bytes:
        """There is no image.

        Raises:
            OSError: Always.
        """
        raise FileNotFoundError(sample.path)


def open_task(name: str, root: str | None = None, partial: bool = False) -> TaskSource:
    """Open a task's images, from the first of its sources that is there.

    Args:
        name: One of `task_names()`.
        root: The folder of the tasks' data sets; None: `$TES_DATA`, else `data`.
        partial: Accept a part of the official list.

    Raises:
        DataError: The data are nowhere, or are not what they should be.
    """
    task = load_task(name)
    found = find_folder(task, root)
    if found is None:
        where = data_root(root)
        raise DataError(f"The data of the task `{name}` ({task.title}) are not in `{where}`; {how_to_get(task, root)}.")
    return TaskSource(task, *found, partial)


def find_folder(task: Task, root: str | None = None) -> tuple[Folder, Path] | None:
    """Return the first of a task's sources that is below the data root, and where; None: there is none."""
    below = data_root(root)
    return next(((place, folder) for place in task.places if (folder := place.find(below)) is not None), None)


def found_of_official(official: Mapping[str, tuple[int, int]]) -> str:
    """Return "3 / 102 classes, 6 / 1020 train, …"."""
    return ", ".join(f"{found} / {number} {what}" for what, (found, number) in official.items())


def how_to_get(task: Task, root: str | None = None) -> str:
    """Return where a task's data come from and where they are expected, as the end of a sentence."""
    place = task.sources[0]
    into = f" --data-root {shlex.quote(root)}" if root else ""
    fetch = f"run `tes download {task.name}{into}`, or " if task.downloads or task.hub else ""
    return (
        f"{fetch}get them from {task.home} and unpack them as `{place.folders[0]}` ({place.holds}) below a folder that"
        " --data-root (or $TES_DATA) names"
    )


def _verify(task: Task, folder: Path, listed: Listing, partial: bool) -> list[str]:
    """Hold what the lists say against what is known of the task; return what could not be held against it.

    Raises:
        DataError: They are not the official lists, nor, with `partial`, a part of them.
    """
    samples = listed.samples
    again = f"get the official lists again from {task.home}"
    if unknown := sorted({sample.label for sample in samples} - task.classes.keys()):
        raise DataError(
            f"`{task.name}` in `{folder}` has classes that it should not have: {listing(unknown)}; {again}."
        )
    if outside := [sample.path for sample in samples if sample.path.startswith("/") or ".." in sample.path.split("/")]:
        raise DataError(
            f"The lists of `{task.name}` in `{folder}` name images outside it: {listing(outside, 3)}; {again}."
        )
    if twice := [path for path, number in Counter(sample.path for sample in samples).items() if number > 1]:
        raise DataError(f"The lists of `{task.name}` in `{folder}` have images twice: {listing(twice, 3)}; {again}.")
    sizes = Counter(sample.split for sample in samples)
    num_classes = len({sample.label for sample in samples})
    wrong = [
        f"{sizes[split]} {split} images instead of {number}"
        for split, number in task.splits.items()
        if (sizes[split] > number if partial else sizes[split] != number)
    ]
    # With the right counts, it is for the checksum to tell; without one, classes are counted all the same.
    uncertain = task.unverified or not listed.has_official_paths
    if num_classes < task.num_classes and (wrong or (uncertain and not partial)):
        wrong.append(f"{num_classes} classes instead of {task.num_classes}")
    if wrong:
        advice = again if partial else f"{again}, or accept a part of them with --partial"
        raise DataError(f"`{task.name}` in `{folder}` has {', '.join(wrong)}; {advice}.")
    if not listed.has_official_paths:
        return [
            "A copy: classes and counts are the official ones, which image is in which split could not be verified."
        ]
    if task.unverified:
        return [f"Its lists are unverified: {task.unverified}."]
    if task.md5:
        files = {folder / name: md5 for name, md5 in task.md5.items()}
        if partial or not all(file.is_file() for file in files):
            return ["Its files were not held against the official ones, whose MD5 is known."]
        if differing := [file for file, md5 in files.items() if md5_file(file) != md5]:
            raise damaged(differing[0], task, "is not the official file (its MD5 differs)")
        return []
    if len(samples) < sum(task.splits.values()):
        return ["The lists are a part of the official ones, so they cannot be held against their checksum."]
    if split_checksum(samples) != task.checksum:
        raise DataError(
            f"The lists of `{task.name}` in `{folder}` have the right counts but are not the official ones: an image, a"
            f" label or a split was changed (their checksum differs); {again}."
        )
    return []


def _on_disk(folder: Path, samples: Iterable[Sample]) -> list[Sample]:
    """Return the samples whose file is there; folders are listed, which is quicker than to ask for every file."""
    below: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        below[sample.path.rpartition("/")[0]].append(sample)
    found = []
    for name, inside in below.items():
        try:
            files = {file.name for file in (folder / name).iterdir()}
        except OSError:
            continue
        found += [sample for sample in inside if sample.path.rpartition("/")[2] in files]
    return found


def _require_all(task: Task, folder: Path, listed: Sequence[Sample], present: Sequence[Sample]) -> None:
    if len(present) == len(listed):
        return
    there = {sample.path for sample in present}
    gone = [sample.path for sample in listed if sample.path not in there]
    raise DataError(
        f"Of the {len(listed)} images of `{task.name}`, {len(gone)} are not in `{folder}`: {listing(gone, 3)}; complete"
        f" the download from {task.home}, or take what is there with --partial."
    )
