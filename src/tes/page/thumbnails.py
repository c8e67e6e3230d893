"""Small pictures inside the page: what the run has kept, or made from the photos where the user points to them."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tes.data.images import UnreadableImageError, decode
from tes.data.source import Sample, Source
from tes.run import SplitRow

SIDE = 96
_MAX_BYTES = 64_000
_SHA1 = re.compile(r"[0-9a-f]{40}")


class Thumbnails:
    """Pictures by the images' paths, as addresses that hold the picture itself (`data:`).

    Args:
        folder: Thumbnails that the run has kept, `<sha1>.jpg`.
        images: All images of the data set.
        photos: The photos themselves, or None. Only a file with the recorded content is shown.
    """

    def __init__(self, folder: Path, images: Sequence[SplitRow], photos: Source | None = None) -> None:
        self._by_path: Mapping[str, SplitRow] = {image.path: image for image in images}
        self._photos = photos
        self._folder = folder
        self._kept = {file.stem for file in folder.glob("*.jpg")} if folder.is_dir() else set()
        self._made: dict[str, str | None] = {}

    def __contains__(self, path: str) -> bool:
        return self.get(path) is not None

    def get(self, path: str) -> str | None:
        """Return a picture of the image, or None where there is none, or it is damaged."""
        if path not in self._made:
            self._made[path] = self._make(path)
        return self._made[path]

    def some_of(self, label: str, limit: int = 1) -> list[str]:
        """Return the paths of some images of a class that the run has kept pictures of."""
        found = [path for path, image in self._by_path.items() if image.label == label and image.sha1 in self._kept]
        return [path for path in found[: 2 * limit] if path in self][:limit]

    def kept(self) -> list[str]:
        """Return the paths of all images that the run has kept pictures of."""
        return [path for path, image in self._by_path.items() if image.sha1 in self._kept]

    def _make(self, path: str) -> str | None:
        image = self._by_path.get(path)
        if image is None or not _SHA1.fullmatch(image.sha1):
            return None
        jpeg = self._from_folder(image.sha1) if image.sha1 in self._kept else None
        if jpeg is None and self._photos is not None:
            jpeg = _shrunk(self._photos, image)
        return None if jpeg is None else f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"

    def _from_folder(self, sha1: str) -> bytes | None:
        try:
            content = (self._folder / f"{sha1}.jpg").read_bytes()
            decode(content)
        except (OSError, UnreadableImageError):
            return None
        return content if len(content) <= _MAX_BYTES and content.startswith(b"\xff\xd8") else None


def _shrunk(photos: Source, image: SplitRow) -> bytes | None:
    try:
        content = photos.read(Sample(image.path, image.label))
        if hashlib.sha1(content, usedforsecurity=False).hexdigest() != image.sha1:
            return None
        picture = decode(content, max_side_hint=2 * SIDE)
    except (OSError, UnreadableImageError, ValueError):
        return None
    picture.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=80)
    return out.getvalue()
