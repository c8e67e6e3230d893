"""The search: the same draws for every arm, and a choice that a few validation images cannot fool."""

from __future__ import annotations

import numpy as np
import pytest

from tes.config import Range, load_config
from tes.objectives import objectives
from tes.search import choose, draw_trials, space


def test_the_first_trial_is_the_defaults_and_more_trials_change_none_before():
    ranges = {"a": Range(0.1, 10, log=True), "b": Range(0, 1)}
    few, many = draw_trials(ranges, 3), draw_trials(ranges, 6)
    assert few[0] == {} and many[:3] == few
    assert all(0.1 <= trial["a"] <= 10 and 0 <= trial["b"] <= 1 for trial in many[1:])
    assert draw_trials({"a": ranges["a"]}, 3)[2]["a"] == few[2]["a"]


def test_a_log_range_is_drawn_evenly_in_its_logarithm():
    draws = [trial["a"] for trial in draw_trials({"a": Range(0.01, 100, log=True)}, 2001)[1:]]
    assert np.mean(np.array(draws) < 1) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize(
    ("arm", "train", "inside", "outside"),
    [
        ("ce", "head", {"optim.head_penalty"}, {"prior.kappa", "optim.learning_rate"}),
        ("ce+probe+prior", "head", {"optim.head_penalty", "prior.kappa"}, set()),
        ("tes", "head", {"objective.temperature"}, {"objective.text_loss_weight"}),
        ("tes", "all", {"optim.learning_rate", "objective.text_loss_weight"}, {"optim.head_penalty"}),
        ("tes@no-vision-target", "all", {"objective.temperature"}, {"objective.text_target_weight"}),
        ("l2_sp", "all", {"objective.alpha"}, {"optim.weight_decay"}),
    ],
)
def test_each_arm_varies_its_own_knobs_and_those_of_what_is_trained(arm, train, inside, outside):
    objective, _, start = arm.partition("+")
    flags = {"data.source": "x", "objective": objective, "start": start or "probe", "train": train}
    config = load_config(flags=flags | {"optim.learning_rate": 1e-4})
    ranges = space(config, objectives.get(config.objective.name))
    assert inside <= ranges.keys() and not outside & ranges.keys()


def test_the_defaults_stay_unless_a_trial_is_better_by_more_than_chance():
    draw = np.random.default_rng(0)
    base = draw.normal(1.0, 0.5, size=100)
    noise = draw.normal(0, 0.5, size=100)
    assert choose([base, base - 0.01 + noise]) == 0
    assert choose([base, base - 0.3 + 0.1 * noise, base + 0.2]) == 1
    assert choose([base[:1], base[:1] - 5]) == 0  # one image says nothing
