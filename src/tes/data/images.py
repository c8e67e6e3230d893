"""Photos as they come, made upright RGB, or a short reason why that cannot be."""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tes.errors import DataError

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".dib", ".webp", ".tif", ".tiff"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".heic", ".heif"}
)
DEEP_SUFFIXES = frozenset({".png", ".tif", ".tiff", ".pgm", ".jp2"})
"""Of files that can hold more than 8 bits."""
MAX_ASPECT_RATIO = 100

# Named one by one: among Pillow's other formats are some that start programs (EPS), and nobody's photos are in them.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")

# Pillow warns of damaged EXIF blocks, and above 89 million pixels (it refuses above twice that; a phone's photo of 108
# million is no bomb). None of it helps a user who has thousands of photos.
warnings.filterwarnings("ignore", module=r"PIL\.")


class UnreadableImageError(DataError):
    """An image cannot be decoded; `reason` says why in a few words."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"The image cannot be read: {reason}.")
        self.reason = reason

    def __reduce__(self) -> tuple[type[UnreadableImageError], tuple[str]]:
        return type(self), (self.reason,)


def decode(content: bytes, max_side_hint: int | None = None) -> Image.Image:
    """Decode an image file: first frame, EXIF orientation applied, RGB, transparency on white.

    Args:
        content: The whole file.
        max_side_hint: Sides of this many pixels suffice. A JPEG is then decoded at 1/2, 1/4 or 1/8, whichever is
            the smallest not below the hint: much quicker, but other pixels than a full decode and a resize give.

    Raises:
        UnreadableImageError: It is no image, damaged, truncated, or of an absurd size.
    """
    try:
        with _open(content) as image:
            width, height = image.size
            if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                raise UnreadableImageError(f"{width} x {height} pixels is too narrow")
            if max_side_hint is not None:
                image.draft(None, (max_side_hint, max_side_hint))
            image.load()
            return upright_rgb(image)
    except UnreadableImageError:
        raise
    except Exception as problem:  # Pillow's decoders raise nearly anything on damaged files.
        raise UnreadableImageError(_reason(content, problem)) from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return an image turned as its EXIF says, in 8-bit RGB, transparency on white."""
    return _to_rgb(_upright(image))


def _open(content: bytes) -> Image.Image:
    if _is_heif(content):
        _enable_heif()
    return Image.open(io.BytesIO(content), formats=_formats())


def _formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _is_heif(content: bytes) -> bool:
    brands = content[8:32] if content[4:8] == b"ftyp" else b""
    return b"avif" not in brands and any(brand in brands for brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"))


def _is_avif(content: bytes) -> bool:
    return content[4:8] == b"ftyp" and b"avif" in content[8:32]


@functools.cache
def _enable_heif() -> None:
    try:
        import pillow_heif
    except ImportError:
        return
    pillow_heif.register_heif_opener()


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # A damaged EXIF block says nothing about the pixels.
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if _is_deep(image):
        image = _to_eight_bits(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _is_deep(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    # Pillow's own conversion clips at 255, which turns a 16-bit photo white.
    values = _values(image)
    white = _white(image, values)
    return Image.fromarray((values.clip(0.0, white) * (255.0 / white)).round().astype(np.uint8))


def _values(image: Image.Image) -> np.ndarray:
    return np.nan_to_num(np.asarray(image, dtype=np.float32), nan=0.0, posinf=0.0, neginf=0.0)


def _white(image: Image.Image, values: np.ndarray) -> float:
    """Return the value that becomes 255: what the format says, else the usual range that holds the brightest pixel."""
    if image.mode.startswith("I;16"):
        return 65535.0
    ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    largest = float(values.max(initial=0.0))
    return next((white for white in ranges if largest <= white), largest)


@dataclass(frozen=True)
class Depth:
    """The lowest and highest value of an image of more than 8 bits, and the value that becomes white."""

    lowest: float
    highest: float
    white: float


def depth(content: bytes) -> Depth | None:
    """Return what an image file of more than 8 bits holds; None for all others, and for what cannot be read."""
    try:
        with _open(content) as image:
            if not _is_deep(image):
                return None
            values = _values(image)
            return Depth(float(values.min()), float(values.max()), _white(image, values))
    except Exception:  # as in `decode`, which is what reports it
        return None


def depth_notes(found: Sequence[Depth]) -> list[str]:
    """Say where images of more than 8 bits, seen together, will not look to the network as they do to people."""
    if not found:
        return []
    notes, highest = [], max(one.highest for one in found)
    if max(one.white for one in found) == 65535 and highest < 65535 / 8:
        notes.append(
            f"Images of 16 bits: the brightest value of {len(found)} looked at is {highest:g} of 65535, nearly black to"
            " the network; if they hold 12 bits (up to 4095) or the like, scale them to the whole range first."
        )
    if min(one.lowest for one in found) < 0:
        notes.append("Images with negative values: these become black; shift them to 0 and above first.")
    if len(whites := sorted({one.white for one in found})) > 1:
        notes.append(
            f"Images of 32 bits: the value that becomes white differs from one to the next ({whites[0]:g} to"
            f" {whites[-1]:g}); save them as 8 or 16 bits on one scale first."
        )
    return notes


def _reason(content: bytes, problem: Exception) -> str:
    if not content:
        return "empty file"
    if isinstance(problem, Image.DecompressionBombError):
        return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6} million pixels"
    if isinstance(problem, UnidentifiedImageError):
        if _is_heif(content):
            return "a HEIC photo; install `pillow-heif` to read it"
        if _is_avif(content):
            return "an AVIF photo; install Pillow 11.3 or later to read it"
        if content.startswith(b"version https://git-lfs"):
            return "a Git LFS pointer in place of the image; run `git lfs pull`"
        return "not an image"
    if isinstance(problem, MemoryError):
        return "too large for this machine's memory"
    if "truncated" in str(problem).lower():
        return "truncated file"
    detail = " ".join(str(problem).split())[:80]
    return f"damaged image ({detail})" if detail else "damaged image"
