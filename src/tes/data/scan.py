"""One look at every image before anything is computed: its SHA-1, and whether it can be decoded."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tes import console
from tes.data.images import UnreadableImageError, decode
from tes.data.source import Sample, Source
from tes.files import cache_dir, sha256_text, write_json

_NUM_THREADS = min(8, (os.cpu_count() or 1) + 2)
_DRAFT_SIDE = 64  # a JPEG's whole stream is still read, and its last steps are quicker


@dataclass(frozen=True)
class Scan:
    """What was seen: `sha1s` in the order of the samples, None where the image cannot be read, and the reasons."""

    sha1s: list[str | None]
    unreadable: list[tuple[str, str]]


def scan(source: Source, samples: Sequence[Sample]) -> Scan:
    """Read and decode images of a source; a file that has not changed since the last time is not read again."""
    memory = _Memory(source, samples)
    seen: list[tuple[str | None, str | None] | None] = [memory.recall(sample) for sample in samples]
    new = [index for index, entry in enumerate(seen) if entry is None]
    if new:
        with (
            ThreadPoolExecutor(_NUM_THREADS) as threads,
            console.progress(len(new), "reading images") as progress,
        ):
            entries = threads.map(lambda index: _look(source, samples[index]), new)
            for index, entry in zip(new, entries):
                seen[index] = entry
                memory.keep(samples[index], entry)
                progress.advance()
        memory.save()
    found = [entry for entry in seen if entry is not None]
    unreadable = [(sample.path, reason) for sample, (_, reason) in zip(samples, found) if reason is not None]
    return Scan([None if reason is not None else sha1 for sha1, reason in found], unreadable)


def _look(source: Source, sample: Sample) -> tuple[str | None, str | None]:
    """Return (SHA-1, reason); one of them is None."""
    try:
        content = source.read(sample)
        decode(content, max_side_hint=_DRAFT_SIDE)
    except UnreadableImageError as problem:
        return None, problem.reason
    except OSError as problem:
        return None, problem.strerror or str(problem)
    return hashlib.sha1(content).hexdigest(), None


class _Memory:
    """What was seen in earlier scans, by file, size and time. A file that could not be opened is looked at anew."""

    def __init__(self, source: Source, samples: Sequence[Sample]) -> None:
        self.source = source
        place = next((located for sample in samples if (located := source.locate(sample))), None)
        # One file per data set: its first image's folder stands for it.
        self.path: Path | None = (
            place and cache_dir() / "scan" / f"{sha256_text(source.name, place.parent.resolve())}.json"
        )
        self.known: dict[str, list[Any]] = {}
        try:
            if self.path is not None:
                stored = json.loads(self.path.read_text(encoding="utf-8"))
                self.known = {key: row for key, row in stored.items() if isinstance(row, list) and len(row) == 4}
        except (OSError, ValueError, AttributeError):
            pass  # absent or damaged: everything is looked at again

    def recall(self, sample: Sample) -> tuple[str | None, str | None] | None:
        key, stamp = self._stamp(sample)
        row = self.known.get(key)
        return (row[2], row[3]) if row and stamp is not None and row[:2] == stamp else None

    def keep(self, sample: Sample, entry: tuple[str | None, str | None]) -> None:
        key, stamp = self._stamp(sample)
        if stamp is not None:
            self.known[key] = [*stamp, *entry]

    def save(self) -> None:
        if self.path is None:
            return
        try:
            write_json(self.path, self.known)
        except OSError as problem:
            console.warn(f"the scan cannot be kept in `{self.path.parent}` ({problem.strerror}); it is done each time")

    def _stamp(self, sample: Sample) -> tuple[str, list[int] | None]:
        place = self.source.locate(sample)
        if place is None:
            return "", None
        try:
            status = place.stat()
        except OSError:
            return str(place), None
        return str(place.absolute()), [status.st_size, status.st_mtime_ns]
