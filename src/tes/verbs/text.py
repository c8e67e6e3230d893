"""What the class names' text is worth: as text, and, through the text prior, on at most 2,000 images outside test."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tes import data
from tes import text as text_room
from tes.config import Config
from tes.engine.features import FrozenFeatures
from tes.engine.learner import one_hot
from tes.engine.solve import HeadProblem, Prior
from tes.loaded import Loaded
from tes.objectives import objectives
from tes.settle import settle
from tes.statistics import standard_error
from tes.text.vocabulary import NearestSource

MAX_IMAGES = 2000
MAX_SHOTS = 4
"""Trust is learned from as many images per class: it is few images that a prior is for."""
CLEAR, SLIGHT = 0.25, 0.05
"""(accuracy - chance) / (1 - chance) of the zero-shot classifier from which on a gain at few shots is to be expected:
0.47 on Caltech-101, 0.12 on Grocery Store, 0.02 on Flowers-102, where the prior gains much, a little, and nothing."""


def describe_text(config: Config, *, images: bool = True) -> dict[str, Any]:
    """Return the text report of a data set's classes; with `images` also `zero_shot`, what the text prior says of them.

    Args:
        config: Data, text and backbone.
        images: Look at images as well: at most 2,000 of train + val, drawn by `seed`, never of test.

    Raises:
        TesError: A sentence about the input or the environment.
    """
    if not images:
        classes, source = data.load_classes(config.data)
        settings, _ = text_room.with_templates(config.text, source.templates, source.ensemble)
        classifier = text_room.build(classes, settings, centre=config.text.centre is not False)
        return text_room.text_report(classifier, classes)
    loaded = Loaded.open(config)
    report = text_room.text_report(loaded.class_text(config.text), loaded.dataset.classes)
    source = loaded.source_text(config.text)
    if isinstance(source, str):
        sentence = f"No text prior is possible ({source}), so nothing is said of the images."
        return report | {"zero_shot": None, "verdict": [*report["verdict"], sentence]}
    zero_shot = _zero_shot(config, loaded)
    return report | {"zero_shot": zero_shot, "verdict": [*report["verdict"], *zero_shot.pop("sentences")]}


def _zero_shot(config: Config, loaded: Loaded) -> dict[str, Any]:
    wanted = config.replace({"objective": {"name": "ce"}, "start": "prior", "train": "head"})
    settled = settle(wanted, loaded.dataset, loaded.backbone, objectives.get("ce"), loaded.source_text)
    dataset, features = loaded.dataset, loaded.features(settled.compute)
    pool = np.flatnonzero(np.isin(dataset.splits, ("train", "val")))
    draw = np.random.default_rng(config.seed)
    drawn = np.sort(draw.choice(pool, min(MAX_IMAGES, len(pool)), replace=False))
    prior = loaded.prior(settled.config)
    assert prior is not None
    head = HeadProblem(config.optim.head_penalty, prior).without_labels(features(drawn)).head
    labels = dataset.labels[drawn]
    is_right = head.logits(features(drawn)).argmax(dim=1).numpy() == labels
    nearest = loaded.nearest()  # None: a CLIP, which has no source classes
    num_classes, chance = dataset.num_classes, 1 / dataset.num_classes
    num_C = np.bincount(labels, minlength=num_classes)
    right_C = np.bincount(labels, is_right, num_classes)
    accuracy_C = np.where(num_C > 0, right_C / np.maximum(num_C, 1), np.nan)
    accuracy = float(np.nanmean(accuracy_C))
    trust, permuted = _learned_trust(settled.config, loaded, features, prior, drawn)
    result: dict[str, Any] = {
        "num_images": len(drawn),
        "mean_per_class": accuracy,
        "standard_error": standard_error(right_C, num_C),
        "chance": chance,
        **_known_apart(accuracy_C, nearest),
        "trust": trust,
        "trust_of_permuted_names": permuted,
        "nearest": [
            {"class": info.label, "source": source.name, "cosine": source.cosine, "known": source.known}
            for info, source in zip(dataset.classes, nearest or ())
        ],
    }
    return result | {"sentences": _sentences(result)}


def _known_apart(accuracy_C: np.ndarray, nearest: list[NearestSource] | None) -> dict[str, Any]:
    if nearest is None:
        return {"num_known_names": None, "known_names": None, "other_names": None}
    known = np.array([source.known for source in nearest])
    apart = {"known_names": _mean(accuracy_C[known]), "other_names": _mean(accuracy_C[~known])}
    return {"num_known_names": int(known.sum()), **apart}


def _learned_trust(
    config: Config, loaded: Loaded, features: FrozenFeatures, prior: Prior, drawn: np.ndarray
) -> tuple[float, float]:
    """Return the joint α that a few of the drawn images per class teach, for the names as they are and permuted."""
    dataset = loaded.dataset
    labels = dataset.labels[drawn]
    few = np.sort(np.concatenate([drawn[labels == c][:MAX_SHOTS] for c in range(dataset.num_classes)]))
    features_NF = features(few)
    target_NC = one_hot(torch.from_numpy(dataset.labels[few]), dataset.num_classes)
    permuted = loaded.prior(config.replace({"start": "probe+permuted"}))
    assert permuted is not None
    trusts = []
    for candidate in (prior, permuted):
        problem = HeadProblem(config.optim.head_penalty, replace(candidate, form="joint"))
        solution = problem.solve(features_NF, target_NC, tolerance=1e-4)
        assert solution.trust_C is not None
        trusts.append(solution.trust_C.mean().item())
    return trusts[0], trusts[1]


def _sentences(zero_shot: dict[str, Any]) -> list[str]:
    accuracy, chance = zero_shot["mean_per_class"], zero_shot["chance"]
    parts = [
        f"{name} {zero_shot[key]:.0%}"
        for key, name in (("known_names", "names that the backbone knows"), ("other_names", "the others"))
        if zero_shot[key] is not None
    ]
    apart = "; " + ", ".join(parts) if parts else ""
    lines = [
        f"Without a single labelled image, the names alone classify {accuracy:.1%} of {zero_shot['num_images']} images"
        f" outside test (mean per class; chance {chance:.1%}{apart}). Trust learned from up to"
        f" {MAX_SHOTS} images a class: {zero_shot['trust']:.2f}; with the names permuted:"
        f" {zero_shot['trust_of_permuted_names']:.2f}."
    ]
    low, high = _lift(zero_shot)
    if low >= CLEAR:
        lines.append("Expect the text prior to help clearly at 1 to 4 images a class, less and less beyond.")
    elif low >= SLIGHT:
        lines.append("Expect the text prior to help a little at 1 or 2 images a class, hardly beyond.")
    elif high < SLIGHT:
        lines.append("The names say next to nothing about these images: expect no gain from the text prior.")
    else:
        lines.append("These images are too few to tell whether the text prior will help.")
    return lines


def _lift(zero_shot: dict[str, Any]) -> tuple[float, float]:
    """Return (accuracy - chance) / (1 - chance), two standard errors below and above."""
    accuracy, chance, error = (zero_shot[key] for key in ("mean_per_class", "chance", "standard_error"))
    return tuple((accuracy + side * error - chance) / (1 - chance) for side in (-2, 2))


def _mean(values: np.ndarray) -> float | None:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None
