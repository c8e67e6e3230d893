"""What can be chosen by name, and how to add to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tes.data.source import sources
from tes.errors import ConfigError, did_you_mean
from tes.objectives import objectives
from tes.registry import Registry
from tes.text.encoder import encoders

KINDS: dict[str, Registry] = {"objectives": objectives, "sources": sources, "encoders": encoders}


def available(kind: str) -> list[str]:
    """Return the names of `objectives`, `sources`, `encoders` or `backbones` (timm's, and `lite0`).

    Raises:
        ConfigError: There is no such kind.
    """
    if kind == "backbones":
        import timm

        return ["lite0", *timm.list_models()]
    return _registry(kind).names()


def register(kind: str, name: str) -> Callable[[Any], Any]:
    """Return a class decorator that adds an objective, a data source or a text encoder under `name`."""
    return _registry(kind).register(name)


def _registry(kind: str) -> Registry:
    if kind not in KINDS:
        kinds = [*KINDS, "backbones"]
        raise ConfigError(f"There is no kind `{kind}`.{did_you_mean(kind, kinds)} Known: {', '.join(kinds)}.")
    return KINDS[kind]
