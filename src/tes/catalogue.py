"""What can be chosen by name, and how to add to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from tes.config import Config
from tes.data.source import sources
from tes.data.task import load_task, task_names
from tes.errors import ConfigError, did_you_mean
from tes.objectives import objectives
from tes.registry import Registry
from tes.text.encoder import encoders

KINDS: dict[str, Registry] = {"objectives": objectives, "sources": sources, "encoders": encoders}


def available(kind: str) -> list[str]:
    """Return the names of one kind, `backbones` being timm's and `lite0`, or all `settings`.

    Raises:
        ConfigError: There is no such kind.
    """
    if kind == "backbones":
        import timm

        return ["lite0", *timm.list_models()]
    if kind == "settings":
        return [*_settings(Config), *(line for name in objectives.names() for line in _objective_settings(name))]
    if kind == "tasks":
        return list(task_names())
    return _registry(kind).names()


def tasks() -> list[dict[str, Any]]:
    """Return what there is to choose from of tasks: `name`, `num_classes`, `metric`, `splits` (official sizes)."""
    return [
        {"name": task.name, "num_classes": task.num_classes, "metric": task.metric, "splits": dict(task.splits)}
        for task in map(load_task, task_names())
    ]


def register(kind: str, name: str) -> Callable[[Any], Any]:
    """Return a class decorator that adds a part under `name`, for this process alone.

    Args:
        kind: `objectives`, `sources` or `encoders`.
        name: As settings and flags call it.
    """
    return _registry(kind).register(name)


def _settings(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return "key = default  (what it is)" for every setting below a model."""
    lines = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            if name != "objective":
                lines += _settings(field.annotation, f"{prefix}{name}.")
            continue
        default = "(required)" if field.is_required() else field.get_default(call_default_factory=True)
        lines.append(f"{prefix}{name} = {default}" + (f"  ({field.description})" if field.description else ""))
    return lines


def _objective_settings(name: str) -> list[str]:
    config = objectives.get(name).Config
    own = [line for line in _settings(config) if not line.startswith(("name =", "preset ="))]
    others = [f"{key} = {value}  (its default where the objective is this)" for key, value in config.defaults.items()]
    return [f"{line}  [{name}]" for line in (*(f"objective.{line}" for line in own), *others)]


def _registry(kind: str) -> Registry:
    if kind not in KINDS:
        kinds = [*KINDS, "tasks", "backbones", "settings"]
        raise ConfigError(f"There is no kind `{kind}`.{did_you_mean(kind, kinds)} Known: {', '.join(kinds)}.")
    return KINDS[kind]
