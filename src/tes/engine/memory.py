"""Images that are kept in memory: to decode one costs more than a small network's training step on it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

ROOM = 2 * 2**30
"""Bytes."""


class ImageMemory:
    """Decoded images, and images prepared for a network, until there is no more room.

    All trainings on one data set share it: no draw moves an image, so that its index and how it was made say which it
    is. Reading processes that are forked see what it holds by then; what they read themselves they do not add.
    """

    def __init__(self, room: int = ROOM) -> None:
        self.room = room
        self._kept: dict[tuple[Hashable, ...], tuple[Any, int]] = {}

    def __contains__(self, key: tuple[Hashable, ...]) -> bool:
        return key in self._kept

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing of it: a process that is not forked would be sent gigabytes."""
        return {"room": 0, "_kept": {}}

    def get(self, key: tuple[Hashable, ...]) -> Any | None:
        """Return what is kept under a key."""
        return self._kept.get(key, (None, 0))[0]

    def keep(self, key: tuple[Hashable, ...], image: Any, num_bytes: int) -> bool:
        """Keep an image if there is room for it; return whether it is kept."""
        if key not in self._kept:
            if num_bytes > self.room:
                return False
            self._kept[key] = image, num_bytes
            self.room -= num_bytes
        return True

    def forget_others(self, kind: str, keys: set[tuple[Hashable, ...]]) -> None:
        """Make room: let go of everything of one kind (what keys begin with) but `keys`."""
        for key in [key for key in self._kept if key[0] == kind and key not in keys]:
            self.room += self._kept.pop(key)[1]
