"""How well out-of-fold predictions find label errors: errors are planted, and those most doubted are looked through.

    python benchmarks/label_errors.py DATA --share 0.05 --seeds 3 [--arms ce+probe,ce+probe+prior,tes] [--set …]

Every arm is trained head-only on the noisy labels (noisy_labels.py), and doubt is computed from its run's
predictions/train.npz: what heads that had not seen an image say about it. Printed: the part of the planted errors that
are among the `share` of the training images that are doubted most (100 %: a perfect ranking; `share`: chance), mean
over seeds (lowest to highest). That file depends on the start alone, so arms of one start give equal figures.

`1 - p(label)` stands for cross-entropy as well, and `margin` for cleanlab's normalised margin: the order is the same.
`adjusted` first takes from every p_k what images labelled k have on average (confident learning's thresholds; Kuan and
Mueller: Model-agnostic label quality scoring to detect real-world label errors, 2022).
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from noisy_labels import plant, write

import tes
from tes import console, data
from tes.config import DataConfig, arm_flags
from tes.predictions import Predictions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--arms", default="ce+probe,ce+probe+prior,tes")
    parser.add_argument("--set", action="append", default=[], dest="assignments")
    arguments = parser.parse_args()
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    with console.quiet(), tempfile.TemporaryDirectory() as scratch:
        dataset = data.open_dataset(DataConfig(source=arguments.data))
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            table = Path(scratch) / f"noisy-{seed}.csv"
            write(table, dataset, plant(dataset, arguments.share, seed))
            with table.open(encoding="utf-8") as file:
                wrong_of = {row["path"]: row["label"] != row["true_label"] for row in csv.DictReader(file)}
            for arm in arguments.arms.split(","):
                predictions = train(arm, table, seed, arguments.assignments)
                is_wrong = np.array([wrong_of[path] for path in predictions.paths])
                for name, doubt in doubts(predictions).items():
                    share = recall(doubt, is_wrong, arguments.share)
                    found[arm, name].append(share)
                    print(f"{arm:20}{name:24} seed {seed}: {share:6.1%} of {is_wrong.sum()}", flush=True)
    settings = " ".join(arguments.assignments)
    print(f"\n{arguments.data} {settings}: planted errors found among the {arguments.share:.0%} most doubted")
    for (arm, name), shares in found.items():
        print(f"{arm:20}{name:24}{np.mean(shares):7.1%} ({min(shares):.1%} to {max(shares):.1%})")


def train(arm: str, table: Path, seed: int, assignments: list[str]) -> Predictions:
    """Train one arm, head-only, and return what its start says out of fold about the training images."""
    flags = {"data.source": str(table), "seed": seed, "train": "head", "refit": "none", **arm_flags(arm)}
    flags["out"] = str(table.with_suffix("") / arm)
    return tes.train(tes.load_config(flags=flags, assignments=assignments), against=False).predictions("train")


def doubts(predictions: Predictions) -> dict[str, np.ndarray]:
    """Return, per definition, how much each image's label is doubted, (n,)."""
    labels = predictions.labels
    p_NC = predictions.probabilities("vision")
    adjusted_NC = _adjusted(p_NC, labels)
    return {
        "1 - p(label)": -_own(predictions.log_probabilities("vision"), labels),
        "margin": _margin(p_NC, labels),
        "margin of logits": _margin(predictions.log_probabilities("vision"), labels),
        "adjusted 1 - p(label)": -_own(adjusted_NC, labels),
        "adjusted margin": _margin(adjusted_NC, labels),
    }


def recall(doubt_N: np.ndarray, is_wrong_N: np.ndarray, share: float) -> float:
    """Return which part of the wrong labels is among the `share` of the images that are doubted most."""
    first = np.argsort(-doubt_N, kind="stable")[: round(share * len(doubt_N))]
    return float(is_wrong_N[first].sum() / is_wrong_N.sum())


def _own(values_NC: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    return values_NC[np.arange(len(labels_N)), labels_N]


def _margin(values_NC: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    others_NC = values_NC.copy()
    others_NC[np.arange(len(labels_N)), labels_N] = -np.inf
    return others_NC.max(axis=1) - _own(values_NC, labels_N)


def _adjusted(p_NC: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    own_N = _own(p_NC, labels_N)
    threshold_C = np.array([own_N[labels_N == label].mean() for label in range(p_NC.shape[1])])
    adjusted_NC = p_NC - threshold_C + threshold_C.max()
    return adjusted_NC / adjusted_NC.sum(axis=1, keepdims=True)


if __name__ == "__main__":
    main()
