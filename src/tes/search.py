"""A small random search with the same number of trials for every arm, and a careful choice among them.

Trial 0 is the defaults. A setting's draws depend on its key and the trial alone, so that arms that share a setting
(the head's penalty, the learning rate) try the same values of it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tes.config import PRIOR_STARTS, Config, Range
from tes.objectives.base import Objective

HEAD = {"optim.head_penalty": Range(0.03, 3.0, log=True)}
PRIOR = {"prior.kappa": Range(0.03, 1.0, log=True)}
WEIGHT_DECAY = {"optim.weight_decay": Range(1e-6, 1e-2, log=True)}
LEARNING_RATE_FACTOR = 10.0
"""The learning rate is searched from a tenth of the default to ten times it."""


@dataclass(frozen=True)
class Choices:
    """A grid that a search draws a setting from, each value as likely."""

    values: tuple[Any, ...]


def space(config: Config, objective_class: type[Objective]) -> dict[str, Range | Choices]:
    """Return what a search varies: the arm's own knobs, and those of the optimiser or the solved head.

    Where `search` is set, it is what that names instead, as far as the arm has it.
    """
    if config.search:
        return _grid(config, objective_class)
    # What a preset fixes makes the arm what it is, a control for example: it is not searched.
    fixed = objective_class.Config.presets.get(config.objective.preset or "", {})
    ranges: dict[str, Range | Choices] = {
        key: range_ for key, range_ in objective_class.Config.search.items() if key not in fixed
    }
    if config.train == "head":
        ranges = {key: range_ for key, range_ in ranges.items() if key not in objective_class.Config.stepped} | HEAD
        if config.start in PRIOR_STARTS:
            ranges |= PRIOR
        return ranges
    usual = config.optim.learning_rate
    assert usual is not None, "settled"
    factor = LEARNING_RATE_FACTOR
    ranges["optim.learning_rate"] = Range(usual / factor, usual * factor, log=True)
    return ranges | (WEIGHT_DECAY if config.optim.weight_decay else {})


def _grid(config: Config, objective_class: type[Objective]) -> dict[str, Range | Choices]:
    own = {f"objective.{name}" for name in objective_class.Config.model_fields}
    fixed = objective_class.Config.presets.get(config.objective.preset or "", {})
    without = (*objective_class.Config.stepped, "augment.", "optim.") if config.train == "head" else ()
    return {
        key: Choices(values)
        for key, values in config.search.items()
        if (key in own or not key.startswith("objective."))
        and key not in fixed
        and (key == "optim.head_penalty" or not key.startswith(without))
    }


def draw_trials(ranges: Mapping[str, Range | Choices], num_trials: int) -> list[dict[str, Any]]:
    """Return the settings of each trial, by dotted key; the first has none and stands for the defaults."""
    trials: list[dict[str, Any]] = [{}]
    for number in range(1, num_trials):
        trials.append({key: _draw(key, number, ranges[key]) for key in sorted(ranges)})
    return trials


def choose(losses_by_trial: Sequence[np.ndarray]) -> int:
    """Return the trial with the lowest mean loss; the defaults unless it beats them by more than one standard error.

    A few validation images say little: a difference within the error of the paired differences is chance.

    Args:
        losses_by_trial: For each trial the loss of each validation image, (n,), in the same order.
    """
    best = int(np.argmin([losses.mean() for losses in losses_by_trial]))
    gain_n = losses_by_trial[0] - losses_by_trial[best]
    if len(gain_n) < 2 or gain_n.mean() <= gain_n.std(ddof=1) / math.sqrt(len(gain_n)):
        return 0
    return best


def _draw(key: str, number: int, choices: Range | Choices) -> Any:
    digest = hashlib.sha256(f"{number}:{key}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    if isinstance(choices, Choices):
        return choices.values[int(share * len(choices.values))]
    if choices.log:
        return choices.low * (choices.high / choices.low) ** share
    return choices.low + share * (choices.high - choices.low)
