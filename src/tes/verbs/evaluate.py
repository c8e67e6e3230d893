"""Scores of a finished run: from its saved predictions, or on another labelled data set."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tes import data
from tes.calibration import Calibration
from tes.errors import RunError
from tes.files import csv_text, user_path, write_atomic
from tes.metrics import evaluate_split, write_per_class_csv
from tes.predictions import Predictions
from tes.run import Run, refuse_out_among_images

if TYPE_CHECKING:
    from torch import nn


def evaluate(
    run: Run | str | Path,
    split: str = "test",
    *,
    data_source: str | None = None,
    data_root: str | None = None,
    partial: bool = False,
    backbone: str | None = None,
    network: nn.Module | None = None,
    ignore_unknown: bool = False,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Return the metrics of every head that the run has.

    Args:
        run: A run or its folder.
        split: `val` or `test`, from the saved predictions.
        data_source: Another labelled folder, CSV or task, to run the model on; its classes are matched by name.
        data_root: Where tasks' data sets are.
        partial: Accept a part of a task's official list.
        backbone: For an own module, its `package.module:factory`, repeated: a run's own word is not imported.
        network: The module itself, likewise.
        ignore_unknown: Leave out images of `data_source` whose class the model does not know.
        out: A folder for `predictions.npz`, `per_class.csv` and `confusion.csv` (label, predicted, number of images).

    Returns:
        {"split", "num_samples", "default_head", "metric" (the training data's), "heads": {head: {metric: fraction}}};
        with `data_source` also "data"; after `tes calibrate` also "calibrated": as "heads", with `ensemble` where
        there are two.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    result: dict[str, Any] = {"split": split}
    if data_source is None:
        if split not in ("val", "test"):
            raise RunError(f"`--split {split}`: a run has saved predictions for val and test.")
        predictions = run.predictions(split)
        coarse = [row.get("coarse") for row in run.classes]
        if run.summary.get("refit", "none") != "none":
            result["notes"] = [
                f"the shipped weights were trained once more, on {run.summary['refit']}: these figures"
                " are those before it"
            ]
    else:
        classes = [
            data.ClassInfo(label=str(row["class"]), name=str(row["name"]), coarse=row.get("coarse"))
            for row in run.classes
        ]
        if out is not None:
            refuse_out_among_images(user_path(out), user_path(data_source))
        dataset = data.load_labelled(data_source, classes, data_root, partial, ignore_unknown=ignore_unknown)
        predictions = _predict_elsewhere(run, dataset, backbone, network)
        result = {"split": "all", "data": dataset.name}
        if dataset.notes:
            result["notes"] = list(dataset.notes)
        coarse = [info.coarse for info in dataset.classes]
    heads = evaluate_split(predictions, coarse)
    default_head = run.summary.get("default_head", "vision")
    if out is not None:
        _write(user_path(out), predictions, run, default_head)
    calibration = Calibration.load(run.path / "calibration.json")
    if calibration is not None:
        result["calibrated"] = calibration.evaluate(predictions, coarse)
    return result | {
        "num_samples": len(predictions.labels),
        "default_head": default_head,
        "metric": run.primary_metric,
        "heads": heads,
    }


def _write(folder: Path, predictions: Predictions, run: Run, head: str) -> None:
    named = [data.ClassInfo(label=str(row["class"]), name=str(row["name"])) for row in run.classes]
    predicted_n = predictions.log_probabilities(head).argmax(axis=1)
    counts = Counter(zip(predictions.labels.tolist(), predicted_n.tolist()))
    rows = ((named[label].label, named[said].label, number) for (label, said), number in sorted(counts.items()))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        predictions.save(folder / "predictions.npz")
        write_per_class_csv(folder / "per_class.csv", predictions, named, head)
        write_atomic(folder / "confusion.csv", csv_text(("label", "predicted", "num_images"), rows))
    except OSError as problem:
        raise RunError(f"`{folder}` cannot be written: {problem.strerror or problem}.") from None


def _predict_elsewhere(run: Run, dataset: data.Dataset, backbone: str | None, network: nn.Module | None) -> Predictions:
    from tes.engine.scoring import predict
    from tes.reopen import load_learner, recorded_compute

    learner = load_learner(run, backbone=backbone, network=network, compute=recorded_compute(run))
    return predict(learner, dataset, dataset.indices("test"))
