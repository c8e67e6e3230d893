"""One fit, whichever way: a head solved on fixed features, or the whole network stepped from a start."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tes import console
from tes.config import PRIOR_STARTS, Config
from tes.data.dataset import Dataset
from tes.engine import loop
from tes.engine.balance import class_weights
from tes.engine.checkpoint import Best, Checkpoint, Log, Weights
from tes.engine.compute import seed_everything
from tes.engine.features import FrozenFeatures
from tes.engine.learner import Learner, one_hot
from tes.engine.loader import steps_per_epoch, train_batches
from tes.engine.memory import ImageMemory
from tes.engine.mix import mixed
from tes.engine.solve import HeadProblem, Prior, Solution
from tes.engine.start import random_head
from tes.files import sha256_text
from tes.metrics import METRICS
from tes.models.layers import freeze_all_but_last
from tes.objectives import objectives
from tes.objectives.base import Objective, ObjectiveContext

Evaluate = Callable[[Learner, FrozenFeatures | None], dict[str, Any]]


@dataclass(frozen=True)
class Given:
    """What a fit builds on. But for `store`, which fits add to, it is only read, so that many can share it.

    Attributes:
        dataset: With its draw.
        features: Of its images under the pre-trained backbone, which it holds.
        class_text_CD: The text classifier's rows, for objectives that need them.
        prior: The text prior, for starts that use it.
        store: What one arm of a comparison has solved and another can use (`ObjectiveContext.store`).
        memory: Images that are read already; each training adds those it reads.
    """

    dataset: Dataset
    features: FrozenFeatures
    class_text_CD: Tensor | None = None
    prior: Prior | None = None
    store: MutableMapping[str, Any] = field(default_factory=dict)
    memory: ImageMemory = field(default_factory=ImageMemory)


@dataclass(frozen=True)
class Fitted:
    """A trained learner, and where it came from.

    Attributes:
        learner: Trained.
        start: The head that it started from.
        trust_C: What is shipped as trust in the prior.
        figures: From the way.
        started: What `evaluate` said of the solved head that steps started from; None where none were taken, or from a
            random one.
        ended: What it said of the last step's outcome, where that was asked for.
    """

    learner: Learner
    start: Solution
    trust_C: Tensor | None = None
    figures: dict[str, float] = field(default_factory=dict)
    started: dict[str, Any] | None = None
    ended: dict[str, Any] | None = None

    def fell_back(self, metric: str) -> bool:
        """Whether the steps did not beat the head that they started from: the rule of `start_fallback: val`."""
        assert self.started is not None and self.ended is not None, "with `start_fallback: val` both are looked at"
        head = self.learner.objective.default_head
        return bool(self.ended[head][metric] <= self.started[head][metric])


def head_problem(config: Config, prior: Prior | None, class_weight_C: Tensor | None = None) -> HeadProblem:
    """Return the convex problem that `start` names."""
    used = prior if config.start in PRIOR_STARTS else None
    device = "cuda" if config.device == "cuda" else "cpu"  # float64: there is none on an Apple GPU
    return HeadProblem(config.optim.head_penalty, used, config.start != "prior", class_weight_C, device)


def fit(
    config: Config,
    given: Given,
    indices: np.ndarray,
    *,
    log: Callable[[dict[str, Any]], None] = lambda row: None,
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    evaluated: str = "val",
    keep_best: bool = False,
    checkpoint: Checkpoint | None = None,
) -> Fitted:
    """Train on the images `indices`.

    Args:
        config: Settled settings.
        given: Data, features, text, prior. The backbone is copied before it is trained.
        indices: Which images to train on; none at 0 shots.
        log: Called with rows for metrics.jsonl.
        evaluate: Scores the learner as it stands, now and then over a training that takes steps; it is handed the
            features too while they are still those of the learner's backbone.
        evaluate_every: After how many steps; None: after each fifth of them.
        evaluated: The split that `evaluate` looks at, as the rows name it.
        keep_best: End with the weights that `evaluate` liked best (by the data's metric), not with the last ones.
        checkpoint: Where a training of the whole network is kept, and taken up if some of it is there; None: nowhere.
    """
    seed_everything(config.seed)
    dataset, features = given.dataset, given.features
    class_weight_C = class_weights(config.optim.class_weights, dataset.classes, dataset.labels[indices])
    problem = head_problem(config, given.prior, class_weight_C)
    if not len(indices):
        return _without_labels(problem, given)
    objective: Objective = objectives.get(config.objective.name)(config.objective)
    objective.class_weight_C = None if class_weight_C is None else class_weight_C.float()
    features_NF = target_NC = None
    if config.start != "random" or "pretrained_features" in objective.needs:
        drawn, indices = indices, features.readable(indices)
        dataset.require_trainable(drawn)
        features_NF = features(indices)
        target_NC = one_hot(torch.from_numpy(dataset.labels[indices]), dataset.num_classes)
    if config.start == "random":
        start = Solution(random_head(features.backbone.num_features, dataset.num_classes, config.seed))
    else:
        start = _once(given.store, _start_key(config, indices), lambda: problem.solve(features_NF, target_NC))
    if features_NF is not None and target_NC is not None:
        features_NF, target_NC = features_NF.to(features.compute.device), target_NC.to(features.compute.device)
    learner = _learner(config, given, objective, start, features_NF, target_NC)
    if config.train == "head":
        assert features_NF is not None and target_NC is not None, "check_needs() refuses a random start here"
        figures, solution = _solve_head(learner, problem, start, features_NF, target_NC)
        _note(objective, figures)
        return Fitted(learner, start, solution.trust_C, figures)
    figures = {} if features_NF is None else objective.warm_start(features_NF, target_NC)
    _note(objective, figures)
    features_NF = target_NC = None  # room for the training, where they are on an accelerator
    rows = _train_network(
        learner,
        config,
        given,
        indices,
        log,
        evaluate,
        evaluate_every,
        evaluated,
        keep_best,
        checkpoint or Checkpoint(),
    )
    looks = {row["step"]: row["heads"] for row in rows if row["split"] == "val"}
    return Fitted(learner, start, start.trust_C, figures, looks.get(0), looks.get(config.optim.num_steps))


def _note(objective: Objective, figures: dict[str, float]) -> None:
    for line in objective.remarks(figures):
        console.note(line)


def _without_labels(problem: HeadProblem, given: Given) -> Fitted:
    """Return what the text prior says by itself, at 0 shots."""
    pool = given.features.readable(np.flatnonzero(given.dataset.splits != "test"))
    start = problem.without_labels(given.features(pool))
    objective = objectives.get("ce")(objectives.get("ce").Config())  # no label, so nothing for an objective to do
    learner = Learner(given.features.backbone, start.head, objective, given.features.compute)
    given.features.compute.place(learner)
    return Fitted(learner, start, start.trust_C)


def _learner(
    config: Config,
    given: Given,
    objective: Objective,
    start: Solution,
    features_NF: Tensor | None,
    target_NC: Tensor | None,
) -> Learner:
    """Put the network together, on its device, with an objective that is set up; what is trained is a copy."""
    backbone = given.features.backbone
    if config.train != "head":
        backbone = copy.deepcopy(backbone)
        if config.num_last is not None:
            freeze_all_but_last(backbone.network, config.num_last)
    learner = Learner(backbone, start.head, objective, given.features.compute)
    weights = learner.weights()
    objective.setup(
        ObjectiveContext(
            num_features=backbone.num_features,
            num_classes=given.dataset.num_classes,
            seed=config.seed,
            class_text_CD=given.class_text_CD,
            source_head=backbone.source_head,
            features_NF=features_NF,
            target_NC=target_NC,
            store=given.store,
            start_weights=None
            if weights is None
            else {name: weight.detach().clone() for name, weight in weights.items()},
        )
    )
    given.features.compute.place(learner)
    return learner


def _start_key(config: Config, indices: np.ndarray) -> str:
    """Return what a solved start depends on, among runs that share a store."""
    text = config.text.model_copy(update={"centre": None})  # the prior's rows are not centred
    uses = (config.prior, text, config.seed) if config.start in PRIOR_STARTS else ()
    optim = config.optim
    parts = (str(config.start), str(optim.head_penalty), repr(uses), repr(optim.class_weights))
    return f"start {sha256_text(indices.tobytes().hex(), *parts)}"


def _once(store: MutableMapping[str, Any], key: str, solve: Callable[[], Solution]) -> Solution:
    if key not in store:
        store[key] = solve()
    return store[key]


def _solve_head(
    learner: Learner, problem: HeadProblem, start: Solution, features_NF: Tensor, target_NC: Tensor
) -> tuple[dict[str, float], Solution]:
    """Fit the objective's own parameters, then solve the head for the reference that they give."""
    figures = learner.objective.fit_features(features_NF, target_NC)
    learner.eval()
    with torch.no_grad():
        reference_NC = learner.objective.reference(learner.output(features_NF), target_NC)
    # The start is this very problem with the labels as reference.
    is_softer = not torch.equal(reference_NC, target_NC)
    solution = problem.solve(features_NF, reference_NC, target_NC) if is_softer else start
    learner.set_head(solution.head)
    return figures, solution


def _train_network(
    learner: Learner,
    config: Config,
    given: Given,
    indices: np.ndarray,
    log: Callable[[dict[str, Any]], None],
    evaluate: Evaluate | None,
    evaluate_every: int | None,
    evaluated: str,
    keep_best: bool,
    checkpoint: Checkpoint,
) -> list[dict[str, Any]]:
    """Take the steps, and return the rows that were logged."""
    dataset, num_steps = given.dataset, config.optim.num_steps
    assert num_steps is not None, "settle() has decided it"
    log, best = Log(log), Best(learner)
    checkpoint.parts["log"] = log
    if checkpoint.is_finished:
        checkpoint.begin({"weights": Weights(learner)})
        learner.eval()
        learner.backbone.refresh_fingerprint()
        return log.rows
    if checkpoint.step:
        console.note(f"going on after step {checkpoint.step} of {num_steps}")
    per_epoch = steps_per_epoch(len(indices), config.optim.batch_size)
    evaluate_at = {math.ceil(num_steps * k / 5) for k in range(1, 5)}
    if evaluate_every is not None:
        evaluate_at = set(range(evaluate_every, num_steps, evaluate_every))
    if keep_best:  # else the end is scored anyway
        evaluate_at |= {num_steps}
    elif config.start != "random":  # is what follows any better than the head that is solved in seconds?
        evaluate_at |= {0}
    falls_back = config.start_fallback == "val" and evaluate is not None
    if falls_back:
        evaluate_at |= {0, num_steps}
    checkpoint.parts["best"] = best
    checkpoint.steps_per_epoch = per_epoch
    batches = train_batches(
        dataset,
        indices,
        learner.backbone.images,
        config.augment,
        learner.compute,
        batch_size=config.optim.batch_size,
        num_steps=num_steps,
        seed=config.seed,
        first_step=checkpoint.step,
        two_views="two_views" in learner.objective.needs,
        balanced=config.optim.sampling == "balanced",
        memory=given.memory,
    )
    batches = mixed(
        batches,
        config.augment,
        dataset.num_classes,
        learner.compute,
        seed=config.seed,
        first_step=checkpoint.step,
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
        with checkpoint.stoppable():
            heads = evaluate(learner, given.features if step == 0 else None)
        log({"split": evaluated, "step": step, "epoch": round(step / per_epoch, 4), "heads": heads})
        shown = ", ".join(f"{head} {figures[dataset.metric]:.1%}" for head, figures in heads.items())
        console.note(f"step {step}/{num_steps}: {METRICS[dataset.metric]} {shown}")
        if keep_best or (falls_back and step in (0, num_steps)):
            best.offer(heads[learner.objective.default_head][dataset.metric])

    loop.fit(
        learner,
        batches,
        config.optim,
        num_steps,
        path_of=lambda index: dataset.paths[index],
        on_losses=on_losses,
        evaluate=score,
        evaluate_at=evaluate_at if evaluate is not None else (),
        checkpoint=checkpoint,
    )
    best.put_back()
    checkpoint.finish(num_steps, Weights(learner))
    learner.backbone.refresh_fingerprint()  # other weights, other features: none may be found under the old name
    return log.rows
