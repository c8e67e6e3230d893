"""TeS on its own ground: a self-supervised network, random heads, all weights trained, beside its controls.

    python benchmarks/self_supervised.py SHARED flowers.csv OUT --stage search
    python benchmarks/self_supervised.py SHARED flowers.csv OUT --stage final --only grocery --seeds 5 --first-seed 10

The half-width ResNet-18 of SHARED/weights (MoCo v2 on Tiny-ImageNet, 64 px), SGD. The search tries the same learning
rates for every arm on Caltech-101 at 10 shots, seed 0, and reads val alone; the final takes for every arm the rate with
the lowest NLL there, on every data set. Every training is a run folder in OUT, and a finished one is not repeated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import tes
from tes import console
from tes.errors import RunError
from tes.run import Run
from tes.statistics import paired

ARMS = ("ce", "tes", "label_smoothing", "tes@paper", "tes@random-text", "tes@permuted-text")
RATES = (0.03, 0.1, 0.3)
SEARCHED = "caltech101"
FIGURES = ("mean_per_class", "nll", "ece", "coarse_top1")


def recipe(shared: Path) -> dict[str, Any]:
    """Return what all runs have in common."""
    return {
        "train": "all",
        "start": "random",
        "backbone.name": "resnet18",
        "backbone.kwargs": {"channels": [32, 64, 128, 256], "stem_width": 32},
        "backbone.checkpoint": str(shared / "weights" / "resnet18_half.tinyimagenet.mocov2.pth"),
        "image.size": 64,
        "augment.policy": "resized_crop",
        "optim.name": "sgd",
        "optim.batch_size": 64,
        "optim.num_epochs": 20,
        "optim.freeze_norms": False,
        "precision": "fp32",
        "memory_format": "channels_last",
    }


def data_sets(shared: Path, flowers: Path) -> dict[str, dict[str, Any]]:
    """Return the settings of each data set; `noise` stands for CSVs from noisy_labels.py, beside flowers.csv."""
    grocery = shared / "data" / "grocerystore"
    return {
        "caltech101": {"data.source": str(shared / "data" / "caltech101"), "data.shots": 10},
        "grocery": {"data.source": str(grocery)},
        "grocery-descriptions": {"data.source": str(grocery), "data.classes": str(grocery / "classes.json")},
        "flowers": {"data.source": str(flowers)},
        "caltech101-noise": {"data.source": str(flowers.with_name("caltech101-noise.csv")), "data.shots": 10},
    }


def trained(out: Path, flags: dict[str, Any], arm: str, seed: int, rate: float) -> Run:
    """Return the finished run of one arm, training it where it is not there."""
    folder = out / f"{arm}-lr{rate}-s{seed}"
    try:
        return Run.open(folder)
    except RunError:
        pass
    own = {"objective": arm, "optim.learning_rate": rate, "seed": seed, "out": str(folder)}
    if arm.startswith("tes") and arm != "tes@paper":
        own["objective.text_target_weight"] = 0.5
    with console.quiet():
        return tes.train(tes.load_config(flags=flags | own), overwrite=True)


def search(out: Path, flags: dict[str, Any]) -> None:
    """Train every arm at every rate and keep, per arm, the one with the lowest NLL on val."""
    best = {}
    for arm in ARMS:
        losses = {}
        for rate in RATES:
            run = trained(out, flags, arm, 0, rate)
            figures = run.metrics["val"]["vision"]
            losses[rate] = figures["nll"]
            print(f"{arm:20} lr {rate:<5} val {figures['mean_per_class']:.1%}, NLL {figures['nll']:.3f}", flush=True)
        best[arm] = min(losses, key=losses.__getitem__)
    (out.parent / "rates.json").write_text(json.dumps(best, indent=1) + "\n", encoding="utf-8")
    print(best)


def final(name: str, out: Path, flags: dict[str, Any], rates: dict[str, float], seeds: range, arms: list[str]) -> None:
    """Train every arm from every seed and print its figures on test, and the difference to `ce`."""
    runs = {arm: [] for arm in arms}
    for seed in seeds:
        for arm in arms:
            runs[arm].append(trained(out, flags, arm, seed, rates[arm]))
            figures = runs[arm][-1].metrics["test"]["vision"]
            print(f"# {name} {arm} seed {seed}: {figures['mean_per_class']:.4f}, NLL {figures['nll']:.3f}", flush=True)
    print(f"\n| {name} | head | mean per class, % | NLL | ECE | coarse, % | against `ce`, points (95 %) | wins |")
    print("|---|---|---|---|---|---|---|---|")
    baseline = [run.metrics["test"]["vision"]["mean_per_class"] for run in runs[arms[0]]]
    for arm in arms:
        for head in runs[arm][0].metrics["test"]:
            rows = [run.metrics["test"][head] for run in runs[arm]]
            values = {figure: np.array([row[figure] for row in rows if figure in row]) for figure in FIGURES}
            accuracy = 100 * values["mean_per_class"]
            coarse = f"{100 * values['coarse_top1'].mean():.1f}" if len(values["coarse_top1"]) else "-"
            effect, shown = paired(list(values["mean_per_class"] - baseline)), " | "
            if arm != arms[0] and effect.low is not None and effect.high is not None:
                shown = f"{100 * effect.mean:+.1f} ({100 * effect.low:+.1f} to {100 * effect.high:+.1f})"
                shown += f" | {effect.wins} of {effect.num_seeds}"
            print(
                f"| `{arm}` | {head} | {accuracy.mean():.1f} ({accuracy.min():.1f} to {accuracy.max():.1f}) |"
                f" {values['nll'].mean():.2f} | {values['ece'].mean():.3f} | {coarse} | {shown} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("flowers", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stage", choices=("search", "final"), required=True)
    parser.add_argument(
        "--only", default="grocery", help="a data set's name: " + ", ".join(data_sets(Path(), Path("x")))
    )
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=10)
    arguments = parser.parse_args()
    out, common = arguments.out, recipe(arguments.shared)
    sets = data_sets(arguments.shared, arguments.flowers)
    if arguments.stage == "search":
        search(out / "search", common | sets[SEARCHED])
        return
    rates = json.loads((out / "rates.json").read_text(encoding="utf-8"))
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    final(arguments.only, out / arguments.only, common | sets[arguments.only], rates, seeds, arguments.arms.split(","))


if __name__ == "__main__":
    main()
