"""Parts that are found by name: objectives, data sources, text encoders.

A built-in part is one line here (`name -> "module:Attribute"`) and imported on first use, so that naming the choices
costs nothing. Other packages add theirs through an entry point of the group, a program through `register`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from tes.errors import ConfigError, did_you_mean, listing

T = TypeVar("T")


class Registry:
    """Names of one kind of part and how to load each.

    Args:
        kind: What the parts are, for messages ("objective").
        builtin: Name to "module:Attribute".
        entry_point_group: Where installed packages announce more of them.
    """

    def __init__(self, kind: str, builtin: Mapping[str, str], entry_point_group: str) -> None:
        self.kind = kind
        self._builtin = dict(builtin)
        self._group = entry_point_group
        self._registered: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a class decorator that makes the class known under `name`."""
        if name in self._registered or name in self._builtin:
            raise ConfigError(f"There is a {self.kind} called `{name}` already; choose another name.")

        def keep(part: T) -> T:
            self._registered[name] = part
            return part

        return keep

    def names(self) -> list[str]:
        """Return all known names, sorted."""
        return sorted({*self._builtin, *self._registered, *(entry.name for entry in self._entry_points())})

    def get(self, name: str) -> Any:
        """Return the part called `name`.

        Raises:
            ConfigError: There is none; the message lists the names and suggests the nearest.
        """
        if name in self._registered:
            return self._registered[name]
        if name in self._builtin:
            module, _, attribute = self._builtin[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        for entry in self._entry_points():
            if entry.name == name:
                return entry.load()
        names = self.names()
        raise ConfigError(
            f"There is no {self.kind} called `{name}`.{did_you_mean(name, names)} Known: {listing(names, limit=20)}."
        )

    def _entry_points(self) -> list[importlib.metadata.EntryPoint]:
        return list(importlib.metadata.entry_points(group=self._group))
