"""Files fetched on request: resumed where they broke off, verified, whole or not at all; archives that cannot escape.

Nothing here is called unless the user asks for it (`tes download`).
"""

from __future__ import annotations

import http.client
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from tes import console
from tes.data.task import Download
from tes.errors import DataError, one_line
from tes.files import md5_file

BLOCK = 2**20
PATIENCE_SECONDS = 30.0  # without one byte
LARGEST_RATIO = 20
"""An archive that unpacks to more than so many times its size is refused: photographs hardly compress."""
SMALLEST_LIMIT = 2**30
"""No archive that unpacks to less than this is refused for its ratio."""
_MEBI = 2**20
_CUT = (http.client.IncompleteRead, http.client.HTTPException, ConnectionError, TimeoutError)
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


def fetch(download: Download, folder: Path, alternatives: str) -> Path:
    """Return the verified file in `folder`, fetching what is missing of it.

    A file of that name that the user has put there is verified and used. What was fetched before a break lies in
    `NAME.part` and is continued.

    Args:
        download: What.
        folder: Where to.
        alternatives: What else the user can do, as the end of a sentence.

    Raises:
        DataError: Dead link, no network, no room, or a file that is not the one that was published.
    """
    target = folder / download.name
    if target.is_file():
        if download.md5 in (None, md5_file(target)):
            return target
        raise DataError(
            f"`{target}` is not the published file (its MD5 is not {download.md5}); remove it and run this again, or"
            f" {alternatives}."
        )
    part = target.with_name(f"{target.name}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _continue(download, part)
        if download.md5 not in (None, md5_file(part)):
            part.unlink()
            raise DataError(
                f"{download.url} is not the published file any more (its MD5 is not {download.md5}); it was not kept:"
                f" {alternatives}."
            )
        part.replace(target)
    except DataError:
        raise
    except urllib.error.HTTPError as problem:
        raise DataError(f"{download.url} answers with status {problem.code}: {alternatives}.") from None
    except (urllib.error.URLError, *_CUT) as problem:
        reason = " ".join(str(getattr(problem, "reason", problem)).split()) or type(problem).__name__
        kept = f"; the {part.stat().st_size / _MEBI:.0f} MiB so far are kept" if part.exists() else ""
        raise DataError(
            f"Fetching {download.url} broke off ({reason}){kept}: run this again, or {alternatives}."
        ) from None
    except OSError as problem:
        raise DataError(
            f"`{part}` cannot be written ({problem.strerror or problem}); make room or choose another --data-root, and"
            " run this again."
        ) from None
    return target


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive into `folder`, which gets all of it or nothing.

    Raises:
        DataError: It is damaged, would write outside the folder, or is far larger than a data set's archive can be.
    """
    limit = max(SMALLEST_LIMIT, LARGEST_RATIO * archive.stat().st_size)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder))
    try:
        with console.progress(archive.stat().st_size // _MEBI, f"unpacking {archive.name}", "MiB") as progress:
            size = shown = 0
            for member_size in _extract(archive, temporary):
                size += member_size
                if size > limit:
                    raise DataError(f"`{archive}` unpacks to more than {limit // _MEBI} MiB and was stopped.")
                progress.advance(min(size, archive.stat().st_size) // _MEBI - shown)
                shown = min(size, archive.stat().st_size) // _MEBI
        for entry in sorted(temporary.iterdir()):
            _move_into(entry, folder / entry.name)
    except _DAMAGED as problem:
        reason = one_line(problem, 200)
        raise DataError(f"`{archive}` is damaged or not safe to unpack: {reason}.") from None
    except OSError as problem:
        raise DataError(f"`{archive}` cannot be unpacked into `{folder}`: {problem.strerror or problem}.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _continue(download: Download, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(download.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=PATIENCE_SECONDS)
    except urllib.error.HTTPError as problem:
        if problem.code == 416 and have:  # nothing is left to fetch: the MD5 will tell
            return
        raise
    with answer:
        if have and answer.status != 206:  # the server does not know ranges: from the beginning
            have = 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length and length.isdigit() else None
        if total is not None and total - have > (free := shutil.disk_usage(part.parent).free):
            raise DataError(
                f"{download.name} needs {(total - have) // _MEBI} MiB and `{part.parent}` has {free // _MEBI} MiB left;"
                " make room or choose another --data-root."
            )
        label = f"fetching {download.name}"
        with (
            part.open("ab" if have else "wb") as out,
            console.progress((total or 0) // _MEBI, label, "MiB") as progress,
        ):
            progress.advance(have // _MEBI)
            done = have
            while block := answer.read(BLOCK):
                out.write(block)
                progress.advance((done + len(block)) // _MEBI - done // _MEBI)
                done += len(block)
        if total is not None and done < total:
            raise http.client.IncompleteRead(b"", total - done)


def _extract(archive: Path, folder: Path) -> Iterator[int]:
    """Unpack member by member, and yield each one's size before it is written."""
    if archive.name.endswith(".zip"):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                place = PurePosixPath(info.filename.replace("\\", "/"))
                if place.is_absolute() or ".." in place.parts or ":" in place.parts[:1]:
                    raise RuntimeError(f"the member {info.filename!r} lies outside the archive's own folder")
                yield info.file_size
                zipped.extract(info, folder)
        return
    with tarfile.open(archive) as packed:
        for member in packed:
            yield member.size
            packed.extract(member, folder, filter="data")  # PEP 706: nothing outside, no devices, no owners


def _move_into(source: Path, target: Path) -> None:
    if source.is_dir() and target.is_dir():  # a folder that another archive of the data set has begun
        for entry in sorted(source.iterdir()):
            _move_into(entry, target / entry.name)
    else:
        source.replace(target)
