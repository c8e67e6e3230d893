"""The optimiser's parameter groups and the learning rate's course."""

from __future__ import annotations

import math

import torch
from torch import nn

from tes.config import OptimConfig
from tes.engine.learner import Learner


def build_optimizer(learner: Learner, config: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimiser over everything that requires a gradient.

    Two learning rates (backbone; vision head and the objective's own parameters), and no weight decay on biases and
    norms, as is usual.
    """
    assert config.learning_rate is not None and config.head_learning_rate is not None
    groups = [
        *_groups(learner.backbone, config.learning_rate, config.weight_decay),
        *_groups(learner.head, config.head_learning_rate, config.weight_decay),
        *_groups(learner.objective, config.head_learning_rate, config.weight_decay),
    ]
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


def _groups(module: nn.Module, learning_rate: float, weight_decay: float) -> list[dict]:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": vectors, "lr": learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
