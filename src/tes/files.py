"""Files written whole or not at all, hashes, and where the caches live."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tes.errors import TesError

NPZ_DAMAGE = (
    OSError, ValueError, TypeError, EOFError, KeyError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error
)  # fmt: skip
"""What numpy raises on an .npz file that is absent, cut off or altered."""


def cache_dir() -> Path:
    """Return the folder of caches that may be deleted at any time: `$TES_CACHE`, else `~/.cache/tes`."""
    root = os.environ.get("TES_CACHE")
    return user_path(root) if root else Path.home() / ".cache" / "tes"


def user_path(ref: str | Path) -> Path:
    """Return a path as the user wrote it, with `~` as their home; `~name` stays as it is where nobody is called so."""
    try:
        return Path(ref).expanduser()
    except RuntimeError:
        return Path(ref)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which takes its place when the block ends without an error.

    A reader sees the old file or the new one, never half of one, even after a power loss.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


_LEFTOVER = re.compile(r"\.[\w-]+(\.\w+)?\.[a-z0-9_]{8}(\.\w+)?")


def is_leftover(path: Path) -> bool:
    """Whether this is what a process leaves that is killed while it writes a file: see `replacing`."""
    return _LEFTOVER.fullmatch(path.name) is not None


def remove_leftovers(folder: Path) -> None:
    """Remove all such files below a folder."""
    for path in [path for path in folder.rglob(".*") if is_leftover(path)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write `content` to `path` (text as UTF-8), whole or not at all."""
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table as CSV; None is an empty cell."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(columns)
    table.writerows(rows)
    return out.getvalue()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, error: Callable[[str], TesError]) -> Any:
    """Read JSON; a file that is absent or damaged raises `error` with a sentence."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"There is no file `{path}`.") from None
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"`{path}` cannot be read as JSON: {problem}.") from None


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Append one row to a JSON-lines file."""
    with Path(path).open("a", encoding="utf-8") as out:
        out.write(json.dumps(row, ensure_ascii=False) + "\n")


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with Path(path).open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def md5_file(path: Path) -> str:
    """Return the MD5 that publishers give of their files: it guards against mistakes, not against an attacker."""
    with Path(path).open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def sha256_text(*parts: object) -> str:
    """Return one SHA-256 over several parts; ("ab", "c") and ("a", "bc") differ."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    # Until then a power loss may undo the renaming. Not every system opens a folder.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    # mkstemp makes files readable by their owner alone; results should have the permissions that any new file gets.
    mask = os.umask(0)
    os.umask(mask)
    return mask
