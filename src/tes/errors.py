"""What a user sees when their input or environment is at fault: one sentence, exit code 2.

Every message says what is wrong, where, and how to mend it. `assert` is for our own invariants, never for input.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class TesError(ValueError):
    """The user's input or environment is at fault (exit code 2). The message is one clear sentence."""


class ConfigError(TesError):
    """A configuration key is unknown, or a value is out of range."""


class DataError(TesError):
    """The images, labels or splits cannot be used."""


class TextError(TesError):
    """The class names' text, or the encoder that embeds it, cannot be used."""


class ModelError(TesError):
    """The backbone or its checkpoint cannot be used."""


class RunError(TesError):
    """A run folder is absent, incomplete, damaged or in the way."""


class TrainingError(TesError):
    """Training cannot go on, for example because the loss is no longer finite."""


class Interrupted(KeyboardInterrupt):
    """A run was interrupted and can go on (exit code 75); the only argument is its folder."""


class MissingExtraError(TesError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


def one_line(problem: BaseException, limit: int | None = None) -> str:
    """Return what an error says as one line, at most `limit` characters; its kind, where it says nothing."""
    return " ".join(str(problem).split())[:limit] or type(problem).__name__


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return " Did you mean `x`?" for the option closest to `word`, or "" where none is close."""
    by_lower = {option.lower(): option for option in options}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.65)
    return f" Did you mean `{by_lower[close[0]]}`?" if close else ""


def listing(items: Sequence[object], limit: int = 5) -> str:
    """Return "a, b, c" or "a, b, c, d, e and 7 more"."""
    shown = ", ".join(str(item) for item in items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"


def counted(number: int, noun: str) -> str:
    """Return "1 image" or "3 images"."""
    return f"{number} {noun}" + ("" if number == 1 else "s")
