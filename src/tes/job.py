"""One run, from what was loaded to a finished run folder. A comparison does many from one `Loaded`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tes import against as against_room
from tes import console, resume, run_writer
from tes.card import model_card
from tes.config import CheckpointConfig, Config
from tes.engine.checkpoint import Checkpoint
from tes.engine.features import FrozenFeatures
from tes.engine.fit import Fitted, fit
from tes.engine.learner import Learner
from tes.engine.loader import steps_per_epoch
from tes.engine.scoring import out_of_fold, predict
from tes.errors import RunError
from tes.files import append_jsonl, write_atomic
from tes.loaded import Loaded
from tes.metrics import METRICS, evaluate_split, image_losses
from tes.mistakes import worth_showing
from tes.predictions import Predictions, in_common
from tes.prepare import VAL_SELECTED, Job, Protocol, prepare
from tes.run import FORMAT
from tes.search import choose, draw_trials, space
from tes.statistics import standard_error

PAPER_EPOCHS = 5
"""The authors' code looks at the test split every so many epochs."""


def run_job(
    config: Config,
    loaded: Loaded,
    folder: Path,
    *,
    protocol: Protocol = VAL_SELECTED,
    store: MutableMapping[str, Any] | None = None,
    shared: run_writer.Shared | None = None,
    against: bool | None = None,
    goes_on: bool = False,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Settle, fit, score and write one run into an empty folder, or one that holds its beginning.

    Args:
        config: As the user left it; gaps are decided here.
        loaded: The data and the backbone that it names.
        folder: Exists, and is empty unless the run goes on.
        protocol: How it is chosen and scored.
        store: What arms share, see `Given`.
        shared: Where a cell of a comparison keeps what it has in common with the others.
        against: Train `ce` from `probe` as well and say how far the run is from it on val; None: where it takes
            seconds, with `train: head`.
        goes_on: The folder holds the beginning of this very run. Everything is done again but the steps of trainings
            that `state/` has.
        on_ready: Called when everything that can be refused has been, and work worth keeping begins.

    Raises:
        TesError: A sentence about the input or the environment.
    """
    began = time.monotonic()
    job = prepare(config, loaded, protocol, store=store, begun_in=folder if goes_on else None)
    kept = _write_beginning(folder, job, shared, goes_on)
    on_ready()
    journal = _Journal(folder, job.config.checkpoint, keeps_states=job.config.train != "head")
    said: dict[str, Predictions] = {}
    if shared is None and job.config.start != "random" and len(job.train):
        doubtful = out_of_fold(job.config, job.given)
        if doubtful is not None:
            said["train"] = doubtful
            run_writer.write_out_of_fold(folder, doubtful)

    trials, selected = _train(job, journal)
    job, fitted = trials[selected].job, trials[selected].fitted
    assert fitted is not None
    if selected:
        run_writer.write_inputs(folder, job.config, loaded.backbone.images)
    predicted, metrics = _score(folder, job, fitted, journal, is_cell=shared is not None)
    if shared is None:
        _say_what_steps_did(job, fitted, metrics)
    said |= predicted
    if shared is None:
        head = fitted.learner.objective.default_head
        run_writer.write_thumbnails(folder / "thumbnails", job.dataset, worth_showing(said, head))

    shipped = fitted if job.config.refit == "none" else _refit(job, journal)
    if shipped.trust_C is not None:
        run_writer.write_classes(folder, job.dataset, job.class_text, job.sources, shipped.trust_C)
    kept |= run_writer.write_model(folder, shipped, job.class_text, shared if job.config.train == "head" else None)

    summary = _summary(job, fitted, shipped, metrics)
    if lost := job.dataset.lost:
        console.warn(f"{len(lost)} images were lost on the way and done without: `lost` in run.json lists them")
    if protocol.num_trials > 1:
        summary["trials"] = [trial.row() for trial in trials]
        summary["selected_trial"] = selected
    if kept:
        summary["shared"] = kept
    if _has_rival(job, against):
        log, checkpoint = journal.log_with({"arm": "ce"}), journal.checkpoint("against")
        summary["against"] = against_room.against_ce(job, fitted.learner, log, checkpoint)
        console.note(against_room.render(job.arm, summary["against"]))
    card = model_card(job.dataset.classes, summary, job.config.seed, job.objective_class.citation)
    write_atomic(folder / "README.md", card)
    append_jsonl(folder / "timing.jsonl", {"seconds": round(time.monotonic() - began, 3)})
    run_writer.write_summary(folder, summary)
    shutil.rmtree(folder / "state", ignore_errors=True)


@dataclass(frozen=True)
class _Journal:
    """What a training leaves while it goes: the rows of metrics.jsonl, and its state."""

    folder: Path
    settings: CheckpointConfig
    keeps_states: bool

    def log(self, row: dict[str, Any]) -> None:
        self._append("metrics.jsonl", row)

    def log_with(self, more: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
        """Return a `log` that adds `more` to every row."""
        return lambda row: self.log(row | more)

    def checkpoint(self, training: str) -> Checkpoint:
        """Return where a training's state is kept: nowhere, if all of it takes no steps."""
        path = self.folder / "state" / f"{training}.safetensors" if self.keeps_states else None
        return Checkpoint(path, self.settings, partial(self._log_save, training))

    def _log_save(self, training: str, step: int, seconds: float, num_bytes: int) -> None:
        row = {"saved": training, "step": step, "seconds": round(seconds, 4), "bytes": num_bytes}
        self._append("timing.jsonl", row)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        path = self.folder / name
        try:
            append_jsonl(path, row)
        except OSError as problem:
            raise RunError(f"`{path}` cannot be written: {problem.strerror or problem}.") from None


def _write_beginning(folder: Path, job: Job, shared: run_writer.Shared | None, goes_on: bool) -> dict[str, str]:
    """Write all that is known before training; return what is kept in `shared/` instead, by its name in a run."""
    content = job.content()
    if goes_on:
        resume.refuse_other_content(folder, content)
        (folder / "metrics.jsonl").unlink(missing_ok=True)  # its rows up to the saved state are logged again from there
    run_writer.write_inputs(folder, job.config, job.loaded.backbone.images)
    run_writer.write_classes(folder, job.dataset, job.class_text, job.sources)
    kept: dict[str, str] = {}
    if shared is None:
        run_writer.write_splits(folder / "splits.csv", job.dataset)
    else:
        draw = (job.config.data.shots, job.config.data.fraction, job.config.seed)
        kept["splits.csv"] = shared.keep("splits.csv", draw, lambda path: run_writer.write_splits(path, job.dataset))
    if job.config.train != "head":
        resume.begin(folder, content)
    return kept


@dataclass(frozen=True)
class _Trial:
    """One trial of the search: what it set, what came out, and what that says about the images that choose."""

    settings: dict[str, Any]
    job: Job
    fitted: Fitted | None
    head: str
    predictions: Predictions | None

    def row(self) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        if self.predictions is not None:
            scores = evaluate_split(self.predictions)[self.head]
            figures = {name: scores[name] for name in ("nll", "mean_per_class", "top1")}
        return {"settings": self.settings} | figures


def _train(job: Job, journal: _Journal) -> tuple[list[_Trial], int]:
    """Return the trials, the first of them with the defaults, and which is chosen; without a search there is one."""
    trials: list[_Trial] = []
    selected = 0
    for number, settings in enumerate(draw_trials(space(job.config, job.objective_class), job.protocol.num_trials)):
        trials.append(_train_trial(number, settings, job, journal))
        selected = _select(trials, job.protocol)
        # The networks of those that can no longer be chosen are let go of.
        trials = [
            trial if number in (0, selected) else replace(trial, fitted=None) for number, trial in enumerate(trials)
        ]
    return trials, selected


def _train_trial(number: int, settings: dict[str, Any], job: Job, journal: _Journal) -> _Trial:
    log = journal.log
    if settings:
        settings = _with_head_rate(settings, job.config)
        job = job.with_settings(settings)
        log = journal.log_with({"trial": settings})
    coarse = run_writer.coarse_names(job.dataset)

    def evaluate(learner: Learner, features: FrozenFeatures | None) -> dict[str, Any]:
        return evaluate_split(predict(learner, job.dataset, job.choosing, features, job.given.memory), coarse)

    on_test = job.protocol.selects_on_test
    looks_every = PAPER_EPOCHS * steps_per_epoch(len(job.train), job.config.optim.batch_size) if on_test else None
    fitted = fit(
        job.config,
        job.given,
        job.train,
        log=log,
        evaluate=evaluate if len(job.choosing) else None,
        evaluated="test" if on_test else "val",
        keep_best=on_test,
        evaluate_every=looks_every,
        checkpoint=journal.checkpoint(f"trial-{number}"),
    )
    predictions = None
    if len(job.choosing) and job.protocol.num_trials > 1:
        predictions = predict(fitted.learner, job.dataset, job.choosing, job.frozen, job.given.memory)
    return _Trial(settings, job, fitted, fitted.learner.objective.default_head, predictions)


def _with_head_rate(settings: dict[str, Any], config: Config) -> dict[str, Any]:
    """Move the head's learning rate with the backbone's."""
    if "optim.learning_rate" not in settings:
        return settings
    assert config.optim.learning_rate and config.optim.head_learning_rate, "settled"
    ratio = config.optim.head_learning_rate / config.optim.learning_rate
    return settings | {"optim.head_learning_rate": ratio * settings["optim.learning_rate"]}


def _select(trials: list[_Trial], protocol: Protocol) -> int:
    predictions = [trial.predictions for trial in trials if trial.predictions is not None]
    if len(predictions) < len(trials):
        return 0
    predictions = in_common(predictions)
    heads = [trial.head for trial in trials]
    if protocol.selects_on_test:
        metric = trials[0].job.dataset.metric
        scores = [evaluate_split(said)[head][metric] for said, head in zip(predictions, heads)]
        return int(np.argmax(scores))
    losses = [image_losses(said, head) for said, head in zip(predictions, heads)]
    return choose(losses)


def _score(
    folder: Path, job: Job, fitted: Fitted, journal: _Journal, is_cell: bool
) -> tuple[dict[str, Predictions], dict[str, dict[str, Any]]]:
    """Predict the splits to be scored and write that down; return predictions and metrics by split."""
    said: dict[str, Predictions] = {}
    metrics: dict[str, dict[str, Any]] = {}
    for split, indices in job.protocol.scored(job.dataset, job.config.data).items():
        # Of a single run nobody comes back for the test images.
        memory = job.given.memory if is_cell or split == "val" else None
        said[split] = predict(fitted.learner, job.dataset, indices, job.frozen, memory)
        metrics[split] = run_writer.write_predictions(folder, split, said[split], job.dataset)
        journal.log({"split": split, "step": job.config.optim.num_steps or 0, "heads": metrics[split]})
    return said, metrics


def _say_what_steps_did(job: Job, fitted: Fitted, metrics: dict[str, dict[str, Any]]) -> None:
    """Say how far the trained network is from the head that it started from, on the images that may choose."""
    if fitted.started is None or job.protocol != VAL_SELECTED or "val" not in metrics:
        return
    head, metric = fitted.learner.objective.default_head, job.dataset.metric
    before, after = (figures[head][metric] for figures in (fitted.started, fitted.ended or metrics["val"]))
    num_images = len(job.choosing)
    error = standard_error(np.array([before * num_images]), np.array([num_images]))
    moved = f"on val from {before:.1%} (the head that it started from) to {after:.1%} {METRICS[metric]}"
    if job.config.start_fallback == "val" and fitted.fell_back(metric):
        console.warn(f"the steps took it {moved}: the start is shipped, as `start_fallback` says")
    elif before - after > 2 * error:
        console.warn(f"the steps took it down, {moved}: try a lower --lr, --train head, or --set start_fallback=val")
    else:
        console.note(f"the steps took it {moved}")


def _refit(job: Job, journal: _Journal) -> Fitted:
    """Train once more, on what chose and maybe on test as well: this is what is shipped."""
    splits = ("train", "val") if job.config.refit == "trainval" else ("train", "val", "test", "unused")
    console.note(f"refit on {' + '.join(splits)}; all figures are those before the refit")
    indices = np.sort(np.concatenate([job.dataset.indices(split) for split in splits]))
    log, checkpoint = journal.log_with({"refit": True}), journal.checkpoint("refit")
    return fit(job.config, job.given, indices, log=log, checkpoint=checkpoint)


def _summary(job: Job, fitted: Fitted, shipped: Fitted, metrics: dict[str, Any]) -> dict[str, Any]:
    """Return what run.json says of every run."""
    config, dataset, class_text = job.config, job.dataset, job.class_text
    summary = {
        "format": FORMAT,
        "status": "complete",
        "arm": job.arm,
        "start": config.start,
        "train": config.train,
        "refit": config.refit,
        "protocol": job.protocol.name,
        "default_head": shipped.learner.objective.default_head,
        "primary_metric": dataset.metric,
        "data": dataset.name,
        "num_classes": dataset.num_classes,
        "num_train": len(dataset.present(job.train)),
        "num_val": 0 if job.protocol.selects_on_test else len(dataset.present(dataset.indices("val"))),
        "num_test": len(dataset.present(dataset.indices("test"))),
        "num_pool": int((dataset.splits != "test").sum()),
        "unreadable": [{"path": path, "reason": reason} for path, reason in dataset.unreadable],
        "backbone": {"name": config.backbone.name, "fingerprint": job.loaded.backbone.fingerprint},
        "text": {"encoder": class_text.encoder} if class_text is not None else None,
        "objective": fitted.figures,
        "metrics": metrics,
    }
    if dataset.lost:
        summary["lost"] = [{"path": dataset.paths[index], "reason": why} for index, why in sorted(dataset.lost.items())]
    if config.start_fallback == "val":
        summary["shipped"] = "start" if fitted.fell_back(dataset.metric) else "trained"
        summary["start_fallback"] = {"start": fitted.started, "trained": fitted.ended}
    if fitted.trust_C is not None:
        summary["prior"] = {
            "form": config.prior.form,
            "trust": round(fitted.trust_C.mean().item(), 6),
            "num_known": sum(source.known for source in job.sources or ()),
        }
    return summary


def _has_rival(job: Job, against: bool | None) -> bool:
    """Whether `ce` is to be trained as well, and is something else than this run."""
    is_plain = job.config.objective.name == "ce" and job.config.start == "probe"
    wanted = job.config.train == "head" if against is None else against
    return wanted and not is_plain and not job.protocol.selects_on_test and bool(len(job.choosing) and len(job.train))
