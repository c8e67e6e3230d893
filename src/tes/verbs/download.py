"""Fetching a task's images: the publisher's own files, or the copy on the Hub; verified as a training would."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Literal

from tes import console
from tes.data.download import fetch, unpack
from tes.data.hub import fetch_shards
from tes.data.task import Task, data_root, load_task, task_names
from tes.data.task_source import find_folder, open_task
from tes.errors import DataError, did_you_mean, listing


def download(
    name: str, root: str | None = None, source: Literal["publisher", "hub"] | None = None, *, partial: bool = False
) -> Path:
    """Fetch a task's images into the data root, and open them as `tes train` would.

    Args:
        name: One of `tes list tasks`.
        root: The data root; None: `$TES_DATA`, else `data`.
        source: `publisher` or `hub`; None: the publisher where its files are known, else the Hub.
        partial: Accept a part of the task's official list.

    Returns:
        The folder that holds the images.

    Raises:
        DataError: There is no such task or source, a file cannot be fetched, or it is not what was published. What was
            fetched before is kept, and the same call goes on from there.
    """
    if name not in task_names():
        raise DataError(
            f"There is no task `{name}`.{did_you_mean(name, task_names())} Known: {listing(task_names(), 20)}."
        )
    task, below = load_task(name), data_root(root)
    if find_folder(task, root) is not None:
        console.note(f"`{name}` is in `{below}` already")
        return _opened(name, root, partial)
    if source is None:
        source = "publisher" if task.downloads else "hub"
    if source == "publisher" and not task.downloads:
        raise DataError(f"The publisher of {task.title} serves no files any more; leave --from out.")
    if source == "hub" and task.hub is None:
        raise DataError(f"No copy of {task.title} on the Hub is known; leave --from out.")
    console.note(f"{task.title}, {task.home}; licence: {task.licence}; please cite {task.citation}")
    if source == "publisher":
        _from_publisher(task, below)
    else:
        _from_hub(task, below)
    return _opened(name, root, partial)


def _from_publisher(task: Task, below: Path) -> None:
    other = f"try `tes download {task.name} --from hub`, or " if task.hub is not None else ""
    unpacked = []
    for part in task.downloads:
        into = below / part.into
        if not part.is_archive:
            fetch(part, into, _by_hand(task, into, other))
            continue
        archive = fetch(part, below, _by_hand(task, below, other))
        if part.inner is None:
            unpack(archive, into)
        else:
            with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=below) as outer:
                unpack(archive, Path(outer))
                unpack(Path(outer, part.inner), (into / part.inner).parent)
        unpacked.append(archive)
    for archive in unpacked:  # not before: if a later file cannot be fetched, the same call goes on from these
        archive.unlink()


def _by_hand(task: Task, folder: Path, other: str) -> str:
    return f"{other}get the file from {task.home} and put it into `{folder}`, where it is found"


def _from_hub(task: Task, below: Path) -> None:
    assert task.hub is not None, "the caller has looked"
    shards = fetch_shards(task.hub.name, task.hub.config)
    target = below / f"{task.name}-parquet"
    below.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".copying-", dir=below))
    try:
        for number, shard in enumerate(shards):
            file = temporary / shard.split / f"{number:04}.parquet"
            file.parent.mkdir(exist_ok=True)
            shutil.copyfile(shard.file, file)
        temporary.replace(target)
    except OSError as problem:
        raise DataError(f"`{target}` cannot be written: {problem.strerror or problem}.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _opened(name: str, root: str | None, partial: bool) -> Path:
    source = open_task(name, root, partial)
    assert source.root is not None, "a task's images lie in a folder"
    return source.root
