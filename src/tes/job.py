"""One run, from what was loaded to a finished run folder. A comparison does many from one `Loaded`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tes import against as against_room
from tes import console, data, resume, run_writer, text
from tes.card import model_card
from tes.config import PRIOR_STARTS, Config, DataConfig
from tes.data.dataset import Dataset
from tes.engine.checkpoint import Checkpoint
from tes.engine.fit import Fitted, Given, fit
from tes.engine.learner import Learner
from tes.engine.loader import steps_per_epoch
from tes.engine.scoring import out_of_fold, predict
from tes.errors import RunError
from tes.files import append_jsonl, sha256_text, write_atomic
from tes.loaded import Loaded
from tes.metrics import evaluate_split, image_losses
from tes.mistakes import worth_showing
from tes.objectives import objectives
from tes.objectives.base import Objective
from tes.predictions import Predictions, in_common
from tes.run import FORMAT
from tes.search import choose, draw_trials, space
from tes.settle import settle

PAPER_EPOCHS = 5
"""The authors' code looks at the test split every so many epochs."""
PROTOCOLS = {"val": "val-selected", "paper": "paper"}
"""`--protocol` to what the tables call it."""


@dataclass(frozen=True)
class Protocol:
    """How a run is chosen and scored.

    Attributes:
        name: `val-selected`: whatever is chosen is chosen on val. `paper`: train and val are trained on, and the best
            of the epochs (and trials) on test is kept, as the authors' code does; its figures are test-selected.
        split: `test`, or `val` for designing defaults: test is never opened; at k shots the pool's unused images are
            scored, and, where nothing was chosen with them, the val images too.
        num_trials: Of the search; 1: the defaults.
    """

    name: str = "val-selected"
    split: str = "test"
    num_trials: int = 1

    def training(self, dataset: Dataset) -> np.ndarray:
        """Return the images that are trained on."""
        val = dataset.indices("val") if self.name == "paper" else []
        return np.sort(np.concatenate([dataset.indices("train"), val]).astype(np.int64))

    def choosing(self, dataset: Dataset) -> np.ndarray:
        """Return the images that epochs and trials are judged by."""
        return dataset.indices("test" if self.name == "paper" else "val")

    def scored(self, dataset: Dataset, config: DataConfig) -> dict[str, np.ndarray]:
        """Return the images that the finished model is scored on, by split; none of them empty."""
        val, test = dataset.indices("val"), dataset.indices("test")
        if self.name == "paper":
            parts = {"test": test}
        elif self.split == "val":
            pool = dataset.indices("unused") if config.shots is not None else np.empty(0, dtype=np.int64)
            parts = {"val": np.sort(np.concatenate([pool, val if self.num_trials == 1 or not len(pool) else pool[:0]]))}
        else:
            parts = {"val": val, "test": test}
        return {name: indices for name, indices in parts.items() if len(indices)}


def run_job(
    config: Config,
    loaded: Loaded,
    folder: Path,
    *,
    protocol: Protocol = Protocol(),
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
    objective_class: type[Objective] = objectives.get(config.objective.name)
    arm = config.arm
    dataset = data.draw(loaded.dataset, config.data, config.seed)
    describe(dataset)
    train, choosing = protocol.training(dataset), protocol.choosing(dataset)
    if goes_on:
        config = resume.as_begun(config, folder)
    asked = config
    settled = settle(config, dataset, loaded.backbone, objective_class, loaded.source_text, len(train))
    config, compute = settled.config, settled.compute
    if goes_on:
        resume.refuse_other(config, folder)
    class_text = None
    if "class_text" in objective_class.needs or config.start in PRIOR_STARTS:
        class_text = loaded.class_text(config.text)
        _note_all(class_text.notes)
        for line in text.warnings(class_text, dataset.classes):
            console.warn(line)
    _note_all(loaded.backbone.notes)
    if settled.reasons:
        _note_all(["decided for you:", *settled.reasons])

    # The fit, and what it says about images it has not seen.
    features = loaded.features(compute)
    rows_CD = torch.from_numpy(class_text.Z) if class_text is not None else None
    given = Given(dataset, features, rows_CD, loaded.prior(config), {} if store is None else store)
    sources = loaded.nearest() if config.start in PRIOR_STARTS else None
    content = {
        "images": sha256_text(dataset.paths, dataset.labels.tolist(), dataset.splits.tolist(), dataset.sha1s),
        "weights": loaded.backbone.fingerprint,
        "texts": "" if class_text is None else sha256_text(class_text.Z.tobytes().hex()),
        "protocol": protocol.name,
    }
    if goes_on:
        resume.refuse_other_content(folder, content)
        (folder / "metrics.jsonl").unlink(missing_ok=True)  # its rows up to the saved state are logged again from there
    run_writer.write_inputs(folder, config, loaded.backbone.images)
    run_writer.write_classes(folder, dataset, class_text, sources)
    kept: dict[str, str] = {}
    if shared is None:
        run_writer.write_splits(folder / "splits.csv", dataset)
    else:
        draw = (config.data.shots, config.data.fraction, config.seed)
        kept["splits.csv"] = shared.keep("splits.csv", draw, lambda path: run_writer.write_splits(path, dataset))
    if config.train != "head":
        resume.begin(folder, content)
    on_ready()
    log = partial(_append, folder / "metrics.jsonl")

    def checkpoint(name: str) -> Checkpoint:
        timing = partial(_log_save, folder / "timing.jsonl", name)
        path = folder / "state" / f"{name}.safetensors" if config.train != "head" else None
        return Checkpoint(path, config.checkpoint, timing)

    said: dict[str, Predictions] = {}
    if shared is None and config.start != "random" and len(train):
        said["train"] = out_of_fold(config, given)
        run_writer.write_out_of_fold(folder, said["train"])
    coarse = run_writer.coarse_names(dataset)

    def score(learner: Learner) -> dict[str, Any]:
        return evaluate_split(predict(learner, dataset, choosing), coarse)

    attempts: list[_Attempt] = []
    selected = 0
    for number, settings in enumerate(draw_trials(space(config, objective_class), protocol.num_trials)):
        kept_in = checkpoint(f"trial-{number}")
        attempts.append(_attempt(config, settings, loaded, given, train, choosing, protocol, log, score, kept_in))
        selected = _select(attempts, protocol)
        # The networks of those that can no longer be chosen are let go of.
        attempts = [
            attempt if number in (0, selected) else replace(attempt, fitted=None)
            for number, attempt in enumerate(attempts)
        ]
    config, given, fitted = attempts[selected].config, attempts[selected].given, attempts[selected].fitted
    assert fitted is not None
    if selected:
        run_writer.write_inputs(folder, config, loaded.backbone.images)
    if "kl_label_to_reference" in fitted.figures:
        distance = fitted.figures["kl_label_to_reference"]
        console.note(f"KL(label ‖ softened target) is {distance:.3g} on average; at 0 `{arm}` is plain cross-entropy")
    frozen = features if config.train == "head" else None
    metrics: dict[str, Any] = {}
    for split, indices in protocol.scored(dataset, config.data).items():
        said[split] = predict(fitted.learner, dataset, indices, frozen)
        metrics[split] = run_writer.write_predictions(folder, split, said[split], dataset)
        log({"split": split, "step": config.optim.num_steps or 0, "heads": metrics[split]})
    if shared is None:
        head = fitted.learner.objective.default_head
        run_writer.write_thumbnails(folder / "thumbnails", dataset, worth_showing(said, head))

    # What is shipped.
    if config.refit != "none":
        splits = ("train", "val") if config.refit == "trainval" else ("train", "val", "test", "unused")
        console.note(f"refit on {' + '.join(splits)}; all figures are those before the refit")
        everything = np.sort(np.concatenate([dataset.indices(split) for split in splits]))
        log_refit = partial(_log_more, log, {"refit": True})
        shipped = fit(config, given, everything, log=log_refit, checkpoint=checkpoint("refit"))
    else:
        shipped = fitted
    if shipped.trust_C is not None:
        run_writer.write_classes(folder, dataset, class_text, sources, shipped.trust_C)
    kept |= run_writer.write_model(folder, shipped, class_text, shared if config.train == "head" else None)

    summary = {
        "format": FORMAT,
        "status": "complete",
        "arm": arm,
        "start": config.start,
        "train": config.train,
        "refit": config.refit,
        "protocol": protocol.name,
        "default_head": shipped.learner.objective.default_head,
        "primary_metric": dataset.metric,
        "data": dataset.name,
        "num_classes": dataset.num_classes,
        "num_train": len(dataset.present(train)),
        "num_val": 0 if protocol.name == "paper" else len(dataset.present(dataset.indices("val"))),
        "num_test": len(dataset.present(dataset.indices("test"))),
        "num_pool": int((dataset.splits != "test").sum()),
        "unreadable": [{"path": path, "reason": reason} for path, reason in dataset.unreadable],
        "backbone": {"name": config.backbone.name, "fingerprint": loaded.backbone.fingerprint},
        "text": {"encoder": class_text.encoder} if class_text is not None else None,
        "objective": fitted.figures,
        "metrics": metrics,
    }
    if dataset.lost:
        summary["lost"] = [{"path": dataset.paths[index], "reason": why} for index, why in sorted(dataset.lost.items())]
        console.warn(f"{len(dataset.lost)} images were lost on the way and done without: `lost` in run.json lists them")
    if fitted.trust_C is not None:
        summary["prior"] = {
            "form": config.prior.form,
            "trust": round(fitted.trust_C.mean().item(), 6),
            "num_known": sum(source.known for source in sources or ()),
        }
    if protocol.num_trials > 1:
        summary["trials"] = [attempt.row() for attempt in attempts]
        summary["selected_trial"] = selected
    if kept:
        summary["shared"] = kept
    is_plain = config.objective.name == "ce" and config.start == "probe"
    wanted = config.train == "head" if against is None else against
    if wanted and not is_plain and protocol.name != "paper" and len(choosing) and len(train):
        summary["against"] = against_room.against_ce(
            asked, loaded, given, train, choosing, fitted.learner, frozen, log, checkpoint("against")
        )
        console.note(against_room.render(arm, summary["against"]))
    write_atomic(folder / "README.md", model_card(dataset.classes, summary, config.seed, objective_class.citation))
    append_jsonl(folder / "timing.jsonl", {"seconds": round(time.monotonic() - began, 3)})
    run_writer.write_summary(folder, summary)
    shutil.rmtree(folder / "state", ignore_errors=True)


def _append(path: Path, row: dict[str, Any]) -> None:
    try:
        append_jsonl(path, row)
    except OSError as problem:
        raise RunError(f"`{path}` cannot be written: {problem.strerror or problem}.") from None


def _log_save(path: Path, name: str, step: int, seconds: float, num_bytes: int) -> None:
    _append(path, {"saved": name, "step": step, "seconds": round(seconds, 4), "bytes": num_bytes})


@dataclass(frozen=True)
class _Attempt:
    """One trial: what it set, what came out, and what it says about the images that choose."""

    settings: dict[str, Any]
    config: Config
    given: Given
    fitted: Fitted | None
    head: str
    predictions: Predictions | None

    def row(self) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        if self.predictions is not None:
            scores = evaluate_split(self.predictions)[self.head]
            figures = {name: scores[name] for name in ("nll", "mean_per_class", "top1")}
        return {"settings": self.settings} | figures


def _attempt(
    config: Config,
    settings: dict[str, Any],
    loaded: Loaded,
    given: Given,
    train: np.ndarray,
    choosing: np.ndarray,
    protocol: Protocol,
    log: Callable[[dict[str, Any]], None],
    score: Callable[[Learner], dict[str, Any]],
    checkpoint: Checkpoint,
) -> _Attempt:
    if settings:
        if "optim.learning_rate" in settings:
            assert config.optim.learning_rate and config.optim.head_learning_rate, "settled"
            ratio = config.optim.head_learning_rate / config.optim.learning_rate
            settings = settings | {"optim.head_learning_rate": ratio * settings["optim.learning_rate"]}
        config = config.replace(settings)
        given = replace(given, prior=loaded.prior(config))
        log = partial(_log_more, log, {"trial": settings})
    paper = protocol.name == "paper"
    fitted = fit(
        config, given, train, log=log, evaluate=score if len(choosing) else None, keep_best=paper,
        evaluate_every=PAPER_EPOCHS * steps_per_epoch(len(train), config.optim.batch_size) if paper else None,
        checkpoint=checkpoint,
    )  # fmt: skip
    predictions = None
    if len(choosing) and protocol.num_trials > 1:
        frozen = given.features if config.train == "head" else None
        predictions = predict(fitted.learner, given.dataset, choosing, frozen)
    return _Attempt(settings, config, given, fitted, fitted.learner.objective.default_head, predictions)


def _log_more(log: Callable[[dict[str, Any]], None], more: dict[str, Any], row: dict[str, Any]) -> None:
    log(row | more)


def _select(attempts: list[_Attempt], protocol: Protocol) -> int:
    predictions = [attempt.predictions for attempt in attempts if attempt.predictions is not None]
    if len(predictions) < len(attempts):
        return 0
    predictions = in_common(predictions)
    heads = [attempt.head for attempt in attempts]
    if protocol.name == "paper":
        metric = attempts[0].given.dataset.metric
        scores = [evaluate_split(said)[head][metric] for said, head in zip(predictions, heads)]
        return int(np.argmax(scores))
    losses = [image_losses(said, head) for said, head in zip(predictions, heads)]
    return choose(losses)


def describe(dataset: Dataset) -> None:
    """Say what the data set holds, how its class names are read, and what was left out."""
    counts = ", ".join(f"{len(dataset.indices(split))} {split}" for split in ("train", "val", "test"))
    console.note(f"{dataset.name}: {dataset.num_classes} classes; {counts} images")
    renamed = [f"{info.label} → {info.name}" for info in dataset.classes if info.label != info.name]
    if renamed:
        console.note(f"class names are read as: {', '.join(renamed[:4])}{', …' if len(renamed) > 4 else ''}")
    _note_all(dataset.notes)


def _note_all(lines: Iterable[str]) -> None:
    for line in lines:
        console.note(line)
