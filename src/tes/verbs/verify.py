"""Whether what a run records holds: its metrics, from its predictions; its predictions, from its model and the images.

Each part is checked against the part it was computed from, so that a figure, a prediction or a weight that was changed
by accident or by hand does not fit any more. Parts that were all changed, and consistently, are found out only with
`--data`: then the recorded model is run on the images themselves.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tes.data.splits import find_units
from tes.errors import RunError, TesError, listing, one_line
from tes.files import sha256_file
from tes.metrics import evaluate_split, per_class_table
from tes.predictions import Predictions
from tes.run import Run, SplitRow

if TYPE_CHECKING:
    from torch import nn

SPLITS = ("val", "test")
METRIC_TOLERANCE = 1e-6
PROBABILITY_TOLERANCE = {"fp32": 1e-3, "bf16": 0.05}
"""How far a recomputed probability may be off: another machine, or another batch, rounds elsewhere."""


@dataclass(frozen=True)
class Check:
    """One claim of a run: `holds` is None where it could not be looked at, `detail` says what was found, or why."""

    name: str
    holds: bool | None
    detail: str


@dataclass(frozen=True)
class _ClassName:
    label: str
    name: str


def verify(
    run: Run | str | Path,
    *,
    data_source: str | None = None,
    data_root: str | None = None,
    backbone: str | None = None,
    network: nn.Module | None = None,
) -> dict[str, Any]:
    """Check a finished run against itself and, with `data_source`, against its images.

    Args:
        run: A run or its folder.
        data_source: Where the images are; they are known by their content. None: no prediction is recomputed.
        data_root: Where tasks' data sets are, if they are a task's.
        backbone: For an own module, its `package.module:factory`, repeated: a run's own word is not imported.
        network: The module itself, likewise.

    Returns:
        {"run", "holds", "checks": [{"name", "holds", "detail"}]}; `holds` is False where any check's is.

    Raises:
        RunError: It is no finished run, or its backbone has to be repeated.
        DataError: There are no data at `data_source`, which says nothing about the run.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    checks = [
        *_attempt("files", _files, run),
        *(check for split in SPLITS for check in _attempt(f"{split} metrics", _metrics, run, split)),
        *_attempt("splits", _splits, run),
    ]
    if data_source is None:
        checks.append(
            Check("predictions", None, "not recomputed: name the images with --data to run the recorded model on them")
        )
    else:
        checks += _recomputed(run, data_source, data_root, backbone, network)
    holds = all(check.holds is not False for check in checks)
    return {"run": str(run.path), "holds": holds, "checks": [asdict(check) for check in checks]}


def render(result: dict[str, Any]) -> str:
    """Return the checks as a person reads them."""
    words = {True: "holds", False: "DOES NOT HOLD", None: "not checked"}
    lines = [f"{check['name']}: {words[check['holds']]}: {check['detail']}" for check in result["checks"]]
    return "\n".join([*lines, "all that was checked holds" if result["holds"] else "this run does not hold"])


def _attempt(name: str, look: Callable[..., Iterator[Check]], *arguments: Any) -> list[Check]:
    """Return what a look finds; a file that cannot be read is one of the things that do not hold."""
    try:
        return list(look(*arguments))
    except TesError as problem:
        return [Check(name, False, str(problem))]


def _files(run: Run) -> Iterator[Check]:
    recorded = run.summary.get("files")
    if not recorded:
        yield Check("files", None, "this run records no hashes of its files")
    else:
        changed = []
        for name, sha256 in recorded.items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise RunError(f"`{run.path / 'run.json'}` names the file `{name}`, which is not in a run.")
            path = run.file(name)
            if not path.is_file():
                changed.append(f"{name} (missing)")
            elif sha256_file(path) != sha256:
                changed.append(name)
        detail = f"changed since run.json was written: {listing(changed)}" if changed else f"{len(recorded)} unchanged"
        yield Check("files", not changed, detail)
    for name, stored in run.summary.get("shared", {}).items():
        path = run.file(name)
        is_same = path.is_file() and stored.rpartition("-")[2].partition(".")[0] == sha256_file(path)
        yield Check(f"shared {name}", is_same, f"`{stored}` {'is what its name says' if is_same else 'has changed'}")


def _metrics(run: Run, split: str) -> Iterator[Check]:
    recorded = run.metrics.get(split)
    has_predictions = (run.path / "predictions" / f"{split}.npz").is_file()
    if recorded is None and not has_predictions:
        return
    if recorded is None or not has_predictions:
        there, lacks = ("predictions", "metrics") if recorded is None else ("metrics", "predictions")
        yield Check(f"{split} metrics", False, f"there are {there} of {split}, but no {lacks}")
        return
    predictions = run.predictions(split)
    coarse = [row.get("coarse") for row in run.classes]
    found = evaluate_split(predictions, coarse)
    wrong = []
    for head in sorted({*recorded, *found}):
        claimed, true = recorded.get(head, {}), found.get(head, {})
        wrong += [
            f"{head} {name} is recorded as {claimed.get(name)} and comes out as {true.get(name)}"
            for name in sorted({*claimed, *true})
            if not _close(claimed.get(name), true.get(name))
        ]
    good = f"recomputed from {len(predictions)} predictions: " + ", ".join(
        f"{head} mean per class {figures['mean_per_class']:.4f}" for head, figures in found.items()
    )
    yield Check(f"{split} metrics", not wrong, listing(wrong, 3) if wrong else good)
    table = run.path / f"per_class_{split}.csv"
    if table.is_file():
        yield Check(f"{split} per class", *_per_class(run, predictions, table))


def _close(recorded: Any, found: Any) -> bool:
    if recorded is None or found is None:
        return recorded is found
    return math.isclose(recorded, found, rel_tol=METRIC_TOLERANCE, abs_tol=METRIC_TOLERANCE)


def _per_class(run: Run, predictions: Predictions, table: Path) -> tuple[bool, str]:
    classes = [_ClassName(str(row["class"]), str(row["name"])) for row in run.classes]
    expected = [
        {name: "" if value is None else str(value) for name, value in row.items()}
        for row in per_class_table(predictions, classes, predictions.heads()[0])
    ]
    try:
        with table.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        return False, f"`{table}` cannot be read: {one_line(problem)}"
    differing = [row["label"] for row, other in zip(expected, rows) if row != other]
    if len(rows) != len(expected) or differing:
        return False, f"`{table.name}` has other rows: {listing(differing) or f'{len(rows)} of {len(expected)}'}"
    return True, f"recomputed for {len(rows)} classes"


def _splits(run: Run) -> Iterator[Check]:
    """Hold splits.csv against the predictions and the counts that are recorded."""
    rows = {row.path: row for row in run.images}
    wrong = []
    if len(rows) < len(run.images):
        wrong.append(f"{len(run.images) - len(rows)} images are listed twice")
    labels = [str(row["class"]) for row in run.classes]
    if unknown := sorted({row.label for row in rows.values()} - set(labels)):
        wrong.append(f"classes that classes.json lacks: {listing(unknown)}")
    lost = {row.get("path") for row in run.summary.get("lost", ())}
    of = {split: {path for path, row in rows.items() if row.split == split and path not in lost} for split in
          ("train", "val", "test", "unused")}  # fmt: skip
    paper = run.summary.get("protocol") == "paper"
    counts = {"num_train": of["train"] | (of["val"] if paper else set()), "num_test": of["test"]}
    for key, paths in counts.items():
        if key in run.summary and run.summary[key] != len(paths):
            wrong.append(f"{key} is recorded as {run.summary[key]} and splits.csv has {len(paths)}")
    for split in SPLITS:
        if not (run.path / "predictions" / f"{split}.npz").is_file():
            continue
        said = run.predictions(split)
        allowed = [of["test"]] if split == "test" else _val_images(list(rows.values()), of)
        if len(said.paths) != len(set(said.paths)) or set(said.paths) not in allowed:
            stray = listing(sorted(set(said.paths) ^ allowed[0]), 3)
            wrong.append(f"the predictions of {split} are not of the images that splits.csv puts there: {stray}")
        other = [
            path for path, label in zip(said.paths, said.labels) if path in rows and rows[path].label != labels[label]
        ]
        if other:
            wrong.append(f"the predictions of {split} have other labels than splits.csv: {listing(other, 3)}")
    shown = ", ".join(f"{len(paths)} {split}" for split, paths in of.items() if paths)
    yield Check("splits", not wrong, "; ".join(wrong) if wrong else f"splits.csv agrees with the predictions: {shown}")


def _val_images(rows: Sequence[SplitRow], of: Mapping[str, set[str]]) -> list[set[str]]:
    """Return the sets of images that the predictions of val may be of: val, or, of a cell scored on val, what it saw.

    That are the pool's unused images, with val or without, less what shares a unit with an image that was used.
    """
    units = find_units([row.sha1 for row in rows], [row.group for row in rows]).tolist()
    unit_of = dict(zip([row.path for row in rows], units))

    def unseen(wanted: set[str], used: set[str]) -> set[str]:
        units = {unit_of[path] for path in used}
        return {path for path in wanted if unit_of[path] not in units}

    pool = of["val"] | of["unused"]
    return [of["val"], of["unused"], pool, unseen(pool, of["train"]), unseen(of["unused"], of["train"] | of["val"])]


def _recomputed(
    run: Run, data_source: str, data_root: str | None, backbone: str | None, network: nn.Module | None
) -> list[Check]:
    from tes.reopen import load_learner, recorded_compute, reopen_data

    compute = recorded_compute(run)
    learner = load_learner(run, backbone=backbone, network=network, compute=compute)
    checks = []
    if run.summary.get("train") == "head":
        recorded = (run.summary.get("backbone") or {}).get("fingerprint")
        is_same = learner.backbone.fingerprint == recorded
        detail = "is the one that the run started from" if is_same else "is not the one that run.json names"
        checks.append(Check("backbone", is_same, f"the backbone, which was not trained, {detail}"))
    try:
        dataset = reopen_data(run, data_source, data_root)
    except RunError as problem:
        return [*checks, Check("images", False, str(problem))]
    checks.append(Check("images", True, f"all {len(dataset.paths)} are in `{data_source}` as they were, by SHA-1"))
    refit = run.summary.get("refit", "none")
    if refit != "none":
        why = f"the shipped weights were trained once more, on {refit}; the predictions are those of the model before"
        return [*checks, Check("predictions", None, why)]
    for split in SPLITS:
        checks += _attempt(f"{split} predictions", _predictions, run, split, dataset, learner)
    return checks


def _predictions(run: Run, split: str, dataset: Any, learner: Any) -> Iterator[Check]:
    from tes.engine.scoring import predict

    if not (run.path / "predictions" / f"{split}.npz").is_file():
        return
    recorded = run.predictions(split)
    index_of = {path: index for index, path in enumerate(dataset.paths)}
    known = [path for path in recorded.paths if path in index_of]
    if len(known) < len(recorded):
        why = "they are of images that are unused elsewhere" if split == "val" else "some are of images not in the data"
        yield Check(f"{split} predictions", None if split == "val" else False, f"not recomputed: {why}")
        return
    found = predict(learner, dataset, np.array([index_of[path] for path in known], dtype=np.int64))
    name = f"{split} predictions"
    if found.paths != recorded.paths or found.logits.keys() != recorded.logits.keys():
        yield Check(name, False, "the recorded model gives predictions of other images, or of other heads")
        return
    worst = max(
        float(np.abs(found.probabilities(head) - recorded.probabilities(head)).max()) for head in recorded.logits
    )
    agreement = min(
        float((found.logits[head].argmax(axis=1) == recorded.logits[head].argmax(axis=1)).mean())
        for head in recorded.logits
    )
    now = learner.compute
    same = (run.settings.get("device"), run.settings.get("precision")) == (now.device, now.precision)
    tolerance = PROBABILITY_TOLERANCE[now.precision if same else "bf16"]
    detail = (
        f"{len(found)} recomputed by the recorded model; probabilities differ by at most {worst:.1e} (up to"
        f" {tolerance:g} is rounding), the classes of {agreement:.2%} are the same"
    )
    yield Check(name, worst <= tolerance, detail)
