"""Small and hostile cases: random subsets of the classes, with their own names and with those of other classes.

    python benchmarks/small_cases.py CALTECH101 --draws 50 --split test --jsonl F

Per size and number of shots: mean gain of the text prior over the converged probe, its standard error, the worst draw.
What `tes train --start probe+prior --objective ce` would do, without the run folders.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

import tes
from tes import console
from tes.config import Config
from tes.data.splits import draw_shots
from tes.engine.fit import head_problem
from tes.engine.learner import one_hot
from tes.engine.prior import predict_rows
from tes.engine.solve import HeadProblem, Prior
from tes.files import append_jsonl
from tes.loaded import Loaded
from tes.objectives import objectives
from tes.settle import settle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--sizes", default="2,3,5,10")
    parser.add_argument("--shots", default="1,4")
    parser.add_argument("--draws", type=int, default=50)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--split", default="val", choices=("val", "test"), help="val: the pool's other images")
    parser.add_argument("--set", action="append", default=[], dest="assignments")
    parser.add_argument("--jsonl", type=Path)
    arguments = parser.parse_args()
    config = tes.load_config(
        flags={"data.source": arguments.data, "objective": "ce", "start": "probe+prior", "train": "head"},
        assignments=arguments.assignments,
    )
    with console.quiet():
        loaded = Loaded.open(config)
        config = settle(config, loaded.dataset, loaded.backbone, objectives.get("ce"), loaded.source_text).config
    print(f"{arguments.draws} draws, scored on {arguments.split}: mean gain ± standard error (worst draw), points")
    print(f"{'classes':>8}{'shots':>7}{'ce':>8}{'own names':>26}{'names of others':>26}")
    for size in map(int, arguments.sizes.split(",")):
        for shots in map(int, arguments.shots.split(",")):
            rows = []
            for seed in range(arguments.first_seed, arguments.first_seed + arguments.draws):
                row = measure(config, loaded, size, shots, seed, arguments.split)
                rows.append({"classes": size, "shots": shots, "seed": seed, "split": arguments.split} | row)
                if arguments.jsonl:
                    append_jsonl(arguments.jsonl, rows[-1])
            cells = []
            for names in ("own", "others"):
                gains = 100 * np.array([row[names] - row["probe"] for row in rows])
                error = gains.std(ddof=1) / len(gains) ** 0.5
                cells.append(f"{gains.mean():+.2f} ± {error:.2f} ({gains.min():+.1f})")
            probe = 100 * np.mean([row["probe"] for row in rows])
            print(f"{size:8}{shots:7}{probe:8.1f}" + "".join(f"{cell:>26}" for cell in cells), flush=True)


def measure(config: Config, loaded: Loaded, size: int, shots: int, seed: int, split: str) -> dict[str, float]:
    """Return the accuracy of the probe, and of the prior with the classes' own names and with others', on one draw."""
    dataset = loaded.dataset
    order = np.random.default_rng(seed).permutation(dataset.num_classes)
    classes, strangers = np.sort(order[:size]), order[size : 2 * size]
    images = np.flatnonzero(np.isin(dataset.labels, classes))
    labels = np.searchsorted(classes, dataset.labels[images])
    drawn = draw_shots(
        [str(label) for label in labels], [dataset.sha1s[i] for i in images], [None] * len(images),
        dataset.splits[images], shots, seed,
    )  # fmt: skip
    train = drawn == "train"
    scored = drawn == "test" if split == "test" else (drawn == "unused") | (drawn == "val")
    source, head = loaded.source_text(config.text), loaded.backbone.source_head
    rows_CD = torch.from_numpy(loaded.class_text(config.text).uncentred)
    features = loaded.features(
        settle(config, dataset, loaded.backbone, objectives.get("ce"), loaded.source_text).compute
    )
    x_NF, target_NC = features(images[train]), one_hot(torch.from_numpy(labels[train]), size)
    result = {}
    for name, members in (("probe", None), ("own", classes), ("others", strangers)):
        problem = HeadProblem(config.optim.head_penalty)
        if members is not None:
            target_CD = rows_CD[torch.from_numpy(members)]
            prior_CF = predict_rows(
                target_CD, torch.from_numpy(source.rows_SD), head.weight_SF, config.prior.gamma, config.prior.rho
            )
            problem = head_problem(config, Prior(prior_CF, config.prior.form, config.prior.kappa))
        solved = problem.solve(x_NF, target_NC, tolerance=1e-5).head
        is_right = solved.logits(features(images[scored])).argmax(dim=1).numpy() == labels[scored]
        result[name] = float(np.mean([is_right[labels[scored] == c].mean() for c in range(size)]))
    return result


if __name__ == "__main__":
    main()
