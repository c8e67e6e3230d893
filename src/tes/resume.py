"""What a run that goes on must have in common with its beginning: settings, images, weights, texts, arithmetic."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tes import console
from tes.config import Config, load_config
from tes.errors import ConfigError, RunError, TesError, listing
from tes.files import read_json, write_json

MACHINE = ("device", "precision", "memory_format")
"""Decided once for the machine, and kept where the user leaves them open."""
WITHOUT_EFFECT = frozenset(
    {"out", "num_workers", "checkpoint", "data.source", "data.root", "data.partial", "backbone.checkpoint"}
)
"""Settings under which a run may go on whatever they say: they change no result, or the content is compared."""


def as_begun(config: Config, folder: Path) -> Config:
    """Return the settings with what was decided for the machine when the run in `folder` was begun.

    Raises:
        RunError: The recorded settings are damaged.
    """
    recorded = recorded_settings(folder)
    return config.replace({key: recorded.value(key) for key in MACHINE if config.value(key) == "auto"})


def refuse_other(config: Config, folder: Path, *, settled: bool = True) -> None:
    """Refuse to go on with other settings than those a run was begun with.

    Args:
        config: Of now.
        folder: The run's.
        settled: Whether gaps have been decided; else what is open agrees with anything.

    Raises:
        RunError: The settings differ, or the recorded ones are damaged.
    """
    there, here = (settings.model_dump(mode="json") for settings in (recorded_settings(folder), config))
    found = differences(there, here)
    if found.get("image.fit") == (None, "crop"):  # begun before there was a choice
        del found["image.fit"]
    if not settled:
        found = {key: pair for key, pair in found.items() if not _is_open(key, pair[1])}
    found = {key: pair for key, pair in found.items() if not {key, key.partition(".")[0]} & WITHOUT_EFFECT}
    if found:
        raise RunError(
            f"The run in `{folder}` was begun with other settings ({listing(lines(found))}); repeat those to go on with"
            " it, or choose another --out."
        )


def _is_open(key: str, value: Any) -> bool:
    if key.startswith("data."):  # nothing here is decided: None is all of it
        return False
    return value in (None, "auto") or key in ("optim.num_epochs", "optim.num_steps")


def recorded_settings(folder: Path) -> Config:
    """Return the settings of a run, finished or begun.

    Raises:
        RunError: They cannot be read.
    """
    try:
        return load_config(folder / "config.yaml")
    except ConfigError as problem:
        raise RunError(f"The settings of the run in `{folder}` cannot be read: {problem}") from None


def differences(there: Any, here: Any, default: Any = None, key: str = "") -> dict[str, tuple[Any, Any]]:
    """Return dotted key to (value there, value here) where two trees of plain values differ.

    Args:
        there: As recorded, maybe before some settings existed.
        here: As of now.
        default: The tree of defaults, for what is not recorded.
        key: Under which the trees stand.
    """
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        default = default if isinstance(default, Mapping) else {}
        found: dict[str, tuple[Any, Any]] = {}
        for name in dict.fromkeys([*there, *here]):
            standard = default.get(name)
            below = f"{key}.{name}" if key else name
            found |= differences(there.get(name, standard), here.get(name, standard), standard, below)
        return found
    same = there == here or (isinstance(here, (list, tuple)) and list(here) == there)
    return {} if same else {key: (there, here)}


def lines(differing: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Return "key: value there, value here" for each difference."""
    return [f"{key}: {there} there, {here} here" for key, (there, here) in differing.items()]


def begin(folder: Path, content: Mapping[str, Any]) -> None:
    """Record what the run is made from, by hash: `images`, `weights`, `texts`; and the `protocol`."""
    (folder / "state").mkdir(exist_ok=True)
    write_json(folder / "state" / "begun.json", dict(content))


def refuse_other_content(folder: Path, content: Mapping[str, Any]) -> None:
    """Refuse to go on with other images, weights or texts, or under another protocol.

    Raises:
        RunError: They differ.
    """
    path = folder / "state" / "begun.json"
    if not path.is_file():
        return  # it ended before any of this was used
    recorded = read_json(path, RunError)
    recorded = recorded if isinstance(recorded, dict) else {}
    if other := [name for name, value in content.items() if recorded.get(name) != value]:
        raise RunError(
            f"The run in `{folder}` was begun with other {listing(other)} than now; bring those back to go"
            " on with it, or choose another --out."
        )


@contextlib.contextmanager
def threads_of(folder: Path) -> Iterator[None]:
    """Within this block compute with as many threads as the run in `folder` was begun with: sums depend on it."""
    recorded: Any = {}
    with contextlib.suppress(TesError):
        recorded = read_json(folder / "env.json", RunError)
    before = wanted = torch.get_num_threads()
    match recorded:
        case {"num_threads": int(number)} if 1 <= number <= 1024:
            wanted = number
        case _:
            console.warn(f"`{folder / 'env.json'}` does not say how many threads were used; last digits may differ")
    match recorded:
        case {"packages": {"torch": str(version)}} if version != torch.__version__.partition("+")[0]:
            console.warn(f"begun with PyTorch {version}; with {torch.__version__} last digits may differ")
    torch.set_num_threads(wanted)
    if torch.get_num_threads() != wanted:
        console.warn(f"begun with {wanted} threads, which cannot be had here; last digits may differ")
    try:
        yield
    finally:
        torch.set_num_threads(before)
