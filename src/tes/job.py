"""One run, from what was loaded to a finished run folder. A comparison does many from one `Loaded`."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tes import console, data, run_writer, text
from tes.card import model_card
from tes.config import PRIOR_STARTS, Config, DataConfig, TextConfig
from tes.data.dataset import Dataset
from tes.data.splits import find_units
from tes.engine.compute import Compute
from tes.engine.features import FrozenFeatures, compute_features
from tes.engine.fit import Fitted, Given, fit, head_problem
from tes.engine.learner import Learner
from tes.engine.loader import steps_per_epoch
from tes.engine.prior import CONTROLS, predict_rows
from tes.engine.solve import Prior
from tes.engine.start import out_of_fold_logits
from tes.errors import TextError, TrainingError
from tes.files import append_jsonl, write_atomic, write_json
from tes.metrics import evaluate_split
from tes.models.backbone import Backbone, load_backbone
from tes.objectives import objectives
from tes.objectives.base import Objective
from tes.predictions import Predictions
from tes.run import FORMAT
from tes.search import choose, draw_trials, space
from tes.settle import settle
from tes.statistics import Answers, bootstrap_images
from tes.text.classifier import TextClassifier
from tes.text.vocabulary import NearestSource, SourceText, embed_source, nearest_source

PRIMARY_METRIC = "mean_per_class"
PAPER_EPOCHS = 5
"""The authors' code looks at the test split every so many epochs."""


@dataclass(eq=False)
class Loaded:
    """What runs are made from: opened once, shared by all that follow, never changed by any of them.

    Attributes:
        dataset: Opened, with its official or carved splits; shots are drawn from it per run.
        backbone: Pre-trained.
    """

    dataset: Dataset
    backbone: Backbone
    _texts: dict[TextConfig, TextClassifier] = field(default_factory=dict)
    _sources: dict[TextConfig, SourceText | str] = field(default_factory=dict)
    _nearest: list[NearestSource] | None = None
    _features: dict[Compute, FrozenFeatures] = field(default_factory=dict)

    @staticmethod
    def open(config: Config, network: nn.Module | None = None) -> Loaded:
        """Open the data and load the backbone that `config` names.

        Raises:
            TesError: A sentence about the input or the environment.
        """
        dataset = data.open_dataset(config.data)
        return Loaded(dataset, load_backbone(config.backbone, config.image, network))

    def class_text(self, config: TextConfig) -> TextClassifier:
        """Return the text classifier of the data's classes."""
        if config not in self._texts:
            built = text.build(self.dataset.classes, config, centre=config.centre is not False)
            built.aligned_with(self.dataset.classes)
            self._texts[config] = built
        return self._texts[config]

    def source_text(self, config: TextConfig) -> SourceText | str:
        """Return the source classes' rows, or, where a text prior is not possible, why."""
        if config not in self._sources:
            self._sources[config] = _embed_source(self.backbone, config)
        return self._sources[config]

    def nearest(self) -> list[NearestSource] | None:
        """Return the nearest source name per class; None where the backbone's source classes are not known."""
        head = self.backbone.source_head
        if self._nearest is None and head is not None and head.names is not None:
            self._nearest = nearest_source(self.dataset.classes, head.names)
        return self._nearest

    def features(self, compute: Compute) -> FrozenFeatures:
        """Return the data's features under the pre-trained backbone."""
        if compute not in self._features:
            self._features[compute] = FrozenFeatures(self.backbone, self.dataset, compute)
        return self._features[compute]

    def prior(self, config: Config) -> Prior | None:
        """Return the text prior of a settled run; None where its start has none."""
        if config.start not in PRIOR_STARTS:
            return None
        source, head = self.source_text(config.text), self.backbone.source_head
        assert isinstance(source, SourceText) and head is not None, "settle() refuses it"
        control = config.start.removeprefix("probe+")
        rows_CF = predict_rows(
            torch.from_numpy(self.class_text(config.text).uncentred),
            torch.from_numpy(source.rows_SD),
            head.weight_SF,
            config.prior.gamma,
            config.prior.rho,
            control=control if control in CONTROLS else None,
            seed=config.seed,
        )
        return Prior(rows_CF, config.prior.form, config.prior.kappa, config.prior.zero_shot_trust)


def _embed_source(backbone: Backbone, config: TextConfig) -> SourceText | str:
    if backbone.source_head is None:
        return f"`{backbone.name}` has no classifier from its pre-training"
    if backbone.source_head.names is None:
        return f"the names of `{backbone.name}`'s source classes are not known (say so with backbone.source_classes)"
    try:
        return embed_source(backbone.source_head.names, config)
    except TextError as problem:
        return f"`{config.encoder}` cannot embed the source classes' names ({problem})"


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
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Settle, fit, score and write one run into an empty folder.

    Args:
        config: As the user left it; gaps are decided here.
        loaded: The data and the backbone that it names.
        folder: Exists and is empty.
        protocol: How it is chosen and scored.
        store: What arms share, see `Given`.
        shared: Where a cell of a comparison keeps what it has in common with the others.
        against: Train `ce` from `probe` as well and say how far the run is from it on val; None: where it takes
            seconds, with `train: head`.
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
    asked = config
    settled = settle(config, dataset, loaded.backbone, objective_class, loaded.source_text, len(train))
    config, compute = settled.config, settled.compute
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
    run_writer.write_inputs(folder, config, loaded.backbone.images)
    run_writer.write_classes(folder, dataset, class_text, sources)
    kept: dict[str, str] = {}
    if shared is None:
        run_writer.write_splits(folder / "splits.csv", dataset)
        run_writer.write_thumbnails(folder / "thumbnails", dataset)
    else:
        draw = (config.data.shots, config.data.fraction, config.seed)
        kept["splits.csv"] = shared.keep("splits.csv", draw, lambda path: run_writer.write_splits(path, dataset))
    on_ready()
    log = partial(append_jsonl, folder / "metrics.jsonl")
    if shared is None and config.start != "random" and len(train):
        run_writer.write_out_of_fold(folder, out_of_fold(config, given))
    coarse = run_writer.coarse_names(dataset)

    def score(learner: Learner) -> dict[str, Any]:
        return evaluate_split(predict(learner, dataset, choosing), coarse)

    attempts: list[_Attempt] = []
    selected = 0
    for settings in draw_trials(space(config, objective_class), protocol.num_trials):
        attempts.append(_attempt(config, settings, loaded, given, train, choosing, protocol, log, score))
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
        predictions = predict(fitted.learner, dataset, indices, frozen)
        metrics[split] = run_writer.write_predictions(folder, split, predictions, dataset)
        log({"split": split, "step": config.optim.num_steps or 0, "heads": metrics[split]})

    # What is shipped.
    if config.refit != "none":
        splits = ("train", "val") if config.refit == "trainval" else ("train", "val", "test", "unused")
        console.note(f"refit on {' + '.join(splits)}; all figures are those before the refit")
        everything = np.sort(np.concatenate([dataset.indices(split) for split in splits]))
        shipped = fit(config, given, everything, log=lambda row: log(row | {"refit": True}))
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
        "primary_metric": PRIMARY_METRIC,
        "data": dataset.name,
        "num_classes": dataset.num_classes,
        "num_train": len(train),
        "num_val": 0 if protocol.name == "paper" else len(dataset.indices("val")),
        "num_test": len(dataset.indices("test")),
        "num_pool": int((dataset.splits != "test").sum()),
        "unreadable": [{"path": path, "reason": reason} for path, reason in dataset.unreadable],
        "backbone": {"name": config.backbone.name, "fingerprint": loaded.backbone.fingerprint},
        "text": {"encoder": class_text.encoder} if class_text is not None else None,
        "objective": fitted.figures,
        "metrics": metrics,
    }
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
    if wanted and not is_plain and len(choosing) and len(train):
        summary["against"] = _against_ce(asked, loaded, given, train, choosing, fitted.learner, frozen, log)
        console.note(_against_sentence(arm, summary["against"]))
    write_atomic(folder / "README.md", model_card(config, dataset.classes, summary, objective_class.citation))
    append_jsonl(folder / "timing.jsonl", {"seconds": round(time.monotonic() - began, 3)})
    write_json(folder / "run.json", summary)


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
            figures = {"nll": scores["nll"], "mean_per_class": scores["mean_per_class"]}
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
) -> _Attempt:
    if settings:
        if "optim.learning_rate" in settings:
            assert config.optim.learning_rate and config.optim.head_learning_rate, "settled"
            ratio = config.optim.head_learning_rate / config.optim.learning_rate
            settings = settings | {"optim.head_learning_rate": ratio * settings["optim.learning_rate"]}
        config = config.replace(settings)
        given = replace(given, prior=loaded.prior(config))
        log = partial(_log_trial, log, settings)
    paper = protocol.name == "paper"
    fitted = fit(
        config, given, train, log=log, evaluate=score if len(choosing) else None, keep_best=paper,
        num_evaluations=max(1, _num_epochs(config, len(train)) // PAPER_EPOCHS) if paper else 5,
    )  # fmt: skip
    predictions = None
    if len(choosing) and protocol.num_trials > 1:
        frozen = given.features if config.train == "head" else None
        predictions = predict(fitted.learner, given.dataset, choosing, frozen)
    return _Attempt(settings, config, given, fitted, fitted.learner.objective.default_head, predictions)


def _log_trial(log: Callable[[dict[str, Any]], None], settings: dict[str, Any], row: dict[str, Any]) -> None:
    log(row | {"trial": settings})


def _num_epochs(config: Config, num_images: int) -> int:
    return (config.optim.num_steps or 0) // steps_per_epoch(num_images, config.optim.batch_size)


def _select(attempts: list[_Attempt], protocol: Protocol) -> int:
    predictions = [attempt.predictions for attempt in attempts]
    if None in predictions:
        return 0
    heads = [attempt.head for attempt in attempts]
    if protocol.name == "paper":
        scores = [evaluate_split(said)[head][PRIMARY_METRIC] for said, head in zip(predictions, heads)]
        return int(np.argmax(scores))
    losses = [_losses(said, head) for said, head in zip(predictions, heads)]
    return choose(losses)


def _losses(predictions: Predictions, head: str) -> np.ndarray:
    """Return -log p(true class | image), (n,)."""
    log_p_NC = predictions.log_probabilities(head)
    return -np.take_along_axis(log_p_NC, predictions.labels[:, None], axis=1)[:, 0]


def _against_ce(
    asked: Config,
    loaded: Loaded,
    given: Given,
    train: np.ndarray,
    choosing: np.ndarray,
    learner: Learner,
    frozen: FrozenFeatures | None,
    log: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Train `ce` from `probe` on the same images and compare the two on val, image by image."""
    # Settled anew: `ce` from a probe has learning rates, and a weight decay, of its own.
    own = {key: _default(key) for key, value in asked.objective.defaults.items() if _value(asked, key) == value}
    plain = asked.replace({"objective": {"name": "ce"}, "start": "probe"} | own)
    plain = settle(plain, given.dataset, loaded.backbone, objectives.get("ce"), loaded.source_text, len(train)).config
    other = fit(plain, replace(given, prior=None), train, log=lambda row: log(row | {"arm": "ce"})).learner
    ours, theirs = (predict(which, given.dataset, choosing, frozen) for which in (learner, other))
    head = learner.objective.default_head
    pair = (Answers.of(ours, head), Answers.of(theirs, "vision"))
    interval = bootstrap_images([pair], PRIMARY_METRIC)
    nll_N = _losses(ours, head) - _losses(theirs, "vision")
    figures = [evaluate_split(said)[which] for said, which in ((ours, head), (theirs, "vision"))]
    return {
        "arm": "ce",
        "split": "val",
        "num_samples": len(choosing),
        "mean_per_class": figures[1]["mean_per_class"],
        "difference": figures[0]["mean_per_class"] - figures[1]["mean_per_class"],
        "interval": list(interval) if interval else None,
        "nll": figures[1]["nll"],
        "nll_difference": float(nll_N.mean()),
        "nll_standard_error": float(nll_N.std(ddof=1) / len(nll_N) ** 0.5) if len(nll_N) > 1 else None,
    }


def _value(config: Config, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def _default(key: str) -> Any:
    room, _, name = key.partition(".")
    return type(Config.model_fields[room].default).model_fields[name].default


def _against_sentence(arm: str, against: dict[str, Any]) -> str:
    interval, error = against["interval"], against["nll_standard_error"]
    sure = f" (95 % {100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})" if interval else ""
    spread = f" ± {error:.3f}" if error is not None else ""
    return (
        f"`{arm}` against plain fine-tuning (`ce`) on {against['num_samples']} validation images:"
        f" {100 * against['difference']:+.1f} points mean per class{sure}: {_judged(*(interval or (-1, 1)))};"
        f" NLL {against['nll_difference']:+.3f}{spread}: {_judged_nll(against['nll_difference'], error)}."
        " One draw; `tes compare` tells how sure."
    )


def _judged(low: float, high: float) -> str:
    return "better here" if low > 0 else "worse here" if high < 0 else "no difference that these images can show"


def _judged_nll(difference: float, error: float | None) -> str:
    margin = float("inf") if error is None else 2 * error
    return _judged(-difference - margin, -difference + margin)


def predict(
    learner: Learner, dataset: Dataset, indices: np.ndarray, features: FrozenFeatures | None = None
) -> Predictions:
    """Return every head's logits for the images `indices`; `features` are those of a backbone that was not trained."""
    if features is not None:
        features_NF = features(indices)
    else:
        features_NF = compute_features(learner.backbone, dataset, indices, learner.compute)
    if not torch.isfinite(features_NF).all():
        raise TrainingError(
            "The trained network's features are not finite: training has diverged. Lower the learning rate (--lr), set"
            " optim.clip_norm=1, or use --precision fp32."
        )
    logits = {head: values_NC.numpy() for head, values_NC in learner.heads(features_NF).items()}
    return Predictions([dataset.paths[index] for index in indices], dataset.labels[indices], logits)


def out_of_fold(config: Config, given: Given) -> Predictions:
    """Return what the start's problem says about training images that it was not fitted to (5 folds)."""
    dataset = given.dataset
    indices = dataset.indices("train")
    labels_N = torch.from_numpy(dataset.labels[indices])
    units_N = find_units([dataset.sha1s[index] for index in indices], [dataset.groups[index] for index in indices])
    problem = head_problem(config, given.prior)
    logits_NC = out_of_fold_logits(problem, given.features(indices), labels_N, units_N, dataset.num_classes)
    return Predictions([dataset.paths[index] for index in indices], labels_N.numpy(), {"vision": logits_NC.numpy()})


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
