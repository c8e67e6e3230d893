"""The default backbone with all weights trained, and its head alone: arms and controls on three data sets.

    python benchmarks/wide_finetuning.py SHARED flowers.csv F.jsonl --seeds 3 --first-seed 10 --processes 14

EfficientNet-Lite0 at 160 px, no refit, the rest as `tes train` decides it; flowers.csv comes from flowers_csv.py. Every
training leaves a row in F.jsonl and is not repeated where its row is there; seed by seed, so that it can be stopped.
Meant for a machine with a GPU: on two cores a seed takes hours.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from trainings import Record, Training

from tes.config import arm_flags

SETTINGS = ("caltech101-1", "caltech101-4", "caltech101-16", "grocery-4", "grocery-all", "flowers-4", "flowers-all")
ARMS = ("ce", "ce+probe+prior", "tes", "tes@random-text", "tes@permuted-text", "label_smoothing", "bi_tuning")
HEAD_ARMS = ("ce", "tes")
"""With the backbone fixed, beside `--arms`, which train it: a user who has a GPU gets the latter by default."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("flowers", type=Path)
    parser.add_argument("record", type=Path)
    parser.add_argument("--only", default=",".join(SETTINGS), help="settings: DATA-SHOTS, comma-separated")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--size", type=int, default=160, help="image size in pixels")
    parser.add_argument("--lr", type=float, help="a learning rate instead of the default one")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=10)
    parser.add_argument("--split", choices=("val", "test"), default="test", help="what the table shows")
    parser.add_argument("--processes", type=int, default=1, help="trainings at once; several have a thread each")
    arguments = parser.parse_args()
    sources = {
        "caltech101": arguments.shared / "data" / "caltech101",
        "grocery": arguments.shared / "data" / "grocerystore",
        "flowers": arguments.flowers,
    }
    settings, arms = arguments.only.split(","), arguments.arms.split(",")
    columns = [(arm, "all") for arm in arms] + [(arm, "head") for arm in HEAD_ARMS]
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    wanted = {}
    for seed in seeds:
        for setting in settings:
            for arm, train in columns:
                data, _, shots = setting.rpartition("-")
                flags = {"data.source": str(sources[data]), "image.size": arguments.size, "train": train, "seed": seed}
                flags |= {"refit": "none", "num_workers": 0} | arm_flags(arm)
                flags |= {} if shots == "all" else {"data.shots": int(shots)}
                rate = flags["optim.learning_rate"] = arguments.lr if train == "all" else None
                key = {"data": data, "shots": shots, "size": arguments.size, "arm": arm, "train": train, "seed": seed}
                key["learning_rate"] = rate  # None: the default one
                wanted[setting, arm, train, seed] = Training(key, flags)
    record = Record(arguments.record)
    record.do(list(wanted.values()), arguments.processes)
    for setting in settings:
        by_arm = {
            arm if train == "all" else f"{arm}, head alone": [wanted[setting, arm, train, seed] for seed in seeds]
            for arm, train in columns
        }
        record.print_table(setting, by_arm, arguments.split)


if __name__ == "__main__":
    main()
