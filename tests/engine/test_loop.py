"""The options of a stepped training: each layer's learning rate, and the moving average against a loop by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from tes.config import BackboneConfig, ImageConfig, OptimConfig
from tes.engine.average import WeightAverage
from tes.engine.compute import Compute
from tes.engine.learner import Learner
from tes.engine.loader import Batch
from tes.engine.loop import fit, to_train_mode, train_step
from tes.engine.optim import build_optimizer, build_schedule
from tes.engine.start import random_head
from tes.models.backbone import load_backbone
from tes.objectives import objectives
from tes.objectives.base import ObjectiveContext

B, C, SIZE = 6, 3, 32


@pytest.fixture(scope="module")
def untrained(resnet):
    """A learner of `tes` on the tiny ResNet: a backbone and a text head, both with batch norms."""
    settings = {key.removeprefix("backbone."): value for key, value in resnet.items() if key.startswith("backbone.")}
    backbone = load_backbone(BackboneConfig(**settings), ImageConfig(size=SIZE))
    objective = objectives.get("tes")(objectives.get("tes").Config(text_target_weight=0.2))
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(C, 5)).astype("float32"))
    objective.setup(ObjectiveContext(backbone.num_features, C, 0, rows))
    return Learner(
        backbone, random_head(backbone.num_features, C, 0), objective, Compute("cpu", "fp32", "contiguous", 0)
    )


def optim(**settings) -> OptimConfig:
    return OptimConfig(**{"learning_rate": 0.01, "head_learning_rate": 0.05, "freeze_norms": False} | settings)


def batches(num_steps: int) -> list[Batch]:
    draw = torch.Generator().manual_seed(1)
    return [
        Batch(
            torch.arange(B),
            torch.randint(0, 256, (B, 3, SIZE, SIZE), generator=draw, dtype=torch.uint8),
            torch.randint(0, C, (B,), generator=draw),
        )
        for _ in range(num_steps)
    ]


def train(learner, num_steps, config, **how):
    fit(learner, batches(num_steps), config, num_steps, path_of=str, on_losses=lambda *row: None, **how)
    return state(learner)


def state(learner):
    return {name: tensor.detach().clone() for name, tensor in learner.state_dict().items()}


def rates(learner, config):
    """Return {parameter's name: (learning rate, weight decay)}."""
    named = {id(parameter): name for name, parameter in learner.named_parameters()}
    groups = build_optimizer(learner, config).param_groups
    return {named[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_a_layers_rate_falls_with_its_distance_from_the_head(untrained):
    got = rates(untrained, optim(layer_decay=0.5, weight_decay=0.1))
    parameters = dict(untrained.named_parameters())
    assert got.keys() == parameters.keys()
    blocks = [f"layer{stage}.{block}." for stage in (1, 2, 3, 4) for block in (0, 1)]
    for name, (learning_rate, weight_decay) in got.items():
        place = next((k for k, block in enumerate(blocks) if name.startswith(f"backbone.network.{block}")), -1)
        expected = 0.01 * 0.5 ** (8 - place) if name.startswith("backbone.") else 0.05
        assert learning_rate == pytest.approx(expected, rel=1e-12), name
        assert weight_decay == (0.1 if parameters[name].ndim > 1 else 0), name


def test_without_layer_decay_the_backbone_has_one_rate_and_a_decay_of_1_is_none(untrained):
    plain = rates(untrained, optim())
    assert {rate for name, (rate, _) in plain.items() if name.startswith("backbone.")} == {0.01}
    assert plain == rates(untrained, optim(layer_decay=1))
    assert len(build_optimizer(untrained, optim(layer_decay=1)).param_groups) == 6


def test_the_moving_average_is_that_of_a_loop_by_hand_and_is_what_is_scored_and_kept(untrained):
    decay, num_steps = 0.3, 5
    live, config = copy.deepcopy(untrained), optim(ema=decay)
    optimizer = build_optimizer(live, config)
    schedule = build_schedule(optimizer, num_steps, 0)
    to_train_mode(live, freeze_norms=False)
    average = {name: tensor.double().numpy() for name, tensor in state(live).items()}
    expected = []
    for step, batch in enumerate(batches(num_steps), start=1):
        train_step(live, batch, optimizer, schedule, 1, None)
        d = min(decay, (1 + step) / (10 + step))
        for name, tensor in state(live).items():
            value = tensor.double().numpy()
            average[name] = d * average[name] + (1 - d) * value if tensor.is_floating_point() else value
        expected.append(dict(average))
    assert (1 + 1) / (10 + 1) < decay < (1 + 5) / (10 + 5), "both branches of the rise are seen"

    scored = {}
    averaged = copy.deepcopy(untrained)
    kept = train(
        averaged, num_steps, config, evaluate=lambda step: scored.update({step: state(averaged)}), evaluate_at={2}
    )
    for got, wanted in ((scored[2], expected[1]), (kept, expected[-1])):
        for name, tensor in got.items():
            np.testing.assert_allclose(tensor.numpy(), wanted[name], rtol=1e-4, atol=1e-6, err_msg=name)
    moved = [name for name in kept if not torch.equal(kept[name], state(live)[name])]
    for name in ("backbone.network.bn1.running_mean", "objective.text_head.projection.0.weight", "head.weight"):
        assert name in moved


def test_a_moving_average_leaves_the_training_itself_alone(untrained):
    runs = {}
    for ema in (None, 0.9):
        losses = []
        fit(
            copy.deepcopy(untrained), batches(3), optim(ema=ema), 3, path_of=str,
            on_losses=lambda step, means, rate, losses=losses: losses.append((step, means, rate)),
            evaluate=lambda step: None, evaluate_at={1, 2},
        )  # fmt: skip
        runs[ema] = losses
    assert len(runs[None]) == 3 and runs[None] == runs[0.9]


def test_the_average_steps_back_even_where_scoring_fails_and_frozen_weights_are_not_its_business():
    module = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    start, average = state(module), WeightAverage(module, 0.5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    before = state(module)
    with pytest.raises(ZeroDivisionError), average.applied():
        assert torch.equal(module[1].weight, start["1.weight"])
        assert torch.equal(module[0].weight, before["0.weight"])
        raise ZeroDivisionError
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(module).items())
