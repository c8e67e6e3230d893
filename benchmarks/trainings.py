"""What benchmarks that take hours share: trainings that leave a row each, none repeated, several at once, a table."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import tes
from tes import console
from tes.files import append_jsonl
from tes.statistics import paired

FIGURES = ("mean_per_class", "nll", "ece", "coarse_top1")


@dataclass(frozen=True)
class Training:
    """What a row is found by again, and the settings that lead to it; `key` holds `data`, `arm` and `seed` at least."""

    key: dict[str, Any]
    flags: dict[str, Any]


@dataclass
class Record:
    """What has been trained so far: a JSON-lines file, one row of figures per training."""

    path: Path

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """Return the row of one training, if there is one."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ()
        return next((row for row in map(json.loads, lines) if row | key == row), None)

    def figures(self, training: Training) -> dict[str, Any]:
        """Return the metrics of one training by split and head, from the record or by doing it now."""
        self.do([training])
        return self.find(training.key)["metrics"]

    def do(self, trainings: Sequence[Training], num_processes: int = 1) -> None:
        """Do what has no row yet; several at once once each data set's first one has filled the caches."""
        missing = [training for training in trainings if self.find(training.key) is None]
        if num_processes == 1:
            for training in missing:
                self._add(training, trained(training))
            return
        first = {training.key["data"]: training for training in reversed(missing)}
        rest = [training for training in missing if training not in first.values()]
        with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as pool:
            for part in (list(first.values()), rest):
                under_way = {pool.submit(trained, training): training for training in part}
                for done in as_completed(under_way):
                    self._add(under_way[done], done.result())

    def _add(self, training: Training, outcome: dict[str, Any]) -> None:
        append_jsonl(self.path, training.key | outcome)
        accuracy = outcome["metrics"]["test"]["vision"]["mean_per_class"]
        shown = " ".join(str(value) for value in training.key.values())
        print(f"# {shown}: {accuracy:.2%} on {outcome['processor']}", flush=True)


def trained(training: Training) -> dict[str, Any]:
    """Train in a folder that is thrown away, and return the metrics by split and head, and where it was."""
    with tempfile.TemporaryDirectory() as folder, console.quiet():
        run = tes.train(tes.load_config(flags=training.flags | {"out": f"{folder}/run"}), against=False)
        processor = json.loads((run.path / "env.json").read_text(encoding="utf-8"))["processor"]
    metrics = {
        split: {
            head: {figure: round(values[figure], 6) for figure in FIGURES if figure in values}
            for head, values in heads.items()
        }
        for split, heads in run.metrics.items()
    }
    return {"metrics": metrics, "processor": processor}


def print_table(title: str, by_arm: dict[str, list[dict[str, Any]]], baseline: str) -> None:
    """Print each arm's figures on one split, a row for each head, and its difference to the baseline's seed by seed.

    Args:
        title: The head of the first column.
        by_arm: For every arm the metrics by head, one entry per seed, the same seeds in the same order.
        baseline: One of the arms.
    """
    print(
        f"\n| {title} | head | mean per class, % | NLL | ECE | coarse, % | against `{baseline}`, points (95 %) | wins |"
    )
    print("|---|---|---|---|---|---|---|---|")
    its = np.array([heads["vision"]["mean_per_class"] for heads in by_arm[baseline]])
    for arm, heads_by_seed in by_arm.items():
        for head in heads_by_seed[0]:
            rows = [heads[head] for heads in heads_by_seed]
            values = {figure: np.array([row[figure] for row in rows if figure in row]) for figure in FIGURES}
            accuracy = 100 * values["mean_per_class"]
            coarse = f"{100 * values['coarse_top1'].mean():.1f}" if len(values["coarse_top1"]) else "-"
            effect, shown = paired(list(values["mean_per_class"] - its)), " | "
            if arm != baseline and effect.low is not None and effect.high is not None:
                shown = f"{100 * effect.mean:+.1f} ({100 * effect.low:+.1f} to {100 * effect.high:+.1f})"
                shown += f" | {effect.wins} of {effect.num_seeds}"
            print(
                f"| `{arm}` | {head} | {accuracy.mean():.1f} ({accuracy.min():.1f} to {accuracy.max():.1f}) |"
                f" {values['nll'].mean():.2f} | {values['ece'].mean():.3f} | {coarse} | {shown} |",
                flush=True,
            )
