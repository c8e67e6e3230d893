"""All weights trained, MobileNetV1 x 0.25 at 112 px: the table in LOG.md, arms on four data settings.

    python benchmarks/full_finetuning.py SHARED flowers.csv OUT [--seeds 3] [--first-seed 0]
    python benchmarks/full_finetuning.py SHARED flowers.csv OUT --only caltech101-4 --arms ce,tes,bss
    python benchmarks/full_finetuning.py SHARED flowers.csv OUT-mixup --arms ce,tes --seeds 1 --set augment.mixup=0.2

SHARED holds `data/caltech101`, `data/grocerystore` and `weights/mobilenetv1_025.imagenet.safetensors`; flowers.csv
comes from flowers_csv.py. Every setting is a comparison in OUT and is continued when this is started again; other
`--set` need another OUT.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tes.verbs.compare import Settings, compare

ARMS = ("ce", "ce+probe+prior", "tes@paper+random", "ce+random", "tes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("flowers", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--set", action="append", default=[], dest="assignments")
    parser.add_argument("--only", help="one of caltech101-4, flowers-4, flowers-all, grocery-all")
    arguments = parser.parse_args()
    data = {
        "caltech101-4": (arguments.shared / "data" / "caltech101", "4"),
        "flowers-4": (arguments.flowers, "4"),
        "flowers-all": (arguments.flowers, "all"),
        "grocery-all": (arguments.shared / "data" / "grocerystore", "all"),
    }
    flags = {
        "train": "all",
        "backbone.name": "examples.mobilenetv1:mobilenetv1_025",
        "backbone.checkpoint": str(arguments.shared / "weights" / "mobilenetv1_025.imagenet.safetensors"),
        "backbone.source_classes": "imagenet1k",
        "image.size": 112,
    }
    print(
        "| data, shots | arm | mean per class, % | NLL | ECE | against `ce`, points (95 %) |\n|---|---|---|---|---|---|"
    )
    for name, (source, shots) in data.items():
        if arguments.only not in (None, name):
            continue
        comparison = compare(
            Settings(flags=flags | {"data.source": str(source)}, assignments=arguments.assignments),
            arguments.arms.split(","), shots=[shots], num_seeds=arguments.seeds,
            first_seed=arguments.first_seed, controls=False, out=str(arguments.out / name),
        )  # fmt: skip
        for arm, entry in comparison.summary["arms"].items():
            figures, effect = entry["figures"][shots], entry.get("effect")
            accuracy = figures["mean_per_class"]
            shown = f"{100 * accuracy['mean']:.1f} ({100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f})"
            against = ""
            if effect:
                against = f"{100 * effect['mean']:+.1f}"
                if effect["low"] is not None:
                    against += f" ({100 * effect['low']:+.1f} to {100 * effect['high']:+.1f})"
            nll, ece = figures["nll"]["mean"], figures["ece"]["mean"]
            print(f"| {name} | `{arm}` | {shown} | {nll:.2f} | {ece:.3f} | {against} |", flush=True)


if __name__ == "__main__":
    main()
