"""Fixtures that several rooms use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test a cache of its own, so that no test sees what another, or the user, has cached."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("TES_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real photos and weights that lie beside the project on some machines."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the real photos in `../shared`, which are not on this machine")
    return SHARED


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
