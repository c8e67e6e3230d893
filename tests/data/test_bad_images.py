"""Everything that people have among their photos, each as a real file, and what becomes of it: read, or left out."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tes import data
from tes.config import DataConfig

NOISE = Image.fromarray(np.random.default_rng(5).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def sideways() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(NOISE, "JPEG", exif=exif)


def bomb() -> bytes:
    """A PNG of 20,000 x 20,000 pixels in 400 bytes or so."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(20_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def palette() -> bytes:
    image = NOISE.convert("P")
    return encoded(image, "PNG", transparency=bytes(range(256)))


def sixteen_bits() -> bytes:
    return encoded(Image.fromarray(np.linspace(0, 65535, 48 * 64).astype(np.uint16).reshape(48, 64)), "PNG")


def animated() -> bytes:
    frames = [Image.new("RGB", (32, 24), colour) for colour in ("red", "blue")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


GOOD: dict[str, tuple[str, Callable[[], bytes], tuple[int, int]]] = {
    "a wrong extension": ("photo.png", lambda: encoded(NOISE, "JPEG"), (64, 48)),
    "an extension in capitals": ("PHOTO.JPG", lambda: encoded(NOISE, "JPEG"), (64, 48)),
    "16 bits": ("deep.png", sixteen_bits, (64, 48)),
    "CMYK": ("print.jpg", lambda: encoded(NOISE.convert("CMYK"), "JPEG"), (64, 48)),
    "a palette with alpha": ("palette.png", palette, (64, 48)),
    "an animation": ("moving.gif", animated, (32, 24)),
    "turned by EXIF": ("sideways.jpg", sideways, (48, 64)),
    "a single pixel": ("dot.png", lambda: encoded(Image.new("RGB", (1, 1), "red"), "PNG"), (1, 1)),
    "a name with spaces": (" my photo (1) .jpg", lambda: encoded(NOISE, "JPEG"), (64, 48)),
    "a name with a newline": ("two\nlines.jpg", lambda: encoded(NOISE, "JPEG"), (64, 48)),
    "a name outside ASCII": ("größe 写真 🐈.jpg", lambda: encoded(NOISE, "JPEG"), (64, 48)),
    "a name like a flag": ("--json.jpg", lambda: encoded(NOISE, "JPEG"), (64, 48)),
}
BAD: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "truncated": ("cut.jpg", lambda: encoded(NOISE, "JPEG")[:-400], "truncated file"),
    "a truncated PNG": ("cut.png", lambda: encoded(NOISE, "PNG")[:-4000], "truncated file"),
    "zero bytes": ("empty.jpg", lambda: b"", "empty file"),
    "text": ("text.jpg", lambda: b"This is no photo.\n", "not an image"),
    "a web page": ("page.jpg", lambda: b"<!DOCTYPE html><title>403 Forbidden</title>", "not an image"),
    "a Git LFS pointer": ("lfs.jpg", lambda: b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    "20,000 x 10 pixels": ("long.png", lambda: encoded(Image.new("L", (20_000, 10)), "PNG"), "20000 x 10 pixels is"),
    "a decompression bomb": ("bomb.png", bomb, "more than 178 million pixels"),
    "PostScript, which would start a program": ("eps.jpg", lambda: encoded(NOISE, "EPS"), "not an image"),
}


@pytest.fixture
def root(photos) -> Path:
    return photos(cat=6, dog=6)


def opened(root: Path) -> data.Dataset:
    return data.open_dataset(DataConfig(source=str(root), max_unreadable=1))


@pytest.mark.parametrize("case", GOOD)
def test_odd_images_that_can_be_read_are_read(root, case):
    name, content, size = GOOD[case]
    (root / "cat" / name).write_bytes(content())
    dataset = opened(root)
    assert dataset.unreadable == [] and len(dataset.paths) == 13
    image = dataset.read_image(dataset.paths.index(f"cat/{name}"))
    assert (image.mode, image.size) == ("RGB", size)


@pytest.mark.parametrize("case", BAD)
def test_bad_images_are_left_out_with_the_reason(root, case):
    name, content, reason = BAD[case]
    (root / "cat" / name).write_bytes(content())
    dataset = opened(root)
    assert [path for path, _ in dataset.unreadable] == [f"cat/{name}"] and dataset.unreadable[0][1].startswith(reason)
    assert len(dataset.paths) == 12 and f"cat/{name}" not in dataset.paths


def test_links_in_a_circle_to_files_and_folders_end(root):
    (root / "cat" / "a.jpg").symlink_to("b.jpg")
    (root / "cat" / "b.jpg").symlink_to("a.jpg")
    (root / "cat" / "back").symlink_to("..")
    (root / "dog" / "self").symlink_to(".")
    dataset = data.open_dataset(DataConfig(source=str(root)))
    assert [path for path, _ in dataset.unreadable] == ["cat/a.jpg", "cat/b.jpg"]
    assert all("symbolic links" in reason for _, reason in dataset.unreadable) and len(dataset.paths) == 12
    assert any("Did not follow 2 links" in note for note in dataset.notes)


def test_a_link_to_nowhere_is_a_missing_image(root, tmp_path):
    (root / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert opened(root).unreadable == [("cat/gone.jpg", "no such file")]


@pytest.mark.parametrize("case", GOOD)
def test_odd_names_and_images_come_through_a_table_as_well(root, case, tmp_path):
    import csv

    name, content, _ = GOOD[case]
    (root / "cat" / name).write_bytes(content())
    rows = [(path.relative_to(tmp_path).as_posix(), path.parent.name) for path in sorted(root.rglob("*.*"))]
    with (tmp_path / "table.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    dataset = opened(tmp_path / "table.csv")
    assert dataset.unreadable == [] and set(dataset.paths) == {path for path, _ in rows}
