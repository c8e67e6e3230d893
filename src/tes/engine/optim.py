"""The optimiser's parameter groups and the learning rate's course."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from tes.config import OptimConfig
from tes.engine.learner import Learner
from tes.models.layers import layer_of


def build_optimizer(learner: Learner, config: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimiser over everything that requires a gradient.

    Two learning rates (backbone; vision head and the objective's own parameters), and no weight decay on biases and
    norms, as is usual, but with `decay_all`. With `layer_decay` a layer of the backbone has the rate
    lr × layer_decay ** distance, where the layer next to the head is at distance 1 (Bao, Dong, Piao, Wei: BEiT. ICLR
    2022). The first group is the backbone's, or of it the layer next to the head: its rate is the one that is logged.
    """
    assert config.learning_rate is not None and config.head_learning_rate is not None
    groups = []
    for distance, parameters in _by_distance(learner.backbone.network, config.layer_decay):
        learning_rate = config.learning_rate * (config.layer_decay or 1) ** distance
        groups += _groups(parameters, learning_rate, config)
    for module in (learner.head, learner.objective):
        groups += _groups(module.parameters(), config.head_learning_rate, config)
    if config.name == "adamw":
        return torch.optim.AdamW(groups)
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.momentum > 0)


def build_schedule(
    optimizer: torch.optim.Optimizer, num_steps: int, warmup: float
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return a linear rise over the first share `warmup` of the steps, then half a cosine down to 0, per step."""
    num_warmup = round(warmup * num_steps)

    def factor(step: int) -> float:
        if step < num_warmup:
            return (step + 1) / (num_warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / max(1, num_steps - num_warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _by_distance(network: nn.Module, layer_decay: float | None) -> list[tuple[int, list[nn.Parameter]]]:
    """Return a network's parameters by their layer's distance from the head, ascending; without decay all as one."""
    if layer_decay in (None, 1):
        return [(0, list(network.parameters()))]
    layers = layer_of(network)
    num_layers = max(layers.values(), default=-1) + 1
    parts: list[tuple[int, list[nn.Parameter]]] = [(distance, []) for distance in range(1, num_layers + 1)]
    for name, parameter in network.named_parameters():
        if name in layers:
            parts[num_layers - layers[name] - 1][1].append(parameter)
    return parts


def _groups(parameters: Iterable[nn.Parameter], learning_rate: float, config: OptimConfig) -> list[dict]:
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "lr": learning_rate, "weight_decay": config.weight_decay},
        {"params": vectors, "lr": learning_rate, "weight_decay": config.weight_decay if config.decay_all else 0.0},
    ]
    return [group for group in groups if group["params"]]
