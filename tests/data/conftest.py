"""Small data sets of real photos; every photo has its own pixels unless a test gives two the same content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def photo(tmp_path: Path) -> Callable[..., Path]:
    """Return `photo(path, content=..., size=...)`: writes noise, the same for equal `content` (default: the path)."""

    def write(path: Path, content: str | None = None, size: tuple[int, int] = (24, 16)) -> Path:
        content = content or path.relative_to(tmp_path).as_posix()
        draw = np.random.default_rng(list(hashlib.sha1(content.encode()).digest()))
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
        return path

    return write


@pytest.fixture
def photos(photo: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Return `photos(name, cat=3, dog=2)`: makes `tmp_path/name/cat/000.jpg`, and so on; a class may be a path."""

    def make(name: str = "photos", /, **counts: int) -> Path:
        for label, count in counts.items():
            (tmp_path / name / label).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                photo(tmp_path / name / label / f"{number:03}.jpg")
        return tmp_path / name

    return make
