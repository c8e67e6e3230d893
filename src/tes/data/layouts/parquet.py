"""A task's copy on the Hugging Face Hub, as `tes download` leaves it: Parquet files, read as `hf:` reads them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from urllib.parse import urlencode

from tes.data.hub import HubSource
from tes.data.layouts.base import Listing
from tes.data.names import NameIndex
from tes.data.task import Task
from tes.errors import DataError, listing


class Unpacked:
    """Images by the paths that an `hf:` source gives them."""

    def __init__(self, source: HubSource) -> None:
        self.source = source
        self.samples = {sample.path: sample for sample in source.samples}

    def read(self, path: str) -> bytes:
        """Return the image as a file's content."""
        return self.source.read(self.samples[path])

    def locate(self, path: str) -> Path:
        """Return the file that holds it."""
        return self.source.locate(self.samples[path])


def parquet(folder: Path, task: Task) -> Listing:
    """Read the Parquet files in a folder; classes are known by their names, since copies need not keep the order.

    A copy whose official test split is called validation (Food-101's) has it called test.

    Raises:
        DataError: A class is not one of the task's.
    """
    assert task.hub is not None, "else there is no such place"
    source = HubSource(f"{folder}?{urlencode({'image': task.hub.image, 'label': task.hub.label})}")
    index = NameIndex({label: [name] for label, name in task.classes.items()})
    labels = {label: index.find(label) for label in {sample.label for sample in source.samples}}
    if unknown := sorted(label for label, found in labels.items() if len(found) != 1):
        raise DataError(f"`{folder}` has classes that `{task.name}` does not have: {listing(unknown)}; remove it.")
    splits = {sample.split for sample in source.samples}
    rename = {"val": "test"} if "val" in splits - task.splits.keys() and "test" not in splits else {}
    samples = [
        dataclasses.replace(sample, label=labels[sample.label][0], split=rename.get(sample.split, sample.split))
        for sample in source.samples
    ]
    return Listing(samples, Unpacked(source), has_official_paths=False)
