"""The training loop. It reads top to bottom, and knows no objective: it minimises the sum of the losses it is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tes import console
from tes.config import OptimConfig
from tes.engine.average import WeightAverage
from tes.engine.checkpoint import Checkpoint, Generators, State, Stepper, Weights
from tes.engine.learner import Learner, one_hot
from tes.engine.loader import Batch
from tes.engine.optim import build_optimizer, build_schedule
from tes.errors import TrainingError, listing

STEPS_BETWEEN_CHECKS = 20
"""Losses stay on the device for so many steps: reading each at once would make an accelerator wait for the CPU."""


@dataclass(frozen=True)
class StepLosses:
    """What one step left behind: the losses (still on the device) and the images it saw."""

    step: int
    losses: dict[str, Tensor]
    indices_B: Tensor


def train_step(
    learner: Learner,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    accumulate: int,
    clip_norm: float | None,
) -> dict[str, Tensor]:
    """Take one step on one batch and return its losses, each a mean over the batch."""
    total: dict[str, Tensor] = {}
    num_parts = max(1, min(accumulate, len(batch.labels_B) // 2))  # a part of one image breaks batch norm
    compute = learner.compute
    for part in batch.split(num_parts):
        target_BC = part.target_BC
        if target_BC is None:
            target_BC = one_hot(compute.move(part.labels_B), learner.head.out_features)
        key_images = None if part.key_images_B3HW is None else compute.images(part.key_images_B3HW)
        losses = learner(compute.images(part.images_B3HW), target_BC, key_images)
        share = len(part.labels_B) / len(batch.labels_B)  # backward() sums gradients; the shares make them a mean
        (share * sum(losses.values())).backward()
        for name, loss in losses.items():
            total[name] = total.get(name, 0) + share * loss.detach()
    if clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(learner.parameters(), clip_norm)
    optimizer.step()
    learner.after_step()
    schedule.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def fit(
    learner: Learner,
    batches: Iterable[Batch],
    config: OptimConfig,
    num_steps: int,
    *,
    path_of: Callable[[int], str],
    on_losses: Callable[[int, dict[str, float], float], None],
    evaluate: Callable[[int], None] = lambda step: None,
    evaluate_at: Collection[int] = (),
    checkpoint: Checkpoint | None = None,
) -> None:
    """Train for `num_steps` steps, one batch each.

    Args:
        learner: Changed in place; left in eval mode, and, where there is a moving average (`ema`), with its weights.
        batches: At least `num_steps` of them, or what is left of them after the steps that the checkpoint has taken.
        config: Optimiser, learning rates (resolved), accumulation, clipping and moving average.
        num_steps: The budget.
        path_of: Names an image by its index, for messages.
        on_losses: Called now and then with (step, mean losses since the last call, learning rate).
        evaluate: Called with the number of steps taken, after those in `evaluate_at`; may put the learner in eval mode.
        evaluate_at: When.
        checkpoint: Where the training is kept, and taken up if some of it is there; None: nowhere.

    Raises:
        TrainingError: The loss is not finite; the message names the step and the batch's files.
        KeyboardInterrupt: The program was asked to stop; with a checkpoint, the state is saved.
        RunError: The state cannot be saved, or the saved one is damaged.
    """
    optimizer = build_optimizer(learner, config)
    schedule = build_schedule(optimizer, num_steps, config.warmup or 0.0)
    average = WeightAverage(learner, config.ema)
    pending = PendingLosses(path_of)
    checkpoint = checkpoint or Checkpoint()
    parts = {"weights": Weights(learner), "stepper": Stepper(optimizer, schedule), "average": average}
    num_done = checkpoint.begin(parts | {"pending": pending, "generators": Generators(learner.compute.device)})

    def score(step: int) -> None:
        if step in evaluate_at:
            with checkpoint.saved_if_stopped(step), average.applied():
                evaluate(step)
            to_train_mode(learner, config.freeze_norms)

    to_train_mode(learner, config.freeze_norms)
    with checkpoint.on_guard(), console.progress(num_steps - num_done, "training", "steps") as progress:
        score(num_done)  # a state is saved before it is scored
        for step, batch in zip(range(num_done + 1, num_steps + 1), batches):
            learning_rate = optimizer.param_groups[0]["lr"]
            losses = train_step(learner, batch, optimizer, schedule, config.accumulate, config.clip_norm)
            average.update()
            pending.add(StepLosses(step, losses, batch.indices_B))
            if step % STEPS_BETWEEN_CHECKS == 0 or step == num_steps or step in evaluate_at:
                means = pending.take_means()
                on_losses(step, means, learning_rate)
                progress.advance(0, **means)
            progress.advance(1)
            checkpoint.after(step)
            score(step)
    average.apply()
    learner.eval()


def to_train_mode(learner: Learner, freeze_norms: bool | None) -> None:
    """Put everything in train mode but what is not trained, and batch norms that keep their pre-trained statistics."""
    learner.train()
    if freeze_norms:
        for norm in learner.batch_norms():
            norm.eval()


class PendingLosses:
    """The losses since the last look at them."""

    def __init__(self, path_of: Callable[[int], str]) -> None:
        self.path_of = path_of
        self.entries: list[StepLosses] = []

    def add(self, entry: StepLosses) -> None:
        """Take in a step's losses."""
        self.entries.append(entry)

    def take_means(self) -> dict[str, float]:
        """Return the mean of every loss over the steps since the last call, and their sum as `loss`.

        Raises:
            TrainingError: A loss is not finite.
        """
        sums: dict[str, float] = {}
        for entry in self.entries:
            for name, value in self._values(entry).items():
                sums[name] = sums.get(name, 0.0) + value
        means = {name: value / len(self.entries) for name, value in sums.items()}
        self.entries.clear()
        return {"loss": sum(means.values())} | means

    def state(self) -> State:
        """Return the losses; a training that has diverged is not worth keeping, so that it may raise as above."""
        rows = [[entry.step, self._values(entry), entry.indices_B.tolist()] for entry in self.entries]
        return State(values=rows)

    def load(self, state: State) -> None:
        for step, losses, indices in state.values:
            exact = {name: torch.tensor(value, dtype=torch.float64) for name, value in losses.items()}
            self.add(StepLosses(step, exact, torch.tensor(indices)))

    def _values(self, entry: StepLosses) -> dict[str, float]:
        values = {name: loss.item() for name, loss in entry.losses.items()}
        if not all(math.isfinite(value) for value in values.values()):
            files = listing([self.path_of(int(index)) for index in entry.indices_B])
            shown = ", ".join(f"{name} {value}" for name, value in values.items())
            raise TrainingError(
                f"The loss is not finite at step {entry.step} ({shown}); its batch: {files}. Lower the learning rate"
                " (--lr), set optim.clip_norm=1, or use --precision fp32."
            )
        return values
