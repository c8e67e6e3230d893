"""Class folders: `DIR/<class>/*`, or `DIR/{train,val,test}/<class>/*` where DIR holds nothing but split folders."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tes.data.images import SUFFIXES
from tes.data.source import SPLIT_WORDS, LocalSource, Sample, no_such_path
from tes.errors import DataError, counted, listing
from tes.files import user_path

_LIKE_A_SPLIT = re.compile(
    r"(.*[ _.-])?(train|training|val|valid|validation|eval|dev|test|testing)([ _.-]?(set|data|images?|split))?", re.I
)
# What operating systems leave behind; names with a leading dot are skipped as well.
_CLUTTER = {"thumbs.db", "desktop.ini", "__macosx", "@eadir"}


class FolderSource(LocalSource):
    """Images in a folder per class. Folders inside a class folder belong to the class; links are followed.

    Args:
        ref: The folder.

    Raises:
        DataError: There is no such folder, it has no class folders, or one of them holds no image.
    """

    def __init__(self, ref: str | Path) -> None:
        root = user_path(ref)
        if not root.is_dir():
            raise no_such_path(root, "folder")
        super().__init__(root, name=root.resolve().name)
        self.notes: list[str] = []
        self._not_images: Counter[str] = Counter()
        self._num_loops = 0
        folders, files = self._folders_and_files(root)
        if not folders:
            raise DataError(_no_class_folders(root, files))
        splits = self._splits(folders)
        if splits is None:
            self._refuse_disguised(folders)
        samples: list[Sample] = []
        stray = [file for file in files if _is_image(file)]
        if splits is None:
            for folder in folders:
                samples += self._class_samples(folder, None)
        else:
            for folder, split in zip(folders, splits):
                class_folders, files = self._folders_and_files(folder)
                stray += [file for file in files if _is_image(file)]
                if not class_folders:
                    raise DataError(_no_class_folders(folder, files))
                for class_folder in class_folders:
                    samples += self._class_samples(class_folder, split)
        self.samples = sorted(samples, key=lambda sample: sample.path)
        if splits is None and all(sample.path.count("/") > 1 for sample in samples):
            self.notes.append(
                f"Every image lies a folder deeper than its class, as `{samples[0].path}` of `{samples[0].label}`; if"
                " the inner folders are the classes, move them up, or list the images in a CSV."
            )
        self._describe_what_was_ignored(stray)

    def _folders_and_files(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """Return what is in a folder of class folders, without links that lead back to it or to what it lies in."""
        folders, files = _entries(folder)
        onward = [below for below in folders if not folder.resolve().is_relative_to(below.resolve())]
        self._num_loops += len(folders) - len(onward)
        return onward, files

    def _splits(self, folders: list[Path]) -> list[str] | None:
        """Return each folder's split, or None where they are class folders."""
        splits = [SPLIT_WORDS.get(folder.name.lower()) for folder in folders]
        if None in splits:
            if "train" in splits and len(set(splits)) > 2:
                others = [folder.name for folder, split in zip(folders, splits) if split is None]
                self.notes.append(
                    f"Took every folder in `{self.root}` for a class, `train` too, because of: {listing(others)}."
                )
            return None
        for split in set(splits):
            names = [folder.name for folder, other in zip(folders, splits) if other == split]
            if len(names) > 1:
                raise DataError(
                    f"`{self.root}` has {len(names)} folders for the {split} split, {listing(names)}; keep one of them."
                )
        if "train" not in splits:
            raise DataError(
                f"`{self.root}` has the split folders {listing([folder.name for folder in folders])} but no `train`; "
                "add it, or name the folder of class folders itself."
            )
        return splits

    def _refuse_disguised(self, folders: list[Path]) -> None:
        """Refuse folders that hold class folders themselves: taken for classes, they would train a senseless model."""
        if len(folders) > 1 and all(_LIKE_A_SPLIT.fullmatch(folder.name) for folder in folders):
            inner_names = [{_text(below.name) for below in _entries(folder)[0]} for folder in folders]
            if common := sorted(set.intersection(*inner_names)):
                raise DataError(
                    f"{listing([f'`{folder.name}`' for folder in folders])} of `{self.root}` look like splits, not like"
                    f" classes: each holds {listing(common, 3)}; call them `train`, `val` and `test` (val and test may"
                    " be missing)."
                )

    def _class_samples(self, folder: Path, split: str | None) -> list[Sample]:
        root = self.root.resolve()
        entered = {root, folder.parent.resolve(), folder.resolve()}
        before = self._not_images.copy()
        images = [file for file in self._walk(folder, entered, root) if self._keep(file)]
        if not images:
            others = self._not_images - before
            found = f" ({counted(others.total(), 'other file')}: {_suffixes(others)})" if others else ""
            raise DataError(f"The class folder `{folder}` holds no image{found}; add some, or remove the folder.")
        return [Sample(_text(file.relative_to(self.root)), _text(folder.name), split) for file in images]

    def _walk(self, folder: Path, entered: set[Path], root: Path) -> Iterator[Path]:
        folders, files = _entries(folder)
        yield from files
        for below in folders:
            target = below.resolve()
            # A folder is entered once per class, so that links in a circle end, and links to a common place cannot
            # multiply; the data's own folder and what it lies in would bring other classes' images in.
            if target in entered or root.is_relative_to(target):
                self._num_loops += 1
                continue
            entered.add(target)
            yield from self._walk(below, entered, root)

    def _keep(self, file: Path) -> bool:
        if _is_image(file):
            return True
        self._not_images[file.suffix.lower() or "no suffix"] += 1
        return False

    def _describe_what_was_ignored(self, stray: list[Path]) -> None:
        if self._not_images:
            files = counted(self._not_images.total(), "file")
            self.notes.append(f"Ignored {files} other than images ({_suffixes(self._not_images)}).")
        if stray:
            names = listing([file.name for file in stray], limit=3)
            self.notes.append(f"Ignored {counted(len(stray), 'image')} outside the class folders ({names}).")
        if self._num_loops:
            self.notes.append(f"Did not follow {counted(self._num_loops, 'link')} to a folder that is read already.")


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the folders and the files in a folder, links followed, clutter left out, each sorted by name."""
    try:
        found = sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as problem:
        raise DataError(f"The folder `{folder}` cannot be read: {problem.strerror or problem}.") from None
    paths = [path for path in found if not path.name.startswith(".") and path.name.lower() not in _CLUTTER]
    folders = [path for path in paths if path.is_dir()]
    # A link to nowhere is kept: an image that is missing is reported, not overlooked. Pipes and devices are not.
    files = [path for path in paths if path.is_file() or (path.is_symlink() and not path.exists())]
    return folders, files


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES


def _text(path: Path | str) -> str:
    # A name that is not UTF-8 cannot be written to any result; with the mark in it, the image is reported as missing.
    return os.fsencode(path).decode("utf-8", errors="replace").replace(os.sep, "/")


def _suffixes(counts: Counter[str]) -> str:
    return listing([suffix for suffix, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))])


def _no_class_folders(folder: Path, files: list[Path]) -> str:
    images = sum(map(_is_image, files))
    found = f"holds {counted(images, 'image')} but no class folders" if images else "has no class folders"
    return (
        f"`{folder}` {found}; put the images of each class in a folder of its own, as in `{folder}/<class>/photo.jpg`."
    )
