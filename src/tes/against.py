"""How far a run is from plain fine-tuning on the same images: what `tes train` says at its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tes.config import Config
from tes.engine.checkpoint import Checkpoint
from tes.engine.fit import fit
from tes.engine.learner import Learner
from tes.engine.scoring import predict
from tes.errors import counted
from tes.metrics import METRICS, evaluate_split, image_losses
from tes.objectives import objectives
from tes.predictions import in_common
from tes.prepare import Job
from tes.settle import settle
from tes.statistics import Answers, bootstrap_images, judged


def against_ce(
    job: Job, learner: Learner, log: Callable[[dict[str, Any]], None], checkpoint: Checkpoint
) -> dict[str, Any]:
    """Train `ce` from `probe` on the same images and compare the two on val, image by image.

    Args:
        job: The run's.
        learner: What came of it.
        log: Takes the rows of the other training.
        checkpoint: Where that one is kept.
    """
    # Settled anew: `ce` from a probe has learning rates, and a weight decay, of its own.
    asked, given, loaded = job.asked, job.given, job.loaded
    own = {key: _default(key) for key, value in asked.objective.defaults.items() if asked.value(key) == value}
    plain = asked.replace({"objective": {"name": "ce"}, "start": "probe", "start_fallback": "none"} | own)
    plain = settle(plain, job.dataset, loaded.backbone, objectives.get("ce"), loaded.source_text, len(job.train)).config
    other = fit(plain, replace(given, prior=None), job.train, log=log, checkpoint=checkpoint).learner
    ours, theirs = in_common(
        [predict(which, job.dataset, job.choosing, job.frozen, job.given.memory) for which in (learner, other)]
    )
    head, metric = learner.objective.default_head, job.dataset.metric
    pair = (Answers.of(ours, head), Answers.of(theirs, "vision"))
    interval = bootstrap_images([pair], metric)
    nll_N = image_losses(ours, head) - image_losses(theirs, "vision")
    figures = [evaluate_split(said)[which] for said, which in ((ours, head), (theirs, "vision"))]
    return {
        "arm": "ce",
        "split": "val",
        "num_samples": len(ours),
        "metric": metric,
        metric: figures[1][metric],
        "difference": figures[0][metric] - figures[1][metric],
        "interval": list(interval) if interval else None,
        "nll": figures[1]["nll"],
        "nll_difference": float(nll_N.mean()),
        "nll_standard_error": float(nll_N.std(ddof=1) / len(nll_N) ** 0.5) if len(nll_N) > 1 else None,
    }


def _default(key: str) -> Any:
    room, _, name = key.partition(".")
    return type(Config.model_fields[room].default).model_fields[name].default


def render(arm: str, against: dict[str, Any]) -> str:
    interval, error = against["interval"], against["nll_standard_error"]
    sure = f" (95 % {100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})" if interval else ""
    spread = f" ± {error:.3f}" if error is not None else ""
    metric = METRICS[against["metric"]]
    return (
        f"`{arm}` against plain fine-tuning (`ce`) on {counted(against['num_samples'], 'validation image')}:"
        f" {100 * against['difference']:+.1f} points {metric}{sure}: {judged(*(interval or (-1, 1)))};"
        f" NLL {against['nll_difference']:+.3f}{spread}: {_judged_nll(against['nll_difference'], error)}."
        " One draw; `tes compare` tells how sure."
    )


def _judged_nll(difference: float, error: float | None) -> str:
    margin = float("inf") if error is None else 2 * error
    return judged(-difference - margin, -difference + margin)
