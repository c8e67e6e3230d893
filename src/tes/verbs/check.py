"""Everything but the training: what would be trained on, and what is wrong with it, before any time is spent.

Where something is wrong with images, two tables list it in full, to work through: `bad_images.csv` and
`duplicates.csv`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tes import data, text
from tes.config import Config
from tes.data.dataset import BadImagesError
from tes.data.task_source import found_of_official
from tes.engine.features import compute_features
from tes.errors import DataError, counted, listing
from tes.files import csv_text, user_path, write_atomic
from tes.loaded import Loaded
from tes.metrics import METRICS
from tes.objectives import objectives
from tes.settle import check_needs, settle

IMBALANCE = 10
"""From this ratio between the largest and the smallest class on, the mean per class is the figure to look at."""


TABLES = {
    "bad_images.csv": ("path", "reason"),
    "duplicates.csv": ("kind", "path", "split", "label", "other_path", "other_split", "other_label"),
}


def check(config: Config, *, out: str | Path | None = None) -> dict[str, Any]:
    """Read the data, match the class texts, load the backbone and run one batch; return what was found.

    Args:
        config: As for a training.
        out: The folder for `bad_images.csv` and `duplicates.csv`, which are written where there is anything to list;
            None: no table.

    Raises:
        TesError: What would stop the training as well.
    """
    objective_class = objectives.get(config.objective.name)
    check_needs(config, objective_class)
    folder = None if out is None else user_path(out)
    try:
        loaded = Loaded.open(config)
    except BadImagesError as problem:
        written = _write(folder, "bad_images.csv", problem.unreadable)
        raise DataError(f"{problem} {written}".rstrip()) from None
    dataset = data.draw(loaded.dataset, config.data, config.seed)
    used = dataset.splits != "unused"
    counts = np.bincount(dataset.labels[used], minlength=dataset.num_classes)
    warnings = list(dataset.notes)
    smallest, largest = int(counts.argmin()), int(counts.argmax())
    if counts[largest] >= IMBALANCE * counts[smallest]:
        warnings.append(
            f"imbalance: `{dataset.classes[largest].label}` has {counted(counts[largest], 'image')},"
            f" `{dataset.classes[smallest].label}` {counts[smallest]}; look at the mean per class, not at"
            " top-1; optim.class_weights=balanced makes up for it in training, with --train all optim.sampling=balanced"
        )
    duplicates = data.find_duplicates(dataset)
    if duplicates:
        warnings.append(f"{len(duplicates)} groups of identical images cross a split or a class: see `duplicates`")
    near_duplicates = _near_duplicates(dataset, warnings)
    tables = {
        "bad_images.csv": dataset.unreadable,
        "duplicates.csv": [*_identical(dataset), *(tuple(row.values()) for row in near_duplicates)],
    }
    written = [said for name, rows in tables.items() if (said := _write(folder, name, rows))]

    texts: dict[str, Any] | None = None
    if "class_text" in objective_class.needs:
        classifier = loaded.class_text(config.text)
        report = text.text_report(classifier, dataset.classes)
        warnings += report["obstacles"]
        texts = {"encoder": classifier.encoder, "prompts": [list(part) for part in classifier.prompts]}

    backbone = loaded.backbone
    settled = settle(config, dataset, backbone, objective_class, loaded.source_text)
    batch = np.flatnonzero(dataset.splits != "test")[:32]
    began = time.monotonic()
    features_NF = compute_features(backbone, dataset, batch, settled.compute)
    seconds = time.monotonic() - began
    return {
        "data": dataset.name,
        "num_classes": dataset.num_classes,
        "metric": dataset.metric,
        "splits": {split: len(dataset.indices(split)) for split in ("train", "val", "test")},
        "official": dataset.source.official,
        "classes": [
            {"class": info.label, "name": info.name, "num_images": int(count)}
            for info, count in zip(dataset.classes, counts)
        ],
        "unreadable": [{"path": path, "reason": reason} for path, reason in dataset.unreadable],
        "duplicates": duplicates,
        "near_duplicates": near_duplicates,
        "text": texts,
        "backbone": {
            "name": config.backbone.name,
            "num_features": backbone.num_features,
            "source_classes": len(backbone.source_head.weight_SF) if backbone.source_head else None,
            "images": backbone.images.to_dict(),
        },
        "forward": {"num_images": len(batch), "shape": list(features_NF.shape), "seconds": round(seconds, 3)},
        "decided": settled.reasons,
        "warnings": warnings,
        "written": written,
    }


def _near_duplicates(dataset: data.Dataset, warnings: list[str]) -> list[dict[str, str]]:
    """Return the pairs of similar images that cross a split or a class, and warn of them."""
    pairs = data.find_similar(dataset)
    if pairs is None:
        warnings.append(f"near duplicates were not looked for: {len(dataset.paths)} images are too many to compare")
        return []
    rows = [_row(dataset, pair.kind, pair.first, pair.second) for pair in pairs if _crosses(dataset, pair)]
    if rows:
        across = Counter(tuple(sorted((row["label"], row["other_label"]))) for row in rows)
        named = listing([f"{one} / {two}: {count}" for (one, two), count in across.most_common() if one != two])
        classes = f"; across classes: {named}" if named else ""
        warnings.append(
            f"{len(rows)} pairs of images that show the same cross a split or a class{classes}. A test image that was"
            " trained on flatters: leave one of a pair out, or give both the same `group` in a CSV"
        )
    return rows


def _crosses(dataset: data.Dataset, pair: data.Similar) -> bool:
    one, two = ((str(dataset.splits[index]), int(dataset.labels[index])) for index in (pair.first, pair.second))
    return one != two and "unused" not in (one[0], two[0])


def _identical(dataset: data.Dataset) -> list[tuple[str, ...]]:
    """Return what `find_duplicates` finds as pairs: each group's first image beside every other one."""
    return [
        tuple(_row(dataset, "identical", group[0], other).values())
        for group in data.duplicate_groups(dataset)
        for other in group[1:]
    ]


def _row(dataset: data.Dataset, kind: str, first: int, second: int) -> dict[str, str]:
    def told(index: int, prefix: str) -> dict[str, str]:
        values = (dataset.paths[index], str(dataset.splits[index]), dataset.classes[dataset.labels[index]].label)
        return {prefix + name: value for name, value in zip(("path", "split", "label"), values)}

    return {"kind": kind} | told(first, "") | told(second, "other_")


def _write(folder: Path | None, name: str, rows: Sequence[Sequence[str]]) -> str:
    """Write a table, or empty one that an earlier check has left; return a sentence that says so, or nothing."""
    if folder is None or not (rows or (folder / name).is_file()):
        return ""
    if (folder / name).exists() and not _is_ours(folder / name):
        kept = f"`{folder / name}` has other content and is kept; for the list of {len(rows)} choose another --out."
        return kept if rows else ""
    try:
        write_atomic(folder / name, csv_text(TABLES[name], rows))
    except OSError as problem:
        return f"`{folder / name}` cannot be written: {problem.strerror or problem}."
    listed = "It is" if len(rows) == 1 else f"All {len(rows)} are"
    return f"{listed} listed in `{folder / name}`." if rows else f"`{folder / name}` is empty now."


def _is_ours(path: Path) -> bool:
    """Whether a file begins as a table of `tes check` does."""
    header = ",".join(TABLES[path.name]).encode()
    try:
        with path.open("rb") as file:
            return file.readline(1000).rstrip(b"\r\n") == header
    except OSError:
        return False


def render(result: dict[str, Any]) -> str:
    """Return the findings of `check` as text for a person."""
    splits = ", ".join(f"{count} {split}" for split, count in result["splits"].items())
    counts = [row["num_images"] for row in result["classes"]]
    lines = [
        f"{result['data']}: {result['num_classes']} classes, {splits} images; metric: {METRICS[result['metric']]}",
        f"images per class: {min(counts)} to {max(counts)}",
    ]
    if result["official"]:
        lines.append(f"found / official: {found_of_official(result['official'])}")
    if result["text"]:
        lines.append(f"text: {result['text']['encoder']}; classes such as:")
        for row, prompts in zip(result["classes"][:3], result["text"]["prompts"]):
            lines.append(f"  {row['class']} → {row['name']}: {listing(prompts, 2)}")
    else:
        lines.append("classes: " + listing([f"{row['class']} → {row['name']}" for row in result["classes"]], 6))
    forward, backbone = result["forward"], result["backbone"]
    lines.append(
        f"backbone: {backbone['name']}, {backbone['num_features']} features; {forward['num_images']} images of"
        f" {backbone['images']['size']} px in {forward['seconds']:.2f} s"
    )
    lines += ["a training would decide:", *result["decided"]]
    lines += [f"unreadable: {row['path']} ({row['reason']})" for row in result["unreadable"][:20]]
    lines += ["duplicates: " + " = ".join(group) for group in result["duplicates"][:20]]
    lines += [
        f"{'crop' if row['kind'] == 'crop' else 'near duplicate'}: {row['path']} ({row['split']}, {row['label']}) ~"
        f" {row['other_path']} ({row['other_split']}, {row['other_label']})"
        for row in result["near_duplicates"][:20]
    ]
    lines += result["written"]
    lines += [f"! {warning}" for warning in result["warnings"]]
    lines.append("ready to train" if not result["warnings"] else "ready to train; read the lines marked `!` first")
    return "\n".join(lines)
