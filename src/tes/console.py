"""What a person reads while the program works: notes, warnings, progress. All of it goes to stderr.

stdout carries results alone (tables, CSV, JSON), so that `tes evaluate RUN --json | jq` works.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol

SECONDS_BETWEEN_LINES = 10.0


def note(text: str) -> None:
    """Tell the user something worth knowing."""
    if not _quiet:
        _say(text)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep notes to oneself, for jobs that run many jobs; progress is still shown, and each warning once."""
    _quiet.append(set())
    try:
        yield
    finally:
        _quiet.pop()


_quiet: list[set[str]] = []
"""The warnings shown so far, for each quiet block that is open."""


def warn(text: str) -> None:
    """Tell the user something that may need their attention."""
    if _quiet:
        if text in _quiet[-1]:
            return
        _quiet[-1].add(text)
    _say(f"warning: {text}")


class Progress(Protocol):
    """A piece of work under way."""

    def advance(self, amount: int = 1, **figures: Any) -> None:
        """Count `amount` more units as done, and show `figures` beside the bar."""


@contextlib.contextmanager
def progress(total: int, label: str, unit: str = "images") -> Iterator[Progress]:
    """Show a bar with rate and time left on a terminal, else a line now and then; quick work shows nothing."""
    if _under_way:  # within another piece of work: that one's bar stays the only one
        yield _Silent()
        return
    shown: _Bar | _Lines = _Bar(total, label, unit) if sys.stderr.isatty() else _Lines(total, label, unit)
    _under_way.append(label)
    try:
        yield shown
    finally:
        _under_way.clear()
        shown.close()


_under_way: list[str] = []


class _Silent:
    def advance(self, amount: int = 1, **figures: Any) -> None:
        pass


class _Lines:
    def __init__(self, total: int, label: str, unit: str) -> None:
        self.total, self.label, self.unit, self.done = total, label, unit, 0
        self.start = self.last = time.monotonic()

    def advance(self, amount: int = 1, **figures: Any) -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.last >= SECONDS_BETWEEN_LINES:
            self.last = now
            rate = self.done / (now - self.start)
            left = _duration((self.total - self.done) / rate) if rate else "?"
            values = "".join(f", {name} {value:.4g}" for name, value in figures.items())
            _say(f"{self.label}: {self.done}/{self.total} {self.unit}, {_pace(rate)}, {left} left{values}")

    def close(self) -> None:
        seconds = time.monotonic() - self.start
        if seconds >= 2 and self.done:
            _say(f"{self.label}: {self.done} {self.unit} in {_duration(seconds)} ({_pace(self.done / seconds)})")


class _Bar:
    def __init__(self, total: int, label: str, unit: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self.unit = unit
        self.start = time.monotonic()
        self.done = 0
        self.bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self.bar.start()
        self.task = self.bar.add_task(label, total=total, rate="", figures="")

    def advance(self, amount: int = 1, **figures: Any) -> None:
        self.done += amount
        rate = f"{self.unit}, {_pace(self.done / max(time.monotonic() - self.start, 1e-9))}"
        values = " ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.bar.update(self.task, advance=amount, rate=rate, **({"figures": values} if figures else {}))

    def close(self) -> None:
        self.bar.stop()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _pace(rate: float) -> str:
    """Return units per second, or how long each takes where that is longer than some seconds."""
    if 0 < rate < 0.2:
        return f"{_duration(1 / rate)} each"
    return f"{rate:,.0f}/s" if rate >= 100 else f"{rate:.3g}/s"
