"""The job of `tes train`, top to bottom: data, text, backbone, settings, fit, predictions, run folder.

Everything before the fit only reads; the run folder is claimed first and given back if any of it fails.
"""

from __future__ import annotations

import copy
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tes import console, data, run_writer, text
from tes.card import model_card
from tes.config import Config
from tes.data.dataset import Dataset
from tes.data.splits import find_units
from tes.engine.compute import Compute
from tes.engine.features import compute_features, frozen_features
from tes.engine.fit import fit
from tes.engine.learner import Learner
from tes.engine.start import out_of_fold_logits
from tes.errors import RunError, TrainingError
from tes.files import append_jsonl, user_path, write_atomic, write_json
from tes.metrics import evaluate_split
from tes.models.backbone import Backbone, load_backbone
from tes.objectives import objectives
from tes.objectives.base import Objective
from tes.predictions import Predictions
from tes.run import FORMAT, Run, claim
from tes.settle import check_needs, settle

PRIMARY_METRIC = "mean_per_class"


def train(config: Config, *, network: nn.Module | None = None, overwrite: bool = False) -> Run:
    """Fine-tune on labelled images and return the finished run.

    Args:
        config: All settings; see `tes.load_config`.
        network: Your own pre-trained module, in place of one built from `config.backbone.name`.
        overwrite: Replace the run that stands in `config.out`.

    Raises:
        TesError: A sentence about the input or the environment; nothing is left half-written.
    """
    began = time.monotonic()
    objective_class: type[Objective] = objectives.get(config.objective.name)
    check_needs(config, objective_class)
    arm = config.arm
    source = user_path(config.data.source)
    _refuse_out_among_images(user_path(config.out or "runs"), source)
    with claim(config.out, f"{source.resolve().stem}-{arm}", overwrite) as claimed:
        folder = claimed.path

        # What there is to learn from.
        dataset = data.load(config.data, config.seed)
        describe(dataset)
        class_text = None
        if "class_text" in objective_class.needs:
            class_text = text.build(dataset.classes, config.text, centre=config.text.centre is not False)
            class_text.aligned_with(dataset.classes)
            _note_all(class_text.notes)
            for line in text.warnings(class_text, dataset.classes):
                console.warn(line)
        rows_CD = torch.from_numpy(class_text.Z) if class_text is not None else None
        backbone = load_backbone(config.backbone, config.image, network)
        _note_all(backbone.notes)
        settled = settle(config, dataset, backbone, objective_class)
        config, compute = settled.config, settled.compute
        if settled.reasons:
            _note_all(["decided for you:", *settled.reasons])
        run_writer.write_inputs(folder, config, dataset, class_text, backbone.images)
        claimed.keep()

        # The fit, and what it says about images it has not seen.
        log = partial(append_jsonl, folder / "metrics.jsonl")
        untrained = copy.deepcopy(backbone) if config.train == "all" and config.refit != "none" else backbone
        fingerprint = backbone.fingerprint
        val, test = dataset.indices("val"), dataset.indices("test")

        if config.start != "random":
            run_writer.write_out_of_fold(folder, out_of_fold(config, backbone, dataset, compute))

        def score(learner: Learner) -> dict[str, Any]:
            return evaluate_split(predict(learner, dataset, val), run_writer.coarse_names(dataset))

        fitted = fit(
            config, backbone, dataset, dataset.indices("train"), rows_CD, compute,
            log=log, evaluate=score if len(val) else None,
        )  # fmt: skip
        if "kl_label_to_reference" in fitted.figures:
            distance = fitted.figures["kl_label_to_reference"]
            console.note(
                f"KL(label ‖ softened target) is {distance:.3g} on average; at 0 `{arm}` is plain cross-entropy"
            )
        metrics: dict[str, Any] = {}
        for split, indices in (("val", val), ("test", test)):
            if len(indices):
                predictions = predict(fitted.learner, dataset, indices, fixed=config.train == "head")
                metrics[split] = run_writer.write_predictions(folder, split, predictions, dataset)
                log({"split": split, "step": config.optim.num_steps or 0, "heads": metrics[split]})

        # What is shipped.
        if config.refit != "none":
            splits = ("train", "val") if config.refit == "trainval" else ("train", "val", "test")
            console.note(f"refit on {' + '.join(splits)}; all figures are those before the refit")
            everything = np.sort(np.concatenate([dataset.indices(split) for split in splits]))
            fitted = fit(
                config, untrained, dataset, everything, rows_CD, compute, log=lambda row: log(row | {"refit": True})
            )
        run_writer.write_model(folder, fitted, class_text)

        summary = {
            "format": FORMAT,
            "status": "complete",
            "arm": arm,
            "start": config.start,
            "train": config.train,
            "refit": config.refit,
            "default_head": fitted.learner.objective.default_head,
            "primary_metric": PRIMARY_METRIC,
            "data": dataset.name,
            "num_classes": dataset.num_classes,
            **{f"num_{split}": len(dataset.indices(split)) for split in ("train", "val", "test")},
            "unreadable": [{"path": path, "reason": reason} for path, reason in dataset.unreadable],
            "backbone": {"name": config.backbone.name, "fingerprint": fingerprint},
            "text": {"encoder": class_text.encoder} if class_text is not None else None,
            "objective": fitted.figures,
            "metrics": metrics,
        }
        write_atomic(folder / "README.md", model_card(config, dataset.classes, summary, objective_class.citation))
        append_jsonl(folder / "timing.jsonl", {"seconds": round(time.monotonic() - began, 3)})
        write_json(folder / "run.json", summary)
    return Run.open(folder)


def _refuse_out_among_images(out: Path, source: Path) -> None:
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise RunError(
            f"The run folder `{out}` would lie among the images of `{source}` and be taken for a class; choose another"
            " --out."
        )


def predict(learner: Learner, dataset: Dataset, indices: np.ndarray, *, fixed: bool = False) -> Predictions:
    """Return every head's logits for the images `indices`; `fixed` backbones read and fill the cache of features."""
    features_of = frozen_features if fixed else compute_features
    features_NF = features_of(learner.backbone, dataset, indices, learner.compute)
    if not torch.isfinite(features_NF).all():
        raise TrainingError(
            "The trained network's features are not finite: training has diverged. Lower the learning rate (--lr), set"
            " optim.clip_norm=1, or use --precision fp32."
        )
    logits = {head: values_NC.numpy() for head, values_NC in learner.heads(features_NF).items()}
    return Predictions([dataset.paths[index] for index in indices], dataset.labels[indices], logits)


def out_of_fold(config: Config, backbone: Backbone, dataset: Dataset, compute: Compute) -> Predictions:
    """Return what the start's problem says about training images that it was not fitted to (5 folds)."""
    indices = dataset.indices("train")
    features_NF = frozen_features(backbone, dataset, indices, compute)
    labels_N = torch.from_numpy(dataset.labels[indices])
    units_N = find_units([dataset.sha1s[index] for index in indices], [dataset.groups[index] for index in indices])
    logits_NC = out_of_fold_logits(features_NF, labels_N, units_N, dataset.num_classes, config.optim.head_penalty)
    return Predictions([dataset.paths[index] for index in indices], labels_N.numpy(), {"vision": logits_NC.numpy()})


def describe(dataset: Dataset) -> None:
    """Say what the data set holds, how its class names are read, and what was left out."""
    counts = ", ".join(f"{len(dataset.indices(split))} {split}" for split in ("train", "val", "test"))
    console.note(f"{dataset.name}: {dataset.num_classes} classes; {counts} images")
    renamed = [f"{info.label} → {info.name}" for info in dataset.classes if info.label != info.name]
    if renamed:
        console.note(f"class names are read as: {', '.join(renamed[:4])}{', …' if len(renamed) > 4 else ''}")
    _note_all(dataset.notes)


def _note_all(lines: list[str]) -> None:
    for line in lines:
        console.note(line)
