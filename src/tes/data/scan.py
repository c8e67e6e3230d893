"""One look at every image before anything is computed: its SHA-1, and whether it can be decoded."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tes import console
from tes.data.images import UnreadableImageError, decode
from tes.data.source import Sample, Source
from tes.files import cache_dir, sha256_text, write_atomic

NO_SUCH_FILE = "no such file"
_NUM_THREADS = min(8, (os.cpu_count() or 1) + 2)
_DRAFT_SIDE = 64  # a JPEG's whole stream is still read; only its last steps are cut short


@dataclass(frozen=True)
class Scan:
    """What was seen: `sha1s` in the order of the samples, None where the image cannot be read, and (path, reason)."""

    sha1s: list[str | None]
    unreadable: list[tuple[str, str]]


def scan(source: Source, samples: Sequence[Sample]) -> Scan:
    """Read and decode images of a source; a file that has not changed since the last time is not read again."""
    memory = _Memory(source)
    stamps = [_stamp(source, sample) for sample in samples]
    sha1s = [memory.recall(sample, stamp) for sample, stamp in zip(samples, stamps)]
    unreadable: list[tuple[str, str]] = []
    new = [index for index, sha1 in enumerate(sha1s) if sha1 is None]
    if new:
        with (
            memory.kept(),
            reading_threads() as threads,
            console.progress(len(new), "reading images") as progress,
        ):
            for index, (sha1, reason) in zip(new, threads.map(lambda index: _look(source, samples[index]), new)):
                if sha1 is None:
                    unreadable.append((samples[index].path, reason))
                else:
                    sha1s[index] = sha1
                    memory.remember(samples[index], stamps[index], sha1)
                progress.advance()
    return Scan(sha1s, unreadable)


def _look(source: Source, sample: Sample) -> tuple[str | None, str]:
    """Return the content's SHA-1, or None and the reason why the image cannot be used."""
    try:
        content = source.read(sample)
        decode(content, max_side_hint=_DRAFT_SIDE)
    except UnreadableImageError as problem:
        return None, problem.reason
    except FileNotFoundError:
        return None, NO_SUCH_FILE
    except (OSError, ValueError) as problem:  # ValueError: a path with a zero byte
        return None, str(getattr(problem, "strerror", None) or problem).lower()
    return hashlib.sha1(content).hexdigest(), ""


def _stamp(source: Source, sample: Sample) -> list[int] | None:
    file = source.locate(sample)
    try:
        status = file.stat() if file is not None else None
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns] if status is not None else None


@contextlib.contextmanager
def reading_threads() -> Iterator[ThreadPoolExecutor]:
    """Yield threads for work on many images; an interruption lets go of what has not begun."""
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        try:
            yield threads
        except BaseException:
            # Ctrl-C need not wait until every image that is queued has been read.
            threads.shutdown(wait=False, cancel_futures=True)
            raise


class _Memory:
    """The SHA-1 of readable images by path, size and time, in one file per data root.

    Images that could not be read are not in it: a decoder may have been installed since.
    """

    def __init__(self, source: Source) -> None:
        self.path = source.root and cache_dir() / "scan" / f"{sha256_text('format 1', source.root.resolve())}.json"
        self.known: dict[str, list] = {}
        if self.path is not None:
            with contextlib.suppress(OSError, ValueError):  # absent or damaged: everything is looked at again
                known = json.loads(self.path.read_text(encoding="utf-8"))
                self.known = known if isinstance(known, dict) else {}

    def recall(self, sample: Sample, stamp: list[int] | None) -> str | None:
        match self.known.get(sample.path):
            case [int(size), int(time), str(sha1)] if [size, time] == stamp:
                return sha1
        return None

    def remember(self, sample: Sample, stamp: list[int] | None, sha1: str) -> None:
        if stamp is not None:
            self.known[sample.path] = [*stamp, sha1]

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Write what is known at the end of the block, also where it was interrupted."""
        try:
            yield
        finally:
            if self.path is not None:
                try:
                    write_atomic(self.path, json.dumps(self.known))
                except OSError as problem:
                    console.warn(
                        f"The scan cannot be kept in `{self.path.parent}` ({problem}), so it is done each time."
                    )
