"""SIGINT and SIGTERM, put off until a step is done and saved."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """The first signal, in a block of `Deferred.at_once`."""


class Deferred:
    """Within this context a first SIGINT or SIGTERM only sets `asked`; a second one raises KeyboardInterrupt at once.

    Outside the main thread, where Python lets nobody handle signals, it changes nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self._at_once = False
        self._process = os.getpid()
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Deferred:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if self.asked and kind is None:  # it came too late to be noticed within
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within this block a first signal raises `Stopped`: for long work that can be left and done again."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if self._at_once:
            raise Stopped
        if os.getpid() == self._process:  # processes that read images have inherited this, and end with the training
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"\nstopping after this step ...\n")
