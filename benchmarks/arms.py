"""Arms over seeds on one data set, each a full `tes train`: figures of LOG.md.

    uv run python benchmarks/arms.py PHOTOS --arms ce,tes --seeds 10 --set train=head --set data.shots=5
    uv run python benchmarks/arms.py PHOTOS --arms ce,tes --seeds 3 --set train=all \
        --set backbone.name=examples.mobilenetv1:mobilenetv1_025 --set backbone.checkpoint=W --set image.size=112

Prints, per arm and head, mean (lowest to highest) of each figure over the seeds, and appends every run to a JSONL file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import tes
from tes import console
from tes.files import append_jsonl

FIGURES = ("mean_per_class", "top1", "nll", "ece", "coarse_top1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--arms", default="ce,tes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--split", default="test", choices=("val", "test"))
    parser.add_argument("--set", action="append", default=[], dest="assignments")
    parser.add_argument("--jsonl", type=Path)
    arguments = parser.parse_args()
    rows = []
    for arm in arguments.arms.split(","):
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            row = measure(arguments.data, arm, seed, arguments.split, arguments.assignments)
            rows.append(row)
            if arguments.jsonl:
                append_jsonl(arguments.jsonl, row)
            shown = {head: round(figures["mean_per_class"], 4) for head, figures in row["heads"].items()}
            print(json.dumps({"arm": arm, "seed": seed} | shown), flush=True)
    print(f"\n{arguments.data} {' '.join(arguments.assignments)}")
    print(f"{arguments.split}, {arguments.seeds} seeds from {arguments.first_seed}: mean (lowest to highest)")
    print(f"{'arm':24}{'head':8}" + "".join(f"{name:>26}" for name in FIGURES) + f"{'seconds':>10}")
    for arm in arguments.arms.split(","):
        mine = [row for row in rows if row["arm"] == arm]
        for head in mine[0]["heads"]:
            cells = []
            for name in FIGURES:
                values = [row["heads"][head][name] for row in mine if name in row["heads"][head]]
                cells.append(_cell(values, percent=name not in ("nll", "ece")))
            seconds = sum(row["seconds"] for row in mine) / len(mine)
            print(f"{arm:24}{head:8}" + "".join(f"{cell:>26}" for cell in cells) + f"{seconds:10.1f}")


def measure(data: str, arm: str, seed: int, split: str, assignments: list[str]) -> dict[str, Any]:
    """Train one arm (`NAME[@PRESET][+START]`) once and return its figures; the run folder is not kept."""
    objective, _, start = arm.partition("+")
    with tempfile.TemporaryDirectory() as folder, console.quiet():
        flags = {"data.source": data, "objective": objective, "start": start or None, "seed": seed}
        config = tes.load_config(flags=flags | {"out": f"{folder}/run"}, assignments=assignments)
        began = time.monotonic()
        run = tes.train(config)
        seconds = round(time.monotonic() - began, 1)
        row = {"data": data, "arm": arm, "seed": seed, "settings": assignments, "split": split}
        return row | {"heads": run.metrics[split], "objective": run.summary["objective"], "seconds": seconds}


def _cell(values: list[float], percent: bool) -> str:
    if not values:
        return "-"
    mean = sum(values) / len(values)
    if percent:
        return f"{100 * mean:.2f} ({100 * min(values):.2f} to {100 * max(values):.2f})"
    return f"{mean:.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
