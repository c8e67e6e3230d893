"""One fit, whichever way: a head solved on fixed features, or the whole network stepped from a start."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tes import console
from tes.config import Config
from tes.data.dataset import Dataset
from tes.engine import loop
from tes.engine.compute import Compute, seed_everything
from tes.engine.features import frozen_features
from tes.engine.learner import Learner, one_hot
from tes.engine.loader import steps_per_epoch, train_batches
from tes.engine.solve import LinearHead, solve_head
from tes.engine.start import probe_head, random_head
from tes.models.backbone import Backbone
from tes.objectives import objectives
from tes.objectives.base import Objective, ObjectiveContext


@dataclass(frozen=True)
class Fitted:
    """A trained learner, the head that it started from, and what the objective reported on the way."""

    learner: Learner
    start_head: LinearHead
    figures: dict[str, float] = field(default_factory=dict)


def fit(
    config: Config,
    backbone: Backbone,
    dataset: Dataset,
    indices: np.ndarray,
    class_text_CD: Tensor | None,
    compute: Compute,
    *,
    log: Callable[[dict[str, Any]], None] = lambda row: None,
    evaluate: Callable[[Learner], dict[str, Any]] | None = None,
    num_evaluations: int = 5,
) -> Fitted:
    """Train on the images `indices`.

    Args:
        config: Settled settings.
        backbone: Changed in place with `train: all`, left alone with `train: head`.
        dataset: Where the images are.
        indices: Which of them to train on.
        class_text_CD: The text classifier's rows, for objectives that need them.
        compute: Device and arithmetic.
        log: Called with rows for metrics.jsonl.
        evaluate: Scores the learner as it stands; called `num_evaluations` times over a training of the whole network.
        num_evaluations: How often.
    """
    seed_everything(config.seed)
    labels_N = torch.from_numpy(dataset.labels[indices])
    num_classes, num_features = dataset.num_classes, backbone.num_features
    if config.start == "random":
        features_NF = target_NC = None
        head = random_head(num_features, num_classes, config.seed)
    else:
        features_NF = frozen_features(backbone, dataset, indices, compute)
        head = probe_head(features_NF, labels_N, num_classes, config.optim.head_penalty)
        features_NF = features_NF.to(compute.device)
        target_NC = one_hot(labels_N, num_classes).to(compute.device)
    objective: Objective = objectives.get(config.objective.name)(config.objective)
    objective.setup(
        ObjectiveContext(
            num_features, num_classes, config.seed, class_text_CD, backbone.source_head, features_NF, target_NC
        )
    )
    learner = Learner(backbone, head, objective, compute)
    compute.place(learner)
    if config.train == "head":
        assert features_NF is not None and target_NC is not None, "check_needs() refuses a random start here"
        figures = _solve(learner, features_NF, target_NC, config.optim.head_penalty)
    else:
        figures = {} if features_NF is None else objective.warm_start(features_NF, target_NC)
        _step(learner, config, dataset, indices, log, evaluate, num_evaluations)
    return Fitted(learner, head, figures)


def _solve(learner: Learner, features_NF: Tensor, target_NC: Tensor, penalty: float) -> dict[str, float]:
    """Fit the objective's own parameters, then solve the head for the reference that they give."""
    figures = learner.objective.fit_features(features_NF, target_NC)
    learner.eval()
    with torch.no_grad():
        reference_NC = learner.objective.reference(learner.output(features_NF), target_NC)
    learner.set_head(solve_head(features_NF, reference_NC, penalty))
    return figures


def _step(
    learner: Learner,
    config: Config,
    dataset: Dataset,
    indices: np.ndarray,
    log: Callable[[dict[str, Any]], None],
    evaluate: Callable[[Learner], dict[str, Any]] | None,
    num_evaluations: int,
) -> None:
    num_steps = config.optim.num_steps
    assert num_steps is not None, "settle() has decided it"
    per_epoch = steps_per_epoch(len(indices), config.optim.batch_size)
    evaluate_at = {
        math.ceil(num_steps * k / num_evaluations) for k in range(1, num_evaluations)
    }  # the end is scored anyway
    batches = train_batches(
        dataset,
        indices,
        learner.backbone.images,
        config.augment,
        learner.compute,
        batch_size=config.optim.batch_size,
        num_steps=num_steps,
        seed=config.seed,
    )

    def on_losses(step: int, means: dict[str, float], learning_rate: float) -> None:
        log(
            {
                "split": "train",
                "step": step,
                "epoch": round(step / per_epoch, 4),
                "learning_rate": learning_rate,
                **means,
            }
        )

    def score(step: int) -> None:
        assert evaluate is not None
        heads = evaluate(learner)
        log({"split": "val", "step": step, "epoch": round(step / per_epoch, 4), "heads": heads})
        shown = ", ".join(f"{head} {figures['mean_per_class']:.1%}" for head, figures in heads.items())
        console.note(f"step {step}/{num_steps}: val mean per class {shown}")

    loop.fit(
        learner,
        batches,
        config.optim,
        num_steps,
        path_of=lambda index: dataset.paths[index],
        on_losses=on_losses,
        evaluate=score,
        evaluate_at=evaluate_at if evaluate is not None else (),
    )
    learner.backbone.refresh_fingerprint()  # other weights, other features: none may be found under the old name
