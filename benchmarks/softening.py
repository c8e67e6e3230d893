"""How much to soften a solved head's target, designed without the test split: differences to `ce` on unused images.

    python benchmarks/softening.py PHOTOS --shots 1,2,4,8 --jsonl F [--start probe+prior] [--set backbone.name=…]

References: `text` (what h, fitted to all images, says), `out of fold` (h fitted to the other four fifths) and `uniform`
(label smoothing), each with weights λ; shipped as solved (`plain`), and with the logits' scale fitted to the labels
(`scaled`, the default of tes). Prints mean differences in mean per class, NLL, ECE; a JSONL row for each solve.
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
from tes.engine.fit import head_problem
from tes.engine.learner import one_hot
from tes.files import append_jsonl
from tes.loaded import Loaded
from tes.metrics import evaluate_split
from tes.objectives import objectives
from tes.objectives.text_head import fit_text_head
from tes.predictions import Predictions
from tes.settle import settle

REFERENCES = {
    "text": (0.02, 0.05, 0.1, 0.2),
    "text, τ 0.2": (0.1,),
    "out of fold": (0.1,),
    "uniform": (0.05, 0.1),
}
FOLDS = 5
FIGURES = ("mean_per_class", "nll", "ece")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--shots", default="1,2,4,8")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--start", default="probe+prior")
    parser.add_argument("--set", action="append", default=[], dest="assignments")
    parser.add_argument("--jsonl", type=Path, required=True)
    arguments = parser.parse_args()
    base = tes.load_config(
        flags={"data.source": arguments.data, "objective": "tes", "start": arguments.start, "train": "head"},
        assignments=arguments.assignments,
    )
    differences: dict[tuple[str, str, float, str], list[dict[str, float]]] = defaultdict(list)
    with console.quiet():
        loaded = Loaded.open(base)
        for shots in arguments.shots.split(","):
            for seed in range(arguments.seeds):
                number = None if shots == "all" else int(shots)
                rows = measure(base.replace({"seed": seed, "data.shots": number}), loaded)
                for row in rows:
                    append_jsonl(arguments.jsonl, {"data": arguments.data, "shots": shots, "seed": seed} | row)
                    difference = {figure: row[figure] - rows[0][figure] for figure in FIGURES}
                    differences[row["reference"], row["shipped"], row["weight"], shots].append(
                        difference if row is not rows[0] else {figure: row[figure] for figure in FIGURES}
                    )
    names = list(dict.fromkeys(key[:3] for key in differences))
    print(
        f"{'reference':14}{'shipped':>8}{'λ':>6}"
        + "".join(f"{shots + ' shots: mpc, NLL, ECE':>30}" for shots in arguments.shots.split(","))
    )
    for reference, shipped, weight in names:
        line = f"{reference:14}{shipped:>8}{weight:6.2f}"
        for shots in arguments.shots.split(","):
            rows = differences[reference, shipped, weight, shots]
            mpc, nll, ece = (np.mean([row[figure] for row in rows]) for figure in FIGURES) if rows else [np.nan] * 3
            line += f"{100 * mpc:12.2f}{nll:9.3f}{ece:9.3f}"
        print(line)


def measure(config: tes.Config, loaded: Loaded) -> list[dict[str, Any]]:
    """Solve for every reference from one draw, and score each on images that nobody has used; `ce` comes first."""
    dataset = data.draw(loaded.dataset, config.data, config.seed)
    settled = settle(config, dataset, loaded.backbone, objectives.get("tes"), loaded.source_text)
    config, features = settled.config, loaded.features(settled.compute)
    train = dataset.indices("train")
    unused = np.flatnonzero(np.isin(dataset.splits, ("val", "unused")))
    scored = dataset.indices("val") if config.data.shots is None else unused
    paths, labels = [dataset.paths[index] for index in scored], dataset.labels[scored]
    x_NF, label_NC = features(train), one_hot(torch.from_numpy(dataset.labels[train]), dataset.num_classes)
    problem = head_problem(config, loaded.prior(config) if "+" in str(config.start) else None)
    rows_CD = torch.from_numpy(loaded.class_text(config.text).Z)

    def row(reference: str, shipped: str, weight: float, other_NC: torch.Tensor) -> dict[str, Any]:
        softer_NC = (1 - weight) * label_NC + weight * other_NC
        solution = problem.solve(x_NF, softer_NC, label_NC if shipped == "scaled" else None, tolerance=1e-4)
        logits = solution.head.logits(features(scored)).numpy()
        figures = evaluate_split(Predictions(paths, labels, {"vision": logits}))["vision"]
        return {"reference": reference, "shipped": shipped, "weight": weight} | {
            name: figures[name] for name in FIGURES
        }

    def fitted(rows: torch.Tensor, temperature: float):
        return fit_text_head(
            x_NF[rows], label_NC[rows], rows_CD, temperature=temperature,
            fit_steps=config.objective.fit_steps, fit_penalty=config.objective.fit_penalty, seed=config.seed,
        )  # fmt: skip

    everything = torch.arange(len(train))
    guesses = {"uniform": torch.full_like(label_NC, 1 / dataset.num_classes)}
    with torch.no_grad():
        guesses["text"] = fitted(everything, 0.1)(x_NF).softmax(1)
        guesses["text, τ 0.2"] = fitted(everything, 0.2)(x_NF).softmax(1)
    if np.bincount(dataset.labels[train]).min() > 1:
        fold = torch.from_numpy(_folds(dataset.labels[train]))
        guesses["out of fold"] = torch.zeros_like(label_NC)
        for number in range(FOLDS):
            if (fold == number).any():
                head = fitted(everything[fold != number], 0.1)
                with torch.no_grad():
                    guesses["out of fold"][fold == number] = head(x_NF[fold == number]).softmax(1)
    return [row("ce", 0.0, label_NC)] + [
        row(name, weight, guesses[name])
        for name, weights in REFERENCES.items()
        if name in guesses
        for weight in weights
    ]


def _folds(labels: np.ndarray) -> np.ndarray:
    fold = np.zeros(len(labels), dtype=int)
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        fold[mine] = np.arange(len(mine)) % FOLDS
    return fold


if __name__ == "__main__":
    main()
