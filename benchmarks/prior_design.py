"""The text prior's settings, designed without the test split: gains over the converged probe on unused pool images.

    python benchmarks/prior_design.py PHOTOS --shots 1,2,4,8 --jsonl F [--set backbone.name=…]

For every seed, number of shots, form and κ: mean per class, NLL, ECE, apart for known names and the others; at full
data on val. `--permuted` gives the classes each other's names. Prints mean gains; a JSONL row for each solve.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tes
from tes import console, data
from tes.engine.learner import one_hot
from tes.engine.solve import HeadProblem, Prior
from tes.files import append_jsonl
from tes.loaded import Loaded
from tes.metrics import evaluate_split
from tes.objectives import objectives
from tes.predictions import Predictions
from tes.settle import settle

FORMS = [("joint", 0.1, False), ("per_class", 0.3, False)]
FORMS += [("joint", kappa, True) for kappa in (0.05, 0.1, 0.2)]
FORMS += [("per_class", kappa, True) for kappa in (0.1, 0.2, 0.3)]
"""(form, κ, whether κ grows with the number of images per class)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--shots", default="1,2,4,8")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--permuted", action="store_true")
    parser.add_argument("--set", action="append", default=[], dest="assignments")
    parser.add_argument("--jsonl", type=Path, required=True)
    arguments = parser.parse_args()
    start = "probe+permuted" if arguments.permuted else "probe+prior"
    base = tes.load_config(
        flags={"data.source": arguments.data, "objective": "ce", "start": start, "train": "head"},
        assignments=arguments.assignments,
    )
    rows: list[dict[str, Any]] = []
    with console.quiet():
        loaded = Loaded.open(base)
        for shots in arguments.shots.split(","):
            for seed in range(arguments.seeds if shots != "all" else 1):
                number = None if shots == "all" else int(shots)
                config = base.replace({"seed": seed, "data.shots": number})
                for row in measure(config, loaded, arguments.permuted):
                    rows.append({"data": arguments.data, "settings": arguments.assignments, "shots": shots} | row)
                    append_jsonl(arguments.jsonl, rows[-1])
    report(rows, arguments.shots.split(","))


def measure(config: tes.Config, loaded: Loaded, permuted: bool) -> list[dict[str, Any]]:
    """Solve every problem for one draw, and score each on images that nobody has used."""
    dataset = data.draw(loaded.dataset, config.data, config.seed)
    settled = settle(config, dataset, loaded.backbone, objectives.get("ce"), loaded.source_text)
    features = loaded.features(settled.compute)
    train = dataset.indices("train")
    scored = (
        dataset.indices("val")
        if config.data.shots is None
        else np.flatnonzero(np.isin(dataset.splits, ("val", "unused")))
    )
    x_NF, target_NC = features(train), one_hot(torch.from_numpy(dataset.labels[train]), dataset.num_classes)
    prior = loaded.prior(settled.config)
    known = np.array([source.known for source in loaded.nearest()])
    result = []
    per_class = len(train) / dataset.num_classes
    problems = [("probe", 0.0, HeadProblem(0.3))]
    for form, kappa, grows in FORMS:
        problem = HeadProblem(0.3, Prior(prior.rows_CF, form, kappa if grows else kappa / per_class))
        problems.append((form + (" × n" if grows else ""), kappa, problem))
    for form, kappa, problem in problems:
        solved = problem.solve(x_NF, target_NC, tolerance=1e-5)
        logits = solved.head.logits(features(scored)).numpy()
        paths = [dataset.paths[index] for index in scored]
        labels = dataset.labels[scored]
        said = Predictions(paths, labels, {"vision": logits})
        figures = evaluate_split(said)["vision"]
        is_right = logits.argmax(axis=1) == labels
        parts = {}
        for name, part in (("known", known), ("others", ~known)):
            per_class = [is_right[labels == c].mean() for c in np.flatnonzero(part) if (labels == c).any()]
            parts[name] = float(np.mean(per_class)) if per_class else None
        trust = None if solved.trust_C is None else solved.trust_C.mean().item()
        result.append({"seed": config.seed, "permuted": permuted, "form": form, "kappa": kappa, "trust": trust}
                      | {name: figures[name] for name in ("mean_per_class", "nll", "ece")} | parts)  # fmt: skip
    return result


def report(rows: list[dict[str, Any]], shots: list[str]) -> None:
    by_key = defaultdict(dict)
    for row in rows:
        by_key[row["form"], row["kappa"], row["shots"]][row["seed"]] = row
    print(f"{'form':14}{'κ':>6}" + "".join(f"{name + ' shots':>44}" for name in shots))
    print(" " * 20 + f"{'all':>9}{'known':>8}{'others':>8}{'NLL':>9}{'ECE':>10}" * len(shots))
    names = [("probe", 0.0)] + [(form + (" × n" if grows else ""), kappa) for form, kappa, grows in FORMS]
    for form, kappa in names:
        cells = []
        for number in shots:
            mine, probe = by_key[form, kappa, number], by_key["probe", 0.0, number]
            shown = []
            for name, scale in (("mean_per_class", 100), ("known", 100), ("others", 100), ("nll", 1), ("ece", 1)):
                base = 0 if form == "probe" else np.mean([probe[seed][name] or 0 for seed in probe])
                shown.append(scale * (np.mean([mine[seed][name] or 0 for seed in mine]) - base))
            sign = "" if form == "probe" else "+"
            cells.append(
                f"{shown[0]:{sign}9.2f}{shown[1]:{sign}8.2f}{shown[2]:{sign}8.2f}{shown[3]:{sign}9.3f}{shown[4]:{sign}10.3f}"
            )
        print(f"{form:14}{kappa:6.2f}" + "".join(cells))


if __name__ == "__main__":
    main()
