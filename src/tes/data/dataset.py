"""A labelled, split data set: what a source holds, without what cannot be read, with classes that have names."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from tes import console
from tes.config import DataConfig
from tes.data.classes_file import ClassInfo, apply_classes_file, derive_classes
from tes.data.images import DEEP_SUFFIXES, Depth, UnreadableImageError, decode, depth, depth_notes
from tes.data.names import NameIndex
from tes.data.scan import NO_SUCH_FILE, scan
from tes.data.source import Sample, Source, open_source
from tes.data.splits import carve, draw_fraction, draw_shots
from tes.data.table import TableSource
from tes.data.task import load_task, task_names
from tes.data.task_source import TaskClasses
from tes.errors import DataError, counted, listing
from tes.files import user_path

MAX_DEPTHS = 32


class LostImageError(DataError):
    """An image could be read when the data set was opened, and cannot be now; `reason` says why in a few words."""

    def __init__(self, path: str, name: str, reason: str) -> None:
        super().__init__(
            f"The image `{path}` of `{name}` could be read before and cannot be now ({reason}); bring it back, or start"
            " again without it."
        )
        self.reason = reason


class BadImagesError(DataError):
    """Too many images cannot be read; `unreadable` lists (path, reason) of all of them."""

    def __init__(self, message: str, unreadable: list[tuple[str, str]]) -> None:
        super().__init__(message)
        self.unreadable = unreadable


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images with a class and a split each. Row i of every column is image i; the order is that of the paths.

    Attributes:
        name: Short.
        classes: In index order: a task's own, else sorted by label.
        paths: Relative to the data, with `/`.
        labels: (n,) int64 index into `classes`.
        splits: (n,) of train, val, test, unused.
        groups: Of the CSV's column, or None.
        sha1s: Of the files' content.
        unreadable: (path, reason) of the images that were left out.
        lost: Index to reason of images that could be read when the data set was opened and not when they were needed.
            The one thing that changes, and the same for all draws.
        max_unreadable: More than this are not tolerated; None: the larger of 3 and 1 %.
        untested: Labels of classes without a test image.
        notes: What the user should know, in sentences.
        source: Reads the images.
        metric: The figure that selects and is reported first: `mean_per_class` or `top1`.
        templates: The task's own prompts, where the user sets none.
        ensemble: The task's many prompts, where the user asks for them.
        crop_size: Side at which the task's training images are cut before they are enlarged, where they are that small.
        coverage: (found, official) number of images, where some of a task's list are missing.
    """

    name: str
    classes: list[ClassInfo]
    paths: list[str]
    labels: np.ndarray
    splits: np.ndarray
    groups: list[str | None]
    sha1s: list[str]
    source: Source
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    lost: dict[int, str] = field(default_factory=dict)
    max_unreadable: int | None = None
    untested: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    metric: str = "mean_per_class"
    templates: tuple[str, ...] | None = None
    ensemble: tuple[str, ...] | None = None
    crop_size: int | None = None
    coverage: tuple[int, int] | None = None

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    def indices(self, split: str) -> np.ndarray:
        """Return the images of a split, ascending."""
        return np.flatnonzero(self.splits == split)

    def read_image(self, index: int, max_side_hint: int | None = None) -> Image.Image:
        """Return image `index`, upright RGB, decoded in full unless there is a hint, see `decode`.

        Raises:
            LostImageError: It can no longer be read.
        """
        sample = Sample(self.paths[index], self.classes[self.labels[index]].label)
        try:
            return decode(self.source.read(sample), max_side_hint)
        except (OSError, UnreadableImageError) as problem:
            reason = getattr(problem, "reason", None) or getattr(problem, "strerror", None) or str(problem)
            raise LostImageError(sample.path, self.name, str(reason).lower()) from None

    def present(self, indices: np.ndarray) -> np.ndarray:
        """Return those of `indices` that are not lost."""
        return indices[[index not in self.lost for index in indices.tolist()]] if self.lost else indices

    def lose(self, index: int, reason: str) -> None:
        """Take note, aloud, that an image can no longer be read, and that it is done without.

        Raises:
            DataError: There are more of them than are tolerated, or its class has none left to train on.
        """
        if index in self.lost:
            return
        self.lost[index] = reason
        gone = [(self.paths[index], reason) for index, reason in self.lost.items()]
        console.warn(f"`{gone[-1][0]}` could be read before and cannot be now ({reason}); going on without it")
        self.require_trainable()
        _refuse_too_many(
            self.name, [*self.unreadable, *gone], len(self.paths) + len(self.unreadable), self.max_unreadable
        )

    def require_trainable(self, indices: np.ndarray | None = None) -> None:
        """Refuse to go on where losses have left a class without an image to train on.

        Args:
            indices: Those that are trained on; None: the train split.

        Raises:
            DataError: There is such a class.
        """
        if not self.lost:
            return
        indices = self.indices("train") if indices is None else indices
        before, now = (set(self.labels[part].tolist()) for part in (indices, self.present(indices)))
        if empty := [self.classes[label].label for label in sorted(before - now)]:
            shown = listing([f"{self.paths[index]} ({reason})" for index, reason in self.lost.items()])
            raise DataError(
                f"No training image of {_classes(empty)} can be read any more: {shown}; bring them back, or start again"
                " without them."
            )


def load(config: DataConfig, seed: int = 0) -> Dataset:
    """Open a source, look at every image, name the classes, and decide the splits.

    Args:
        config: The source and what to use of it.
        seed: Draws the shots or the fraction.

    Raises:
        DataError: There is nothing to train on, or something in it cannot be used.
    """
    return draw(open_dataset(config), config, seed)


def open_dataset(config: DataConfig) -> Dataset:
    """Do the part of `load` that no seed touches: everything but the draw of shots or a fraction."""
    source = open_source(config.source, config.root, config.partial)
    samples, classes, notes = _samples_and_classes(source, config)
    dataset = _readable(source, samples, classes, config.max_unreadable, notes)
    if empty := sorted({info.label for info in classes} - {classes[label].label for label in dataset.labels}):
        shown = listing([f"{path} ({reason})" for path, reason in dataset.unreadable])
        raise BadImagesError(
            f"No image of {_classes(empty)} can be read: {shown}; add good ones, or leave the class out.",
            dataset.unreadable,
        )
    labels = [classes[label].label for label in dataset.labels]
    splits, more = _official_or_carved(labels, dataset, config.split_seed)
    _require_trainable(labels, splits, classes)
    return dataclasses.replace(dataset, splits=splits, notes=[*dataset.notes, *more])


def draw(dataset: Dataset, config: DataConfig, seed: int) -> Dataset:
    """Draw the run's shots or fraction from an opened data set.

    Raises:
        DataError: A class has fewer images than shots.
    """
    labels = [dataset.classes[label].label for label in dataset.labels]
    splits, notes = dataset.splits, list(dataset.notes)
    if config.shots is not None:
        splits = draw_shots(labels, dataset.sha1s, dataset.groups, splits, config.shots, seed)
    elif config.fraction is not None:
        splits = draw_fraction(labels, dataset.sha1s, dataset.groups, splits, config.fraction, seed)
    tested = {labels[index] for index in np.flatnonzero(splits == "test")}
    untested = [info.label for info in dataset.classes if info.label not in tested]
    if untested:
        notes.append(f"No test image, so no score, for {_classes(untested)}.")
    return dataclasses.replace(dataset, splits=splits, untested=untested, notes=notes)


def load_classes(config: DataConfig) -> tuple[list[ClassInfo], Source]:
    """Return the classes of a source with their texts, and the source. No image is read; a task's need not be there.

    Raises:
        DataError: As `load` does, as far as classes go.
    """
    if config.source in task_names():
        source: Source = TaskClasses(load_task(config.source))
    else:
        source = open_source(config.source)
    return _samples_and_classes(source, config)[1], source


def load_labelled(
    ref: str,
    classes: Sequence[ClassInfo],
    root: str | None = None,
    partial: bool = False,
    *,
    ignore_unknown: bool = False,
) -> Dataset:
    """Open another data set for a model that knows `classes`; every image is in the split `test`.

    Its classes are matched by label, else by readable name; it need not have all of them.

    Args:
        ref: As for `open_source`.
        classes: Of the model.
        root: Where tasks' data sets are.
        partial: Accept a part of a task's official list.
        ignore_unknown: Leave out images of classes that the model does not know.

    Raises:
        DataError: It has classes that the model does not know, and these are not ignored, or all are.
    """
    source = open_source(ref, root, partial)
    index = NameIndex({info.label: [info.name] for info in classes})
    known: dict[str, str] = {}
    unknown: list[str] = []
    for label in sorted({sample.label for sample in source.samples}):
        found = index.find(label) or index.find((source.class_names or {}).get(label, label))
        if len(found) == 1:
            known[label] = found[0]
        else:
            unknown.append(label)
    if unknown and not (ignore_unknown and known):
        named = listing([index.describe_unknown(label) for label in unknown])
        raise DataError(
            f"The model does not know these classes of `{ref}`: {named}; rename them, or leave them out"
            " (--ignore-unknown)."
        )
    kept = [sample for sample in _by_path(source) if sample.label in known]
    samples = [dataclasses.replace(sample, label=known[sample.label]) for sample in kept]
    notes = list(source.notes)
    if unknown:
        notes.append(
            f"Left out {counted(len(source.samples) - len(kept), 'image')} of {_classes(unknown)}, which the model does"
            " not know."
        )
    if any(sample.split for sample in samples):
        notes.append(f"Scored all splits of `{source.name}` together.")
    dataset = _readable(source, samples, list(classes), None, notes)
    return dataclasses.replace(dataset, splits=np.full(len(dataset.paths), "test", dtype="<U6"))


def find_duplicates(dataset: Dataset) -> list[list[str]]:
    """Return groups of identical images that lie in more than one split or class, as "path (split, class)"."""
    return [
        [f"{dataset.paths[i]} ({dataset.splits[i]}, {dataset.classes[dataset.labels[i]].label})" for i in indices]
        for indices in duplicate_groups(dataset)
    ]


def duplicate_groups(dataset: Dataset) -> list[list[int]]:
    """Return the same groups as indices."""
    copies: dict[str, list[int]] = defaultdict(list)
    for index in np.flatnonzero(dataset.splits != "unused").tolist():
        copies[dataset.sha1s[index]].append(index)
    return [
        indices
        for indices in copies.values()
        if len({(str(dataset.splits[i]), int(dataset.labels[i])) for i in indices}) > 1
    ]


def _by_path(source: Source) -> list[Sample]:
    # The draws are by content; only among copies of one image does the order decide, so it must not be the file's.
    return sorted(source.samples, key=lambda sample: sample.path)


def _classes(labels: Sequence[str]) -> str:
    return f"{'the class' if len(labels) == 1 else 'the classes'} {listing([f'`{label}`' for label in labels])}"


def _samples_and_classes(source: Source, config: DataConfig) -> tuple[list[Sample], list[ClassInfo], list[str]]:
    """Return what is kept of a source by `only_classes`, the classes with their texts, and notes."""
    notes = list(source.notes)
    samples = _by_path(source)
    labels = {sample.label for sample in samples}
    if config.only_classes is not None:
        num_classes, labels = len(labels), _chosen(config.only_classes, labels)
        samples = [sample for sample in samples if sample.label in labels]
        notes.append(f"Kept {len(labels)} of {num_classes} classes, as `only_classes` says.")
    sizes = Counter(sample.label for sample in samples)
    if small := sorted(label for label in labels if sizes[label] < config.min_images):
        samples, labels = [sample for sample in samples if sample.label not in small], labels - set(small)
        notes.append(f"Left out {_classes(small)}, with fewer than {config.min_images} images, as `min_images` says.")
    if source.coverage is not None:
        trained = {sample.label for sample in samples if sample.split == "train"}
        if untrained := sorted(labels - trained):
            samples, labels = [sample for sample in samples if sample.label in trained], trained
            notes.append(f"Left out {_classes(untrained)}, of which no training image is here.")
    if len(labels) < 2:
        only = f"only `{next(iter(labels))}`" if labels else "none"
        inner = user_path(config.source) / next(iter(labels), "")
        is_around = labels and inner.is_dir() and all(sample.path.count("/") > 1 for sample in samples)
        hint = f" If the classes are in it, name `{inner}`." if is_around else ""
        raise DataError(f"`{config.source}` must have at least two classes to tell apart, but there is {only}.{hint}")
    classes = derive_classes(labels)
    if source.class_names is not None:
        classes = [
            ClassInfo(label, name, aliases=source.aliases.get(label, ()))
            for label, name in source.class_names.items()
            if label in labels
        ]
    if config.classes is not None:
        classes, ignored = apply_classes_file(classes, config.classes)
        if ignored:
            notes.append(
                f"Ignored {counted(len(ignored), 'row')} of `{config.classes}` for classes that the data lacks:"
                f" {listing(ignored)}."
            )
        silent = [info.label for info in classes if not (info.descriptions or info.prompts)]
        if 0 < len(silent) < len(classes):
            notes.append(f"`{config.classes}` has no sentence for {_classes(silent)}: the templates are used.")
    return samples, classes, notes


def _chosen(only_classes: Sequence[str], labels: set[str]) -> set[str]:
    names = list(only_classes)
    if len(names) == 1 and names[0] not in labels and user_path(names[0]).is_file():
        try:
            lines = user_path(names[0]).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as problem:
            raise DataError(f"The list of classes `{names[0]}` cannot be read: {problem}.") from None
        names = [line.strip() for line in lines if line.strip()]
    index = NameIndex(labels)
    found = {name: index.find(name) for name in names}
    if wrong := [name for name, options in found.items() if len(options) != 1]:
        named = listing([index.describe_unknown(name) for name in wrong])
        raise DataError(
            f"--only-classes names what is not one class of the data: {named}; give labels of the data's classes."
        )
    return {options[0] for options in found.values()}


def _readable(
    source: Source,
    samples: list[Sample],
    classes: list[ClassInfo],
    max_unreadable: int | None,
    notes: list[str],
) -> Dataset:
    """Look at every image and leave out those that cannot be read."""
    seen = scan(source, samples)
    absent = [path for path, reason in seen.unreadable if reason == NO_SUCH_FILE]
    hint = ""
    if isinstance(source, TableSource) and len(absent) > len(samples) / 2:
        hint = (
            f" (`{absent[0]}` was looked for as `{source.root / absent[0]}`: a table's paths start at its own folder,"
            " or are absolute)"
        )
    _refuse_too_many(source.name, seen.unreadable, len(samples), max_unreadable, hint)
    shown = listing([f"{path} ({reason})" for path, reason in seen.unreadable])
    rows = [(sample, sha1) for sample, sha1 in zip(samples, seen.sha1s) if sha1 is not None]
    if not rows:
        raise BadImagesError(f"No image of `{source.name}` can be read: {shown}.", seen.unreadable)
    place = {info.label: number for number, info in enumerate(classes)}
    if seen.unreadable:
        notes = [*notes, f"Left out {counted(len(seen.unreadable), 'unreadable image')}: {shown}."]
    notes = [*notes, *depth_notes(_depths(source, [sample for sample, _ in rows]))]
    # The name stands on every table and page, so the mark of an incomplete task stands there too.
    mark = f" ({source.coverage[0]} / {source.coverage[1]} images)" if source.coverage else ""
    return Dataset(
        name=source.name + mark,
        classes=classes,
        paths=[sample.path for sample, _ in rows],
        labels=np.array([place[sample.label] for sample, _ in rows], dtype=np.int64),
        splits=np.array([sample.split or "" for sample, _ in rows], dtype="<U6"),
        groups=[sample.group for sample, _ in rows],
        sha1s=[sha1 for _, sha1 in rows],
        source=source,
        unreadable=seen.unreadable,
        max_unreadable=max_unreadable,
        notes=notes,
        metric=source.metric,
        templates=source.templates,
        ensemble=source.ensemble,
        crop_size=source.crop_size,
        coverage=source.coverage,
    )


def _depths(source: Source, samples: Sequence[Sample]) -> list[Depth]:
    """Look at some of the images that may have more than 8 bits, evenly over all."""
    likely = [sample for sample in samples if Path(sample.path).suffix.lower() in DEEP_SUFFIXES]
    found = []
    for index in np.unique(np.linspace(0, len(likely) - 1, min(len(likely), MAX_DEPTHS), dtype=int)):
        with contextlib.suppress(OSError):
            if (one := depth(source.read(likely[index]))) is not None:
                found.append(one)
    return found


def _refuse_too_many(
    name: str, unreadable: list[tuple[str, str]], num_images: int, max_unreadable: int | None, hint: str = ""
) -> None:
    limit = max(3, num_images // 100) if max_unreadable is None else max_unreadable
    if len(unreadable) > limit:
        shown = listing([f"{path} ({reason})" for path, reason in unreadable])
        raise BadImagesError(
            f"{len(unreadable)} of {num_images} images of `{name}` cannot be read, more than the {limit} that are"
            f" tolerated: {shown}{hint}; mend or remove them, or raise data.max_unreadable.",
            unreadable,
        )


def _official_or_carved(labels: list[str], dataset: Dataset, split_seed: int) -> tuple[np.ndarray, list[str]]:
    """Use the official splits; carve the ones that are missing from train."""
    splits, notes = dataset.splits.copy(), []
    official = set(splits.tolist()) - {""}
    if not official:
        notes.append("No splits came with the data: of each class 25 % are test and 10 % of the rest val.")
        return carve(labels, dataset.sha1s, dataset.groups, split_seed), notes
    if "train" not in official:
        raise DataError(f"`{dataset.name}` has the splits {', '.join(sorted(official))}, but nothing to train on.")
    if "val" in official:
        lacking = set(np.array(labels)[splits == "train"]) - set(np.array(labels)[splits == "val"])
        if lacking:
            splits[splits == "val"] = "train"
            official.discard("val")
            notes.append(f"The val split lacks {_classes(sorted(lacking))}, so it joins train and val is carved anew.")
    carved = [name for name in ("test", "val") if name not in official]
    if carved:
        train = np.flatnonzero(splits == "train")
        part = carve(
            [labels[index] for index in train],
            [dataset.sha1s[index] for index in train],
            [dataset.groups[index] for index in train],
            split_seed,
            test="test" in carved,
            val="val" in carved,
        )
        splits[train] = part
        shares = {"test": "25 % of each class", "val": "10 % of each class"}
        notes.append(f"Carved from train: {', '.join(f'{name} ({shares[name]})' for name in carved)}.")
    return splits, notes


def _require_trainable(labels: list[str], splits: np.ndarray, classes: list[ClassInfo]) -> None:
    trained = Counter(labels[index] for index in np.flatnonzero(splits == "train"))
    if untrained := [info.label for info in classes if not trained[info.label]]:
        raise DataError(
            f"The train split has no image of {_classes(untrained)}, which another split has; add some, or leave them"
            " out with --only-classes."
        )
