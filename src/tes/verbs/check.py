"""Everything but the training: what would be trained on, and what is wrong with it, before any time is spent."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from tes import data, text
from tes.config import Config
from tes.data.task_source import found_of_official
from tes.engine.features import compute_features
from tes.errors import listing
from tes.loaded import Loaded
from tes.metrics import METRICS
from tes.objectives import objectives
from tes.settle import check_needs, settle

IMBALANCE = 10
"""From this ratio between the largest and the smallest class on, the mean per class is the figure to look at."""


def check(config: Config) -> dict[str, Any]:
    """Read the data, match the class texts, load the backbone and run one batch; return what was found.

    Raises:
        TesError: What would stop the training as well.
    """
    objective_class = objectives.get(config.objective.name)
    check_needs(config, objective_class)
    loaded = Loaded.open(config)
    dataset = data.draw(loaded.dataset, config.data, config.seed)
    used = dataset.splits != "unused"
    counts = np.bincount(dataset.labels[used], minlength=dataset.num_classes)
    warnings = list(dataset.notes)
    smallest, largest = int(counts.argmin()), int(counts.argmax())
    if counts[largest] >= IMBALANCE * counts[smallest]:
        warnings.append(
            f"imbalance: `{dataset.classes[largest].label}` has {counts[largest]} images,"
            f" `{dataset.classes[smallest].label}` {counts[smallest]}; look at the mean per class, not at top-1"
        )
    duplicates = data.find_duplicates(dataset)
    if duplicates:
        warnings.append(f"{len(duplicates)} groups of identical images cross a split or a class: see `duplicates`")

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
    }


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
    lines += [f"! {warning}" for warning in result["warnings"]]
    lines.append("ready to train" if not result["warnings"] else "ready to train; read the lines marked `!` first")
    return "\n".join(lines)
