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
import torch

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

    @property
    def name(self) -> str:
        return " ".join(str(value) for value in self.key.values())


@dataclass
class Record:
    """What has been trained so far: a JSON-lines file, one row of figures per training."""

    path: Path

    def find(self, training: Training) -> dict[str, Any] | None:
        """Return the row of one training, if there is one: its key, and what `trained` returned."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ()
        return next((row for row in map(json.loads, lines) if row | training.key == row), None)

    def do(self, trainings: Sequence[Training], num_processes: int = 1) -> None:
        """Do what has no row yet; several at once once each data set's first one has filled the caches.

        Raises:
            Exception: What the first of those that failed raised; of several processes, once all others are done.
        """
        missing = [training for training in trainings if self.find(training) is None]
        if num_processes == 1:  # in this process, with its threads; the first that fails ends it
            for training in missing:
                self._add(training, trained(training))
            return
        first = {training.key["data"]: training for training in reversed(missing)}
        rest = [training for training in missing if training not in first.values()]
        pool = ProcessPoolExecutor(
            num_processes, multiprocessing.get_context("spawn"), torch.set_num_threads, initargs=(1,)
        )
        problems = []
        try:
            for part in (list(first.values()), rest):
                under_way = {pool.submit(trained, training): training for training in part}
                for done in as_completed(under_way):
                    if problem := done.exception():  # one that failed takes no row of the others with it
                        problems.append(problem)
                        print(f"# {under_way[done].name}: {problem}", flush=True)
                    else:
                        self._add(under_way[done], done.result())
        finally:
            pool.shutdown(cancel_futures=True)
        if problems:
            raise problems[0]

    def print_table(self, title: str, by_arm: dict[str, list[Training]], split: str = "test") -> None:
        """Print each arm's figures, a row for each head, and its difference to the first arm's seed by seed.

        Args:
            title: The head of the first column.
            by_arm: For every arm its trainings, all done, the same seeds in the same order.
            split: Which figures.
        """
        rows = {arm: [self.find(training) for training in trainings] for arm, trainings in by_arm.items()}
        baseline, its_rows = next(iter(rows.items()))
        its_S = np.array([row["metrics"][split]["vision"]["mean_per_class"] for row in its_rows])
        columns = (title, "head", "mean per class, %", "NLL", "ECE", "coarse, %", f"against `{baseline}`", "wins")
        print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for arm, of_arm in rows.items():
            for head in of_arm[0]["metrics"][split]:
                figures = [row["metrics"][split][head] for row in of_arm]
                values = {name: np.array([its[name] for its in figures if name in its]) for name in FIGURES}
                accuracy_S = values["mean_per_class"]
                low, high = 100 * accuracy_S.min(), 100 * accuracy_S.max()
                cells = [f"`{arm}`", head, f"{100 * accuracy_S.mean():.1f} ({low:.1f} to {high:.1f})"]
                cells += [f"{values['nll'].mean():.2f}", f"{values['ece'].mean():.3f}"]
                cells += [f"{100 * values['coarse_top1'].mean():.1f}" if len(values["coarse_top1"]) else "-"]
                cells += ["", ""] if arm == baseline else _difference(accuracy_S - its_S)
                print(f"| {' | '.join(cells)} |", flush=True)
        if (
            len(processors := {row.get("processor") or "not recorded" for of_arm in rows.values() for row in of_arm})
            > 1
        ):
            print(f"\nNot all on one kind of machine, which moves figures too: {', '.join(sorted(processors))}.")

    def _add(self, training: Training, outcome: dict[str, Any]) -> None:
        append_jsonl(self.path, training.key | outcome)
        accuracy = outcome["metrics"]["test"]["vision"]["mean_per_class"]
        print(f"# {training.name}: {accuracy:.2%} on {outcome['processor']}", flush=True)


def trained(training: Training) -> dict[str, Any]:
    """Train in a folder that is thrown away; return the metrics by split and head, where it was, and at which rate."""
    with tempfile.TemporaryDirectory() as folder, console.quiet():
        run = tes.train(tes.load_config(flags=training.flags | {"out": f"{folder}/run"}), against=False)
        processor = json.loads((run.path / "env.json").read_text(encoding="utf-8"))["processor"]
        rate = run.settings["optim"]["learning_rate"]
    metrics = {
        split: {
            head: {figure: round(values[figure], 6) for figure in FIGURES if figure in values}
            for head, values in heads.items()
        }
        for split, heads in run.metrics.items()
    }
    return {"metrics": metrics, "processor": processor, "rate": rate}


def _difference(difference_S: np.ndarray) -> list[str]:
    """Return the cells of a difference in points with its 95 % interval, where there is one, and of the seeds won."""
    effect = paired(list(difference_S))
    shown = f"{100 * effect.mean:+.1f}"
    if effect.low is not None and effect.high is not None:
        shown += f" ({100 * effect.low:+.1f} to {100 * effect.high:+.1f})"
    return [shown, f"{effect.wins} of {effect.num_seeds}"]
