"""Where fine-tuning has left a run's classifier: METHOD's bias diagnosis, from run folders and their images.

W is the trained vision head. W0 is solved on the pre-trained features of the training images, W0' on the fine-tuned
ones: argmin CE + (0.3/N) ‖V‖², in the scaling of engine/solve.py. Z is the class names' text.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from tes import console, text
from tes.config import TextConfig
from tes.diagnosis import agreement, centred_cosine, debiased_cka, expected_agreement, geometry, marks, sentence
from tes.dot_plot import dot_plot
from tes.engine.solve import LinearHead
from tes.errors import RunError, TesError
from tes.files import user_path, write_atomic, write_json
from tes.metrics import ClassCounts
from tes.reopen import Reopened, data_flags, reopen, saved_classes, saved_rows, section
from tes.run import Run

FORMAT = 1
FIGURES = (
    "num_train", "num_test", "cosine_start", "cosine_features", "agreement", "expected_agreement", "accuracy",
    "accuracy_start", "mean_per_class", "mean_per_class_start", "text", "start_text",
)  # fmt: skip
PENALTY = 0.3
"""Of W0 and W0', whatever the run's own: the same question to every run."""


def diagnose(
    runs: Sequence[Run | str | Path],
    *,
    data_source: str | None = None,
    data_root: str | None = None,
    text_encoder: str | None = None,
    backbone: str | None = None,
    checkpoint: str | None = None,
    network: nn.Module | None = None,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Say how near each run's classifier is to the one that the pre-trained model induces, and to the text.

    Writes `diagnosis.json` and `diagnosis.svg`.

    Args:
        runs: Runs, or their folders.
        data_source: Where the images are: a run folder's word is not enough to open them. None: what the folders
            alone allow.
        text_encoder: Embeds the class names for runs without a text head; None: the recorded one if it is `minilm`.
        data_root: Where tasks' data sets are.
        backbone: Its name, repeated, where it is an own module or has its weights from the Hub.
        checkpoint: Where the pre-trained weights are, if they came from a file; likewise.
        network: An own module itself, pre-trained.
        out: The folder for the two files; None: the first run's.

    Returns:
        {"format", "runs": [a report each], "pairs": [figures between two runs of the same classes], "notes"}. Cosines
        and CKA are in -1..1, agreements and accuracies fractions; what cannot be told is None.

    Raises:
        TesError: A sentence about a run, its images or its backbone.
    """
    opened = [run if isinstance(run, Run) else Run.open(run) for run in runs]
    if not opened:
        raise RunError("There is no run to diagnose; name one or more run folders.")
    for run in opened:
        if run.summary.get("default_head") == "text":
            raise RunError(f"`{run.path}` answers with its text head: it has no trained linear head to diagnose.")
        if not run.summary.get("num_train"):
            raise RunError(f"`{run.path}` was made from 0 shots: nothing was trained, so there is nothing to diagnose.")
    where = {
        "data_source": data_source,
        "data_root": data_root,
        "backbone": backbone,
        "checkpoint": checkpoint,
        "network": network,
    }
    measured = [
        _measure(name, reopen(run, **where)) if data_source is not None else _from_folder(name, run)
        for name, run in zip(_names(opened), opened)
    ]
    notes = [note for one in measured for note in one.notes]
    for one in measured:
        notes += _hold_against_text(one, measured, text_encoder)
    pairs = []
    for one, other in itertools.combinations(measured, 2):
        if one.labels == other.labels:
            pairs.append(_pair(one, other))
        else:
            notes.append(f"{one.report['run']} and {other.report['run']} have other classes and are not compared.")
    for one in measured:
        yardsticks = [_by_rows_of(one, other) for other in measured if _is_yardstick(other, one)]
        one.report["sentence"] = sentence(one.report, yardsticks, pairs)
    result = {
        "format": FORMAT,
        "runs": [one.report for one in measured],
        "pairs": pairs,
        "notes": list(dict.fromkeys(notes)),
    }
    folder = opened[0].path if out is None else user_path(out)
    legend, rows = marks(result)
    described = " ".join(one.report["sentence"] for one in measured)
    write_json(folder / "diagnosis.json", result)
    write_atomic(
        folder / "diagnosis.svg", dot_plot("Near the pre-trained model, or the text?", legend, rows, described)
    )
    return result


@dataclass(eq=False)
class _Measured:
    """A run's classifier as arrays, and what is reported of it."""

    report: dict[str, Any]
    labels: tuple[str, ...]
    fingerprint: str
    weight_CF: np.ndarray
    start_CF: np.ndarray | None
    text_CD: np.ndarray | None
    names_text: bool
    classes: list
    text_config: TextConfig
    answers: dict[str, int]
    truth: dict[str, int]
    notes: list[str]


def _measure(name: str, it: Reopened) -> _Measured:
    summary, dataset = it.run.summary, it.dataset
    test = dataset.indices("test")
    truth_n = dataset.labels[test]
    head, start = it.learner.linear_head(), it.solve_probe(it.start_features, PENALTY)
    induced = it.solve_probe(it.features, PENALTY) if it.moved else start
    predicted_n, start_n = _predicted(head, it.features(test)), _predicted(start, it.start_features(test))
    accuracies = [float((said == truth_n).mean()) if len(test) else None for said in (predicted_n, start_n)]
    weight_CF, start_CF, induced_CF = (part.weight_CF.numpy() for part in (head, start, induced))
    objective = it.run.settings.get("objective") or {}
    notes = []
    if not it.moved:
        notes.append(f"{name}: its backbone was not trained, so W0' is W0 and says nothing of its own.")
    if summary.get("refit") == "all":
        notes.append(f"{name}: it was trained once more on all images, so the test images are no new ones to it.")
    report = _told(name, it.run, it.text is not None) | {
        "num_train": len(it.train_indices),
        "num_test": len(test),
        "cosine_start": centred_cosine(weight_CF, start_CF),
        "cosine_features": centred_cosine(weight_CF, induced_CF),
        "agreement": agreement(predicted_n, start_n),
        "expected_agreement": _expected(*accuracies, dataset.num_classes),
        "accuracy": accuracies[0],
        "accuracy_start": accuracies[1],
        "mean_per_class": _mean_per_class(truth_n, predicted_n, dataset.num_classes),
        "mean_per_class_start": _mean_per_class(truth_n, start_n, dataset.num_classes),
    }
    sha1s = [dataset.sha1s[index] for index in test]
    return _Measured(
        report,
        tuple(info.label for info in dataset.classes),
        str((summary.get("backbone") or {}).get("fingerprint")),
        weight_CF,
        start_CF,
        None if it.text is None else it.text.Z,
        objective.get("text_rows", "own") == "own",
        dataset.classes,
        section(it.run, "text", TextConfig),
        dict(zip(sha1s, predicted_n.tolist())),
        dict(zip(sha1s, truth_n.tolist())),
        notes,
    )


def _from_folder(name: str, run: Run) -> _Measured:
    """Report what the folder alone allows: how textual the trained classifier is."""
    weight_CF, rows_CD = saved_rows(run)
    return _Measured(
        _told(name, run, rows_CD is not None),
        tuple(str(row["class"]) for row in run.classes),
        str((run.summary.get("backbone") or {}).get("fingerprint")),
        weight_CF,
        None,
        rows_CD,
        (run.settings.get("objective") or {}).get("text_rows", "own") == "own",
        saved_classes(run),
        section(run, "text", TextConfig),
        {},
        {},
        [f"{name}: all that concerns W0 takes its images: {data_flags(run)}."],
    )


def _told(name: str, run: Run, uses_text: bool) -> dict[str, Any]:
    """Return a report with what the run says of itself, and without a figure yet."""
    return {
        "run": name,
        "arm": str(run.summary.get("arm")),
        "arm_objective": (run.settings.get("objective") or {}).get("name"),
        "uses_text": uses_text,
        "start": str(run.summary.get("start")),
        "train": run.summary.get("train"),
        "seed": run.settings.get("seed"),
    } | dict.fromkeys(FIGURES)


def _hold_against_text(one: _Measured, everyone: Sequence[_Measured], encoder: str | None) -> list[str]:
    """Report how textual W and W0 are; return notes.

    A run without a text head is held against the rows that a run beside it was taught, so that both answer the same
    question, else against its class names.
    """
    name, rows_CD = one.report["run"], one.text_CD
    if rows_CD is None:
        beside = (o.text_CD for o in everyone if o.text_CD is not None and o.names_text and o.labels == one.labels)
        rows_CD = next(beside, None)
    if rows_CD is None:
        recorded = one.text_config
        if encoder is None and recorded.encoder != "minilm":  # the folder's word is not enough to open a file or a Hub
            return [f"{name}: how textual it is takes --text {recorded.encoder}, repeated."]
        config = recorded.model_copy(update={"encoder": encoder or recorded.encoder})
        try:
            rows_CD = text.build(one.classes, config, centre=config.centre is not False).Z
        except TesError as problem:
            return [f"{name}: how textual it is cannot be told: {problem}"]
    one.report["text"] = geometry(one.weight_CF, rows_CD)
    if one.start_CF is not None:
        one.report["start_text"] = geometry(one.start_CF, rows_CD)
    if one.report["text"] is None:
        return [f"{name}: how textual it is takes at least 4 classes that differ."]
    return []


def _pair(one: _Measured, other: _Measured) -> dict[str, Any]:
    common = sorted(one.answers.keys() & other.answers.keys())
    mine, theirs = (np.array([side.answers[key] for key in common], dtype=np.int64) for side in (one, other))
    truth = np.array([one.truth[key] for key in common], dtype=np.int64)
    accuracies = [float((said == truth).mean()) if common else None for said in (mine, theirs)]
    same_features = one.fingerprint == other.fingerprint
    return {
        "runs": [one.report["run"], other.report["run"]],
        # Of features that mean other things, a cosine means nothing.
        "cosine": centred_cosine(one.weight_CF, other.weight_CF) if same_features else None,
        "agreement": agreement(mine, theirs),
        "expected_agreement": _expected(*accuracies, len(one.labels)),
        "num_test": len(common),
    }


def _is_yardstick(other: _Measured, one: _Measured) -> bool:
    report = other.report
    is_plain = report["arm_objective"] == "ce" and report["start"] == "random"
    return is_plain and other.labels == one.labels and other.fingerprint == one.fingerprint


def _by_rows_of(one: _Measured, other: _Measured) -> dict[str, Any]:
    """Return the other's report with how textual it is by this run's rows: runs may differ in encoder or rows."""
    if one.text_CD is None:
        return other.report
    cka = debiased_cka(other.weight_CF, one.text_CD)
    return other.report | {"text": None if cka is None else {"cka": cka}}


def _predicted(head: LinearHead, features_NF: Tensor) -> np.ndarray:
    return head.logits(features_NF).argmax(dim=1).numpy()


def _expected(accuracy: float | None, other: float | None, num_classes: int) -> float | None:
    return None if accuracy is None or other is None else expected_agreement(accuracy, other, num_classes)


def _mean_per_class(truth_n: np.ndarray, predicted_n: np.ndarray, num_classes: int) -> float | None:
    return ClassCounts.of(truth_n, predicted_n, num_classes).mean_per_class() if len(truth_n) else None


def _names(runs: Sequence[Run]) -> list[str]:
    """Return a short name each: the folder's, or as much of the path as tells them apart."""
    parts = 1
    while parts < 6:
        names = ["/".join(run.path.resolve().parts[-parts:]) for run in runs]
        if len(set(names)) == len(names):
            return names
        parts += 1
    console.warn("a run is named twice")
    return [f"{run.path.name} ({number})" for number, run in enumerate(runs, 1)]
