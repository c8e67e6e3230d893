"""The whole state of a training on disk, so that it goes on where it was, bit for bit, however it ended.

One file holds it: tensors as safetensors, all else as JSON in its header, so that the two cannot disagree and nothing
is unpickled. It takes its predecessor's place when it is whole. Every part of the training says what it is (`state`)
and takes it back (`load`). The place in the data is a number of steps: the order is a function of (seed, epoch), an
image's augmentation of (seed, epoch, index), a mixture of (seed, step).
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tes.config import CheckpointConfig
from tes.errors import RunError, one_line
from tes.files import replacing
from tes.interruption import Deferred, Stopped

FORMAT = 1
EPOCH_SECONDS = 60.0
"""An epoch's end saves where the last state is older than this, and ..."""
MAX_SHARE = 0.02
"""... where saving then takes at most this share of the time."""
DAMAGE = (SafetensorError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError)
"""What comes of reading a state that is cut off, altered, or another training's."""


@dataclass(frozen=True)
class State:
    """What a part of a training is at one moment: tensors by name, and plain values that JSON can hold."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    values: Any = None


class Part(Protocol):
    """A part of a training that changes as it goes on."""

    def state(self) -> State:
        """Return all that the training's further course depends on."""

    def load(self, state: State) -> None:
        """Become what `state` says."""


class Checkpoint:
    """Where a training's state is kept, and how far the training is that is kept there.

    Args:
        path: The file; None: nothing is saved, and interruptions are not put off.
        config: How often; None: the default.
        on_save: Called after each save with the number of steps, the seconds that saving took, and the file's bytes.

    Attributes:
        step: Steps that the saved training has taken; 0 where there is none.
        is_finished: Whether these were all; then only the final weights are kept.
        parts: What is saved, by name; loaded by `begin`.
        steps_per_epoch: At whose multiples an epoch ends.

    Raises:
        RunError: There is a file, and it is damaged.
    """

    def __init__(
        self,
        path: Path | None = None,
        config: CheckpointConfig | None = None,
        on_save: Callable[[int, float, int], None] = lambda step, seconds, num_bytes: None,
    ) -> None:
        self.path, self.on_save = path, on_save
        minutes = (config or CheckpointConfig()).every_minutes
        self.every_seconds = float("inf") if minutes is None else 60 * minutes
        self.step, self.is_finished = 0, False
        self.parts: dict[str, Part] = {}
        self.steps_per_epoch = 1
        self._saved_at, self._cost = time.monotonic(), 0.0
        self._signals: Deferred | None = None
        if path is not None and path.is_file():
            with self._reading() as (header, _):
                self.step, self.is_finished = int(header["step"]), bool(header["finished"])

    def begin(self, parts: Mapping[str, Part]) -> int:
        """Add what else is saved, take up the saved training if there is one; return the steps that it has taken."""
        self.parts |= parts
        if self.step:
            with self._reading() as (header, file):
                names = sorted(file.keys())
                if names != header["tensors"]:
                    raise ValueError("tensors are missing")
                for part_name, part in self.parts.items():
                    own = [name for name in names if name.startswith(f"{part_name}:")]
                    tensors = {name.removeprefix(f"{part_name}:"): file.get_tensor(name) for name in own}
                    part.load(State(tensors, header["parts"][part_name]))
        self._saved_at = time.monotonic()
        return self.step

    @contextlib.contextmanager
    def on_guard(self) -> Iterator[None]:
        """Within this block SIGINT and SIGTERM wait for the next `after`."""
        if self.path is None:
            yield
            return
        try:
            with Deferred() as self._signals:
                yield
        finally:
            self._signals = None

    def after(self, step: int) -> None:
        """Save what there is after a step, if it is time.

        Raises:
            KeyboardInterrupt: The program was asked to stop; the state is saved.
            RunError: It cannot be saved; the last one is as it was.
        """
        if self.path is None:
            return
        age = time.monotonic() - self._saved_at
        epoch_seconds = max(min(EPOCH_SECONDS, self.every_seconds), self._cost / MAX_SHARE)
        is_asked = self._signals is not None and self._signals.asked
        ends_epoch = step % self.steps_per_epoch == 0 and self.every_seconds < float("inf")
        if is_asked or age >= self.every_seconds or (ends_epoch and age >= epoch_seconds):
            self.save(step)
        if is_asked:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def saved_if_stopped(self, step: int) -> Iterator[None]:
        """Around work that follows a step: if it is stopped where it may be, the state before it is saved."""
        try:
            yield
        except Stopped:
            self.save(step)
            raise

    @contextlib.contextmanager
    def stoppable(self) -> Iterator[None]:
        """Within this block, which changes nothing that is saved, an interruption is not put off."""
        with contextlib.nullcontext() if self._signals is None else self._signals.at_once():
            yield

    def save(self, step: int, is_finished: bool = False) -> None:
        """Save the parts in the place of what was saved before.

        Raises:
            RunError: It cannot be written; what was saved before is as it was.
        """
        if self.path is None:
            return
        began = time.monotonic()
        states = {name: part.state() for name, part in self.parts.items()}
        header = {
            "format": FORMAT,
            "step": step,
            "finished": is_finished,
            "parts": {name: state.values for name, state in states.items()},
        }
        tensors = {
            f"{name}:{key}": tensor.detach().cpu().contiguous()
            for name, state in states.items()
            for key, tensor in state.tensors.items()
        }
        header["tensors"] = sorted(tensors)
        try:
            with replacing(self.path) as temporary:
                save_file(tensors, temporary, {"training": json.dumps(header)})
        except (OSError, SafetensorError) as problem:
            why = getattr(problem, "strerror", None) or problem
            kept = f"; what was saved after step {self.step} is as it was, to go on from" if self.step else ""
            raise RunError(f"The training's state `{self.path}` cannot be written: {why}{kept}.") from None
        self.step, self.is_finished = step, is_finished
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - began
        self.on_save(step, self._cost, self.path.stat().st_size)

    def finish(self, step: int, weights: Part) -> None:
        """Keep the final weights and the log for what follows the training, if that took long enough to be worth it."""
        if self.step or time.monotonic() - self._saved_at >= min(EPOCH_SECONDS, self.every_seconds):
            self.parts = {name: part for name, part in self.parts.items() if name == "log"} | {"weights": weights}
            self.save(step, is_finished=True)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[tuple[dict[str, Any], Any]]:
        assert self.path is not None
        try:
            with safe_open(self.path, "pt") as file:
                header = json.loads(file.metadata()["training"])
                if header["format"] != FORMAT:
                    raise ValueError(f"it has format {header['format']!r}, and this version reads format {FORMAT}")
                yield header, file
        except RunError:  # what takes part in the loading has said it itself
            raise
        except DAMAGE as problem:
            raise RunError(
                f"The training's state `{self.path}` is damaged ({type(problem).__name__}: {one_line(problem)}); remove"
                " this file to begin the training again."
            ) from None


class Weights:
    """All tensors of a module: also those that are not saved with a model, such as queues, keys and teachers."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def state(self) -> State:
        return State(dict(self._tensors()))

    def load(self, state: State) -> None:
        own = dict(self._tensors())
        if own.keys() != state.tensors.keys():
            raise KeyError(", ".join(sorted(own.keys() ^ state.tensors.keys())[:5]))
        for name, tensor in own.items():
            _fill(tensor.detach(), state.tensors[name])

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.module.named_parameters()
        yield from self.module.named_buffers()


class Stepper:
    """An optimiser and the schedule of its learning rates."""

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler) -> None:
        self.optimizer, self.schedule = optimizer, schedule

    def state(self) -> State:
        tensors, plain = {}, {}
        for number, entries in self.optimizer.state_dict()["state"].items():
            for name, value in entries.items():
                (tensors if isinstance(value, Tensor) else plain)[f"{number}.{name}"] = value
        learning_rates = [group["lr"] for group in self.optimizer.param_groups]
        return State(tensors, {"plain": plain, "learning_rates": learning_rates, "schedule": self.schedule.last_epoch})

    def load(self, state: State) -> None:
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for key, value in {**state.tensors, **state.values["plain"]}.items():
            number, _, name = key.partition(".")
            parameter = parameters[int(number)]
            if isinstance(value, Tensor):  # a moment lies in memory as its weight does
                place = torch.empty_like(value if name == "step" else parameter, dtype=value.dtype)
                value = _fill(place, value)
            self.optimizer.state[parameter][name] = value
        for group, learning_rate in zip(self.optimizer.param_groups, state.values["learning_rates"], strict=True):
            group["lr"] = learning_rate
        self.schedule.last_epoch = state.values["schedule"]


class Generators:
    """The generators that a module may draw from: PyTorch's for the CPU and for the device, NumPy's and Python's."""

    def __init__(self, device: str) -> None:
        self.accelerator = None if device == "cpu" else getattr(torch, device)

    def state(self) -> State:
        tensors = {"cpu": torch.get_rng_state()}
        if self.accelerator is not None:
            tensors["device"] = self.accelerator.get_rng_state()
        name, keys, *rest = np.random.get_state()
        return State(tensors, {"numpy": [name, keys.tolist(), *rest], "python": random.getstate()})

    def load(self, state: State) -> None:
        torch.set_rng_state(state.tensors["cpu"])
        if self.accelerator is not None:
            self.accelerator.set_rng_state(state.tensors["device"])
        name, keys, *rest = state.values["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        version, numbers, gauss = state.values["python"]
        random.setstate((version, tuple(numbers), gauss))


class Log:
    """Hands rows for metrics.jsonl on, and hands on again what was logged up to the saved state."""

    def __init__(self, log: Callable[[dict[str, Any]], None]) -> None:
        self.log = log
        self.rows: list[dict[str, Any]] = []

    def __call__(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.log(row)

    def state(self) -> State:
        return State(values=self.rows)

    def load(self, state: State) -> None:
        for row in state.values:
            self(row)


class Best:
    """The weights that scored highest so far."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.figure = -1.0
        self.weights: dict[str, Tensor] = {}

    def offer(self, figure: float) -> None:
        """Keep a copy of the weights as they are, if none scored higher or as high."""
        if figure > self.figure:
            self.figure = figure
            self.weights = {name: value.detach().cpu().clone() for name, value in self.module.state_dict().items()}

    def put_back(self) -> None:
        """Give the module the best weights, if any were offered."""
        if self.weights:
            self.module.load_state_dict(self.weights)

    def state(self) -> State:
        return State(self.weights, self.figure)

    def load(self, state: State) -> None:
        self.weights, self.figure = {name: value.clone() for name, value in state.tensors.items()}, float(state.values)


def _fill(tensor: Tensor, values: Tensor) -> Tensor:
    if tensor.shape != values.shape:  # copy_ would broadcast
        raise ValueError(f"a tensor of shape {tuple(values.shape)} where {tuple(tensor.shape)} is expected")
    return tensor.copy_(values)
