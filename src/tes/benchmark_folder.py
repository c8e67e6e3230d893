"""A benchmark, read back from its comparisons: tasks × backbones × text encoders × arms as one table.

benchmark.json (what was asked, and what became of it)  benchmark.{md,csv,html}  env.json
<task>/<backbone>+<text>/ (a comparison each)

Reads summaries alone; torch is not needed. Every task is in its own metric.
"""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from tes.card import plain
from tes.comparison import BASELINE, Comparison, summary_metric
from tes.errors import ConfigError, RunError, counted, listing, one_line
from tes.files import csv_text, read_json, write_atomic, write_json
from tes.metrics import METRICS
from tes.statistics import Paired, paired

FORMAT = 1
COLUMNS = (
    "task", "dataset", "metric", "backbone", "text", "shots", "arm", "is_added", "protocol", "num_seeds", "percent",
    "percent_low", "percent_high", "difference_points", "difference_low", "difference_high", "published_percent",
    "state", "reason", "comparison",
)  # fmt: skip
PUBLISHED_KEY = ("task", "backbone", "text", "arm")
STATES = {"done": "", "waiting": "not run yet", "skipped": "no data", "failed": "failed"}
"""What can become of a combination, and what stands in the table in place of a figure."""


@dataclass(frozen=True)
class Combination:
    """One comparison of the set.

    Attributes:
        task: The data's name, as in the table.
        backbone: As the user typed it.
        text: The text encoder, likewise.
        folder: Of the comparison, relative to the benchmark's.
        state: Of `STATES`.
        reason: Why it is skipped or failed, in a sentence.
    """

    task: str
    backbone: str
    text: str
    folder: str
    state: str = "waiting"
    reason: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from the others."""
        return self.task, self.backbone, self.text


@dataclass
class Benchmark:
    """A benchmark's folder.

    Attributes:
        path: The folder.
        arms: As the user typed them, the baseline first.
        combinations: All that were ever asked for in this folder, in order.
        published: (task, backbone, text, arm) to a published figure in per cent.
    """

    path: Path
    arms: list[str]
    combinations: list[Combination] = field(default_factory=list)
    published: dict[tuple[str, ...], float] = field(default_factory=dict)

    @staticmethod
    def open(path: str | Path) -> Benchmark:
        """Open a benchmark's folder, finished or not.

        Raises:
            RunError: There is none, or benchmark.json is damaged.
        """
        folder = Path(path)
        file = folder / "benchmark.json"
        if not file.is_file():
            raise RunError(f"`{folder}` is not a benchmark: there is no benchmark.json in it.")
        stored = read_json(file, RunError)
        try:
            if stored["format"] != FORMAT:
                raise RunError(f"`{file}` has format {stored['format']!r}; this version reads format {FORMAT}.")
            arms = TypeAdapter(list[str]).validate_python(stored["arms"])
            combinations = TypeAdapter(list[Combination]).validate_python(stored["combinations"])
            published = TypeAdapter(list[tuple[str, str, str, str, float]]).validate_python(stored["published"])
        except (KeyError, TypeError, ValidationError):
            raise RunError(f"`{file}` is not the plan of a benchmark.") from None
        for one in combinations:
            if one.state not in STATES or Path(one.folder).is_absolute() or ".." in Path(one.folder).parts:
                raise RunError(f"`{file}` is damaged: `{one.folder}` is no comparison of it.")
        # A comparison that was removed, or begun again and left unfinished, is one to run.
        combinations = [
            dataclasses.replace(one, state="waiting")
            if one.state == "done" and not (folder / one.folder / "summary.json").is_file()
            else one
            for one in combinations
        ]
        return Benchmark(folder, arms, combinations, {tuple(key): value for *key, value in published})

    def put(self, combination: Combination) -> None:
        """Add a combination, or replace what is known of it, and save the plan."""
        keys = [one.key for one in self.combinations]
        if combination.key in keys:
            self.combinations[keys.index(combination.key)] = combination
        else:
            self.combinations.append(combination)
        self._summaries.pop(combination.key, None)
        self.save()

    def save(self) -> None:
        """Write benchmark.json."""
        write_json(
            self.path / "benchmark.json",
            {
                "format": FORMAT,
                "arms": self.arms,
                "combinations": [dataclasses.asdict(one) for one in self.combinations],
                "published": [[*key, value] for key, value in self.published.items()],
            },
        )

    @cached_property
    def _summaries(self) -> dict[tuple[str, str, str], Mapping[str, Any]]:
        return {}

    def summary(self, combination: Combination) -> Mapping[str, Any] | None:
        """Return the summary of a combination's comparison; None where it is not done."""
        if combination.state != "done":
            return None
        if combination.key not in self._summaries:
            self._summaries[combination.key] = Comparison.open(self.path / combination.folder).summary
        return self._summaries[combination.key]


@dataclass(frozen=True)
class Row:
    """A figure: of one arm, in one combination, at one number of shots; or why there is none.

    `is_added` marks the arms that tell where a gain comes from; `figure` and `against` are as in summary.json.
    """

    combination: Combination
    shots: str
    arm: str
    is_added: bool = False
    dataset: str = ""
    metric: str = ""
    protocol: str = ""
    figure: Mapping[str, Any] | None = None
    against: Mapping[str, Any] | None = None
    published: float | None = None


def rows(benchmark: Benchmark) -> list[Row]:
    """Return every figure of the benchmark, in the order of its combinations."""
    found = []
    for one in benchmark.combinations:
        summary = benchmark.summary(one)
        for shots in summary["shots"] if summary else [""]:
            added = [arm for arm in summary["arms"] if arm not in benchmark.arms] if summary else []
            for arm in (*benchmark.arms, *added):
                published = benchmark.published.get((*one.key, arm))
                if summary is None:
                    found.append(Row(one, shots, arm, published=published))
                    continue
                metric, entry = summary_metric(summary), summary["arms"].get(arm)
                if entry is None:  # asked for later, and not run here yet
                    found.append(Row(dataclasses.replace(one, state="waiting"), shots, arm, published=published))
                    continue
                about = {"dataset": summary["dataset"], "metric": metric, "protocol": summary["protocol"]}
                figure, against = entry["figures"][shots][metric], (entry.get("by_shots") or {}).get(shots)
                found.append(Row(one, shots, arm, arm in added, **about, figure=figure, against=against,
                                 published=published))  # fmt: skip
    return found


def tasks(found: Sequence[Row]) -> dict[str, str]:
    """Return each task's heading: the data's own name, which says what is missing of it, and its metric."""
    names: dict[str, str] = {}
    for row in found:
        if row.figure is not None or row.combination.task not in names:
            known = f"{row.dataset}, {METRICS[row.metric]}" if row.figure is not None else row.combination.task
            names[row.combination.task] = known
    return names


@dataclass(frozen=True)
class Line:
    """A line of the paper-shaped table: one backbone, text, number of shots and arm over all tasks."""

    backbone: str
    text: str
    shots: str
    arm: str
    is_added: bool
    by_task: Mapping[str, Row]
    average: float | None
    difference: Paired | None


def lines(found: Sequence[Row]) -> list[Line]:
    """Return the paper-shaped table.

    An average, and an average difference, is over the tasks that have a figure in any line, and is left out where a
    line lacks one of them: averages over different tasks must not stand in one column.
    """
    scored = {row.combination.task for row in found if row.figure is not None}
    shots = list(dict.fromkeys(row.shots for row in found if row.shots)) or [""]
    groups: dict[tuple[str, str, str, str, bool], dict[str, Row]] = {}
    for row in found:
        one = row.combination
        for at in [row.shots] if row.shots else shots:  # what has no figure has none at any number of shots
            groups.setdefault((one.backbone, one.text, at, row.arm, row.is_added), {})[one.task] = row
    made = []
    order = list(dict.fromkeys(key[:3] for key in groups))
    for key in sorted(groups, key=lambda key: (order.index(key[:3]), key[4])):
        by_task = groups[key]
        figures = [by_task[task].figure if task in by_task else None for task in scored]
        whole = [figure["mean"] for figure in figures if figure is not None]
        average = float(np.mean(whole)) if whole and len(whole) == len(scored) else None
        made.append(Line(*key, by_task, average, _average_difference([by_task.get(task) for task in scored])))
    return made


def _average_difference(parts: Sequence[Row | None]) -> Paired | None:
    """Return the difference to `ce`, the mean over tasks taken seed by seed first."""
    if not parts or not all(row is not None and row.against and row.against.get("by_seed") for row in parts):
        return None
    by_seed = [row.against["by_seed"] for row in parts if row is not None and row.against]
    num_seeds = max(map(len, by_seed))
    # An arm that is run once, since nothing in it depends on the seed, stands for every seed.
    full = [values * num_seeds if len(values) == 1 else values for values in by_seed]
    if any(len(values) != num_seeds for values in full):
        return None
    has_seeds = any(row.against["num_seeds"] > 0 for row in parts if row is not None and row.against)
    means = np.mean(full, axis=0).tolist()
    return paired(means, has_seeds or len(means) > 1)


def write_tables(benchmark: Benchmark) -> None:
    """Write benchmark.md and benchmark.csv."""
    found = rows(benchmark)
    write_atomic(benchmark.path / "benchmark.csv", to_csv(found))
    write_atomic(benchmark.path / "benchmark.md", to_markdown(benchmark, found))


def to_csv(found: Sequence[Row]) -> str:
    """Return one line per figure, in per cent and points; its column `published_percent` is for the user to fill."""
    lines = []
    for row in found:
        one, figure, against = row.combination, row.figure or {}, row.against or {}
        values = {
            "task": one.task,
            "dataset": row.dataset,
            "metric": row.metric,
            "backbone": one.backbone,
            "text": one.text,
            "shots": row.shots,
            "arm": row.arm,
            "is_added": int(row.is_added),
            "protocol": row.protocol,
            "num_seeds": figure.get("num"),
            "percent": _hundred(figure.get("mean")),
            "percent_low": _hundred(figure.get("low")),
            "percent_high": _hundred(figure.get("high")),
            "difference_points": _hundred(against.get("mean")),
            "difference_low": _hundred(against.get("low")),
            "difference_high": _hundred(against.get("high")),
            "published_percent": row.published,
            "state": one.state,
            "reason": one.reason,
            "comparison": one.folder if one.state == "done" else None,
        }
        lines.append([values[name] for name in COLUMNS])
    return csv_text(COLUMNS, lines)


def _hundred(fraction: float | None) -> float | None:
    return None if fraction is None else round(100 * fraction, 4)


def read_published(path: Path) -> dict[tuple[str, ...], float]:
    """Return published figures, in per cent, from a CSV with task, backbone, text, arm and published_percent.

    benchmark.csv with that column filled is such a file; lines without a figure are passed over.

    Raises:
        ConfigError: It cannot be read, lacks a column, or a figure is no percentage.
    """
    columns = (*PUBLISHED_KEY, "published_percent")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise ConfigError(f"--published: `{path}` cannot be read: {one_line(problem)}.") from None
    if not table or (lacking := [name for name in columns if name not in table[0]]):
        what = f"has no column `{lacking[0]}`" if table else "has no line"
        raise ConfigError(f"--published: `{path}` {what}; it needs {', '.join(columns)}, as benchmark.csv has them.")
    figures: dict[tuple[str, ...], float] = {}
    for number, row in enumerate(table, start=2):
        text = (row["published_percent"] or "").strip()
        if not text:
            continue
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 100:
            raise ConfigError(f"--published: line {number} of `{path}`: `{text}` is no figure in per cent.")
        figures[tuple((row[name] or "").strip() for name in PUBLISHED_KEY)] = value
    if figures and max(figures.values()) <= 1:
        raise ConfigError(f"--published: the figures of `{path}` are fractions; write them in per cent.")
    return figures


def caption(found: Sequence[Row]) -> str:
    """Return what the figures are, in a sentence."""
    protocols = sorted({row.protocol for row in found if row.protocol})
    chosen = {"paper": "test-selected, protocol `paper`"}
    how = ", ".join(chosen.get(name, name) for name in protocols) or "nothing has been run yet"
    seeds = sorted({row.figure["num"] for row in found if row.figure is not None})
    return (
        f"In per cent, each task in its own metric, mean over {listing(seeds) or 'no'} seeds; differences to"
        f" `{BASELINE}` in points, paired by seed, with 95 % intervals; {how}."
    )


def missing(benchmark: Benchmark) -> list[str]:
    """Return a line for whatever has no figure, with the reason; data that nobody has are named once."""
    said: dict[str, None] = {}
    for one in benchmark.combinations:
        if one.state == "skipped":
            said[f"`{one.task}` was skipped: {one.reason}"] = None
        elif one.state == "failed":
            said[f"`{one.task}`, `{one.backbone}`, `{one.text}` failed: {one.reason}"] = None
    waiting = sum(one.state == "waiting" for one in benchmark.combinations)
    if waiting:
        said[f"{counted(waiting, 'comparison')} not run yet: the same `tes benchmark` goes on from here."] = None
    return list(said)


def legend(found: Sequence[Row]) -> list[str]:
    """Return what the marks in the table mean."""
    starred = any(row.is_added for row in found)
    return ["(*) added, to tell where a gain comes from: the rest of it is the objective's.", ""] if starred else []


def headings(found: Sequence[Row]) -> list[str]:
    """Return the column headings of the paper-shaped table."""
    with_shots = len({row.shots for row in found if row.shots}) > 1
    average = f"average of {len({row.combination.task for row in found if row.figure is not None})}"
    return ["backbone", "text", *(["shots"] if with_shots else []), "arm", *tasks(found).values(), average,
            f"against {BASELINE} (95 %)"]  # fmt: skip


def cells(found: Sequence[Row]) -> list[list[str]]:
    """Return the paper-shaped table's cells, under `headings`."""
    with_shots = len({row.shots for row in found if row.shots}) > 1
    named, table = tasks(found), []
    for line in lines(found):
        figures = [_figure(line.by_task.get(task)) for task in named]
        average = "–" if line.average is None else f"{100 * line.average:.1f}"
        start = [line.backbone, line.text, *([line.shots] if with_shots else []), _arm(line)]
        table.append([*start, *figures, average, difference(line.difference)])
    return table


def _arm(shown: Row | Line) -> str:
    return shown.arm + (" *" if shown.is_added else "")


def _figure(row: Row | None) -> str:
    if row is None:
        return "–"
    return STATES[row.combination.state] if row.figure is None else f"{100 * row.figure['mean']:.1f}"


def difference(against: Paired | Mapping[str, Any] | None) -> str:
    """Write a difference to `ce` in points with its interval."""
    if against is None:
        return "–"
    parts = against if isinstance(against, Mapping) else vars(against)
    mean, low, high = (parts[name] for name in ("mean", "low", "high"))
    return f"{100 * mean:+.2f}" + ("" if low is None else f" ({100 * low:+.2f} to {100 * high:+.2f})")


DETAILS = ("task", "backbone", "text", "shots", "arm", "ours", f"against {BASELINE} (95 %)", "published", "apart")


def details(found: Sequence[Row]) -> list[list[str]]:
    """Return every figure beside its published one, under `DETAILS`; an empty column is for the user to fill."""
    named, table = tasks(found), []
    for row in found:
        one, published, apart = row.combination, "", ""
        if row.published is not None:
            published = f"{row.published:g}"
            apart = "" if row.figure is None else f"{100 * row.figure['mean'] - row.published:+.1f}"
        names = [named[one.task], one.backbone, one.text, row.shots, _arm(row)]
        table.append([*names, _figure(row), difference(row.against), published, apart])
    return table


def to_markdown(benchmark: Benchmark, found: Sequence[Row]) -> str:
    """Return benchmark.md."""
    parts = ["# Benchmark", "", caption(found), "", *_markdown(headings(found), cells(found)), "", *legend(found)]
    if gaps := missing(benchmark):
        parts += ["## What is missing", "", *(f"- {' '.join(line.split())}" for line in gaps), ""]
    parts += [
        "## Each figure",
        "",
        "`published` is for figures from papers: fill the column `published_percent` of benchmark.csv and give the file"
        " with `--published`.",
        "",
        *_markdown(DETAILS, details(found)),
    ]
    return "\n".join(parts) + "\n"


def _markdown(columns: Sequence[str], table: Iterable[Sequence[str]]) -> list[str]:
    # Names are a stranger's; the figures behind the arm are ours.
    num_names = columns.index("arm") + 1
    head = [f"| {' | '.join(map(plain, columns))} |", "|---" * len(columns) + "|"]
    return head + [f"| {' | '.join([*map(plain, row[:num_names]), *row[num_names:]])} |" for row in table]


def render(benchmark: Benchmark) -> str:
    """Return the paper-shaped table as text for people."""
    found = rows(benchmark)
    columns, table = headings(found), cells(found)
    widths = [max(len(row[place]) for row in [columns, *table]) for place in range(len(columns))]
    shown = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in [columns, *table]]
    return "\n".join([caption(found), "", *shown, "", *legend(found), *missing(benchmark)])
