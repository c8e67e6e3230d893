"""A comparison, read back from its cells: the table, and what it says about each arm in figures and sentences.

compare.json (the plan)  table.csv  trials.csv  summary.json  shared/  cells/<shots>-s<seed>/<arm>/ (run folders)

Reads run folders only; torch is not needed. Shapes: n images of a cell, C classes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from tes.errors import RunError, counted
from tes.files import csv_text, read_json, write_atomic, write_json
from tes.metrics import METRICS
from tes.run import Run
from tes.statistics import Answers, Effect, bootstrap_images, holm, paired, sentence

FORMAT = 1
BASELINE = "ce"
COLUMNS = (
    "dataset", "backbone", "text", "shots", "fraction", "protocol", "split", "arm", "objective", "preset", "start",
    "seed", "head", "default_head", "num_classes", "num_train", "num_val", "top1", "mean_per_class", "nll", "ece",
    "run",
)  # fmt: skip
MEANINGLESS = ("random-text", "permuted-text")
"""Presets that take the names' meaning from an objective."""
FIGURES = ("mean_per_class", "top1", "nll", "ece", "coarse_top1")


@dataclass(frozen=True)
class Plan:
    """What a comparison consists of.

    Attributes:
        arms: As the user typed them.
        added: Those that credit needs beside them.
        shots: "1", "2", "all", "15%", in order.
        seeds: First to last.
        single: Arms that are run once at full data, since nothing in them depends on the seed.
        starts: Arm to its start, resolved.
        protocol: `val-selected` or `paper`.
        split: `test` or `val`.
        num_trials: Per arm and cell.
        settings: What every cell has in common, as plain values, the content of files by hash: a comparison is
            continued with the same ones only.
        objectives: Arm to its objective's settings; likewise.
        skipped: Shots to why they are left out.
    """

    arms: tuple[str, ...]
    added: tuple[str, ...]
    shots: tuple[str, ...]
    seeds: tuple[int, ...]
    single: tuple[str, ...]
    starts: Mapping[str, str]
    protocol: str
    split: str
    num_trials: int
    settings: Mapping[str, Any]
    objectives: Mapping[str, Any]
    skipped: Mapping[str, str]

    def seeds_of(self, shots: str, arm: str) -> tuple[int, ...]:
        """Return the seeds that an arm is run from: the first one, where it stands for all."""
        return self.seeds[:1] if shots == "all" and arm in self.single else self.seeds

    def cells(self) -> list[tuple[str, int, str]]:
        """Return (shots, seed, arm) of every cell; arms that can share what they solve come one after another."""
        return [
            (shots, seed, arm)
            for shots in self.shots
            for seed in self.seeds
            for arm in (*self.arms, *self.added)
            if seed in self.seeds_of(shots, arm)
        ]


def cell_folder(root: Path, shots: str, seed: int, arm: str) -> Path:
    """Return where a cell lies."""
    return root / "cells" / f"{shots.replace('%', 'pct')}-s{seed}" / re.sub(r"[^\w@+.-]+", "_", arm)


class Comparison:
    """A comparison's folder, with all of its cells finished."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path, self.plan = path, plan
        self._runs: dict[tuple[str, int, str], Run] = {}
        self._answers: dict[tuple[str, int, str], Answers] = {}

    @staticmethod
    def open(path: str | Path) -> Comparison:
        """Open a comparison's folder.

        Raises:
            RunError: There is none, it is not finished, or it is damaged.
        """
        folder = Path(path)
        if not (folder / "compare.json").is_file():
            raise RunError(f"`{folder}` is not a comparison: there is no compare.json in it.")
        comparison = Comparison(folder, read_plan(folder))
        if not (folder / "summary.json").is_file():
            raise RunError(f"The comparison `{folder}` is not finished; run the same `tes compare` again to continue.")
        return comparison

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What summary.json says; see `summarise`."""
        value = read_json(self.path / "summary.json", RunError)
        if not isinstance(value, dict) or not isinstance(value.get("arms"), dict):
            raise RunError(f"`{self.path / 'summary.json'}` is not the summary of a comparison.")
        return value

    def run(self, shots: str, seed: int, arm: str) -> Run:
        """Return a cell; of an arm that is run once, that one run for every seed."""
        key = self._cell(shots, seed, arm)
        if key not in self._runs:
            self._runs[key] = Run.open(cell_folder(self.path, *key))
        return self._runs[key]

    def _cell(self, shots: str, seed: int, arm: str) -> tuple[str, int, str]:
        seeds = self.plan.seeds_of(shots, arm)
        return shots, seeds[0] if seed in self.plan.seeds and seed not in seeds else seed, arm

    @cached_property
    def classes(self) -> list[dict[str, Any]]:
        """The classes, with their nearest source names where some arm used a text prior."""
        first = (self.plan.shots[0], self.plan.seeds[0])
        by_arm = [self.run(*first, arm).classes for arm in (*self.plan.arms, *self.plan.added)]
        return next((rows for rows in by_arm if "source" in rows[0]), by_arm[0])

    @cached_property
    def metric(self) -> str:
        """The data's metric, in which all differences are: `mean_per_class` or `top1`."""
        return self.run(self.plan.shots[0], self.plan.seeds[0], (*self.plan.arms, *self.plan.added)[0]).primary_metric

    @cached_property
    def known(self) -> np.ndarray | None:
        """(C,) bool: which class names the source head knows; None where no arm used a text prior."""
        if "source" not in self.classes[0]:
            return None
        return np.array([bool(row["source"].get("known")) for row in self.classes])

    def answers(self, shots: str, seed: int, arm: str) -> Answers:
        """Return which images the arm's default head got right."""
        key = self._cell(shots, seed, arm)
        if key not in self._answers:
            run = self.run(*key)
            self._answers[key] = Answers.of(run.predictions(self.plan.split), run.summary["default_head"])
        return self._answers[key]


def table_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the rows of table.csv: one per cell and head."""
    plan, rows = comparison.plan, []
    for shots, seed, arm in plan.cells():
        run = comparison.run(shots, seed, arm)
        summary, settings = run.summary, run.settings
        for head, figures in run.metrics[plan.split].items():
            common = {
                "dataset": summary["data"],
                "backbone": summary["backbone"]["name"],
                "text": settings["text"]["encoder"],
                "shots": shots,
                "fraction": settings["data"].get("fraction"),
                "protocol": summary.get("protocol"),
                "split": plan.split,
                "arm": arm,
                "objective": settings["objective"]["name"],
                "preset": settings["objective"].get("preset"),
                "start": summary["start"],
                "seed": seed,
                "head": head,
                "default_head": summary["default_head"],
                "num_classes": summary["num_classes"],
                "num_train": summary["num_train"],
                "num_val": summary["num_val"],
                "run": run.path.relative_to(comparison.path).as_posix(),
            }
            rows.append(common | {name: figures[name] for name in FIGURES if name in figures})
    return rows


def summarise(comparison: Comparison) -> dict[str, Any]:
    """Return summary.json: for every arm its figures, its effect against `ce`, the credit, and sentences."""
    plan = comparison.plan
    everyone = (*plan.arms, *plan.added)
    effects = _effects(comparison, everyone, BASELINE)
    arms: dict[str, Any] = {}
    for arm in everyone:
        entry: dict[str, Any] = {
            "start": plan.starts[arm],
            "typed": arm in plan.arms,
            "figures": {shots: _figures(comparison, shots, arm) for shots in plan.shots},
        }
        if arm in effects:
            # No verdict on arms that were not asked for: they tell where a gain comes from, and nothing corrects them.
            entry["effect"] = effects[arm].to_dict() | ({} if entry["typed"] else {"verdict": None})
            entry["by_shots"] = {shots: _paired_only(comparison, (shots,), arm) for shots in plan.shots}
            for name, chosen in _parts(comparison):
                entry[name] = {shots: _paired_only(comparison, (shots,), arm, chosen) for shots in plan.shots} | {
                    "mean": _paired_only(comparison, plan.shots, arm, chosen)
                }
            if credit := _credit(comparison, arm, everyone):
                entry["credit"] = credit
            controls = _controls(comparison, arm, everyone)
            entry["controls"] = {name: control.to_dict() | {"verdict": None} for name, control in controls.items()}
            if entry["typed"]:
                entry["sentence"] = _sentence(comparison, arm, effects[arm], entry.get("credit"), controls)
        arms[arm] = entry
    return {
        "format": FORMAT,
        "dataset": comparison.run(plan.shots[0], plan.seeds[0], everyone[0]).summary["data"],
        "metric": comparison.metric,
        "split": plan.split,
        "protocol": plan.protocol,
        "num_trials": plan.num_trials,
        "shots": list(plan.shots),
        "seeds": list(plan.seeds),
        "num_known_names": None if comparison.known is None else int(comparison.known.sum()),
        "arms": arms,
        "notes": _notes(comparison),
        "sentences": [entry["sentence"] for entry in arms.values() if "sentence" in entry],
    }


def write_results(comparison: Comparison) -> None:
    """Write table.csv, trials.csv and, last, summary.json."""
    _write_csv(comparison.path / "table.csv", COLUMNS, table_rows(comparison))
    if comparison.plan.num_trials > 1:
        columns = ("arm", "shots", "seed", "trial", "selected", "nll", "mean_per_class", "top1", "settings")
        _write_csv(comparison.path / "trials.csv", columns, _trial_rows(comparison))
    write_json(comparison.path / "summary.json", summarise(comparison))


def render(summary: Mapping[str, Any]) -> str:
    """Return the comparison as text for people: the data's metric over shots, differences, sentences."""
    shots = summary["shots"]
    width = max(len(arm) for arm in summary["arms"]) + 2
    metric = summary_metric(summary)
    label = "test-selected, protocol `paper`" if summary["protocol"] == "paper" else "val-selected"
    lines = [
        f"{summary['dataset']}: {METRICS[metric]} on {summary['split']} ({label}), %, mean (lowest to highest) over"
        f" {len(summary['seeds'])} seeds from {summary['seeds'][0]}; differences to `{BASELINE}` in points",
        "",
        f"{'shots':{width}}"
        + "".join(f"{shot:>24}" for shot in shots)
        + f"{'difference (95 %)':>26}{'NLL':>8}{'ECE':>8}",
    ]
    for arm, entry in summary["arms"].items():
        cells = []
        for shot in shots:
            figures = entry["figures"][shot][metric]
            spread = f" ({100 * figures['low']:.1f} to {100 * figures['high']:.1f})" if figures["num"] > 1 else ""
            cells.append(f"{100 * figures['mean']:.1f}{spread}")
        effect = entry.get("effect")
        shown = ""
        if effect is not None:
            shown = f"{100 * effect['mean']:+.2f}"
            if effect["low"] is not None:
                shown += f" ({100 * effect['low']:+.2f} to {100 * effect['high']:+.2f})"
        nll, ece = (np.mean([entry["figures"][shot][name]["mean"] for shot in shots]) for name in ("nll", "ece"))
        mark = "" if entry["typed"] else " *"
        lines.append(
            f"{arm + mark:{width}}" + "".join(f"{cell:>24}" for cell in cells) + f"{shown:>26}{nll:8.3f}{ece:8.3f}"
        )
    lines += _by_names(summary)
    if not all(entry["typed"] for entry in summary["arms"].values()):
        lines.append("* added, to tell where the gain comes from")
    return "\n".join([*lines, "", *summary["sentences"], *summary["notes"]])


def render_plan(plan: Plan) -> str:
    """Return what a comparison would run, as text for people."""
    shots = ", ".join(plan.shots)
    lines = [
        f"{counted(len(plan.cells()), 'cell')} of {counted(plan.num_trials, 'trial')}: shots {shots};"
        f" {counted(len(plan.seeds), 'seed')} from {plan.seeds[0]}; protocol {plan.protocol}, scored on {plan.split}"
    ]
    for arm in (*plan.arms, *plan.added):
        once = ", once at full data" if arm in plan.single else ""
        lines.append(f"  {arm}: starts from {plan.starts[arm]}{once}{' (added)' if arm in plan.added else ''}")
    return "\n".join([*lines, *(f"left out: {shot} shots: {why}" for shot, why in plan.skipped.items())])


def summary_metric(summary: Mapping[str, Any]) -> str:
    """Return the metric of a summary.json; those of the first days name none."""
    return summary.get("metric", "mean_per_class")


def _by_names(summary: Mapping[str, Any]) -> list[str]:
    """Return, for arms with a text prior, the difference to `ce` for names that the backbone knows and the others."""
    lines = []
    for arm, entry in summary["arms"].items():
        parts = [
            f"{shown} {100 * entry[name]['mean']['mean']:+.2f}"
            for name, shown in (("known_names", "known names"), ("other_names", "the others"))
            if entry.get(name) and entry[name]["mean"]
        ]
        if parts and "prior" in entry["start"]:
            lines.append(f"  {arm}: {', '.join(parts)}")
    if lines:
        known = summary["num_known_names"]
        lines.insert(0, f"apart, for the {known} classes whose names the source head knows and the others:")
    return lines


def read_plan(folder: Path) -> Plan:
    """Return the plan of a comparison's folder.

    Raises:
        RunError: It is damaged, or of another format.
    """
    stored = read_json(folder / "compare.json", RunError)
    try:
        if stored["format"] != FORMAT:
            raise RunError(f"`{folder}` has format {stored['format']!r}; this version reads format {FORMAT}.")
        # Plans of the first days have no objectives.
        plan = TypeAdapter(Plan).validate_python(
            {"objectives": {}} | {k: v for k, v in stored.items() if k != "format"}
        )
    except (KeyError, TypeError, AttributeError, ValidationError):
        raise RunError(f"`{folder / 'compare.json'}` is not the plan of a comparison.") from None
    if not (plan.arms and plan.shots and plan.seeds and plan.starts.keys() >= {*plan.arms, *plan.added}):
        raise RunError(f"`{folder / 'compare.json'}` is damaged: it plans no cells, or an arm without a start.")
    return plan


def write_plan(folder: Path, plan: Plan) -> None:
    """Write the plan, so that the comparison can be continued."""
    write_json(
        folder / "compare.json", {"format": FORMAT, **{name: getattr(plan, name) for name in Plan.__annotations__}}
    )


def _effects(comparison: Comparison, arms: Sequence[str], baseline: str) -> dict[str, Effect]:
    """Return every arm's effect against the baseline; Holm's correction is over the arms that the user typed."""
    others = [arm for arm in arms if arm != baseline]
    effects = {arm: _effect(comparison, arm, baseline) for arm in others}
    typed = [arm for arm in others if arm in comparison.plan.arms]
    for arm, p_holm in zip(typed, holm([effects[arm].p for arm in typed])):
        effects[arm] = replace(effects[arm], p_holm=p_holm)
    return effects


def _effect(comparison: Comparison, arm: str, baseline: str) -> Effect:
    """Return an arm's effect against another one, over seeds and over images; no p is adjusted."""
    plan = comparison.plan
    pairs = [
        (comparison.answers(shots, seed, arm), comparison.answers(shots, seed, baseline))
        for shots in plan.shots
        for seed in plan.seeds
    ]
    over_seeds = paired(*_differences(comparison, plan.shots, arm, baseline))
    return Effect.of(over_seeds, None, bootstrap_images(pairs, comparison.metric))


def _differences(
    comparison: Comparison, shots: Sequence[str], arm: str, baseline: str, chosen: np.ndarray | None = None
) -> tuple[list[float], bool]:
    """Return arm - baseline per seed, the mean over shots, and whether either side has a seed."""
    plan = comparison.plan
    is_single = {arm, baseline} <= set(plan.single) and all(_takes_all(comparison, shot) for shot in shots)
    seeds = plan.seeds[:1] if is_single else plan.seeds
    values = [
        np.mean([_score(comparison, shot, seed, arm, chosen) for shot in shots])
        - np.mean([_score(comparison, shot, seed, baseline, chosen) for shot in shots])
        for seed in seeds
    ]
    return [float(value) for value in values], not is_single


def _score(comparison: Comparison, shots: str, seed: int, arm: str, chosen: np.ndarray | None = None) -> float:
    answers = comparison.answers(shots, seed, arm)
    num_classes = len(comparison.classes)
    num_C = np.bincount(answers.labels, minlength=num_classes)
    correct_C = np.bincount(answers.labels, weights=answers.is_correct, minlength=num_classes)
    counted = num_C > 0 if chosen is None else (num_C > 0) & chosen
    if not counted.any():
        return float("nan")
    if comparison.metric == "top1":
        return float(correct_C[counted].sum() / num_C[counted].sum())
    return float((correct_C[counted] / num_C[counted]).mean())


def _paired_only(
    comparison: Comparison, shots: Sequence[str], arm: str, chosen: np.ndarray | None = None
) -> dict[str, Any] | None:
    """Return the difference to `ce` with its t interval, for a part of the shots or of the classes."""
    differences, has_seeds = _differences(comparison, shots, arm, BASELINE, chosen)
    if not np.isfinite(differences).all():  # none of these classes was scored
        return None
    result = paired(differences, has_seeds)
    names = ("mean", "low", "high", "num_seeds", "wins", "ties", "losses")
    return {name: getattr(result, name) for name in names} | {"by_seed": differences}


def _parts(comparison: Comparison) -> list[tuple[str, np.ndarray]]:
    known = comparison.known
    if known is None:
        return []
    return [(name, part) for name, part in (("known_names", known), ("other_names", ~known)) if part.any()]


def _credit(comparison: Comparison, arm: str, arms: Sequence[str]) -> dict[str, float] | None:
    """Return how much of an arm's effect its start has without the objective, and how much the objective adds."""
    start = comparison.plan.starts[arm]
    plain = next(
        (other for other in arms if _objective(other) == BASELINE and comparison.plan.starts[other] == start), None
    )
    if plain is None or _objective(arm) == BASELINE:
        return None
    shots = comparison.plan.shots
    objective = float(np.mean(_differences(comparison, shots, arm, plain)[0]))
    if plain == BASELINE:
        return {"the objective": objective}
    from_start = float(np.mean(_differences(comparison, shots, plain, BASELINE)[0]))
    name = "the text prior" if "prior" in start else f"the start `{start}`"
    return {name: from_start, "the objective": objective}


def _controls(comparison: Comparison, arm: str, arms: Sequence[str]) -> dict[str, Effect]:
    """Return, of an arm that reads the names, its effect over the same without their meaning, by what that is called.

    The objective's text is taken away by the presets below, the prior's by permuting its names.
    """
    starts = comparison.plan.starts
    name, preset = _objective(arm).partition("@")[::2]
    pairs = {
        f"`{other}`": (arm, other)
        for other in arms
        if not preset and starts[other] == starts[arm] and _objective(other) in {f"{name}@{p}" for p in MEANINGLESS}
    }
    with_prior, permuted = f"{BASELINE}+probe+prior", f"{BASELINE}+probe+permuted"
    if starts[arm] == "probe+prior" and {with_prior, permuted} <= {*arms}:
        pairs[f"the start `{permuted}`"] = (with_prior, permuted)
    return {called: _effect(comparison, *pair) for called, pair in pairs.items()}


def _objective(arm: str) -> str:
    return arm.partition("+")[0]


def _sentence(
    comparison: Comparison, arm: str, effect: Effect, credit: Mapping[str, float] | None, controls: Mapping[str, Effect]
) -> str:
    subject = "text supervision" if arm == "tes" else f"`{arm}`"
    return sentence(subject, effect, credit if credit and len(credit) > 1 else None, controls, _scope(comparison)) + "."


def _scope(comparison: Comparison) -> str:
    """Return what an interval over seeds is about, where seeds share most of their images."""
    plan = comparison.plan
    if all(_takes_all(comparison, shots) for shots in plan.shots):
        return "every seed trains on the same images: the interval is about this training set"
    for shots in plan.shots:
        summary = comparison.run(shots, plan.seeds[0], plan.arms[0]).summary
        if shots != "all" and summary["num_train"] + summary["num_val"] > 0.5 * summary.get("num_pool", float("inf")):
            return "seeds draw most of a small pool: the interval is about this pool"
    return ""


def _takes_all(comparison: Comparison, shots: str) -> bool:
    """Whether every seed draws the same images: all of them."""
    if shots == "all":
        return True
    summary = comparison.run(shots, comparison.plan.seeds[0], comparison.plan.arms[0]).summary
    return summary["num_train"] == summary.get("num_pool")


def _figures(comparison: Comparison, shots: str, arm: str) -> dict[str, Any]:
    """Return mean, lowest and highest over seeds of the default head's metrics."""
    plan = comparison.plan
    runs = [comparison.run(shots, seed, arm) for seed in plan.seeds_of(shots, arm)]
    heads = [run.metrics[plan.split][run.summary["default_head"]] for run in runs]
    result = {}
    for name in FIGURES:
        values = [head[name] for head in heads if name in head]
        if values:
            result[name] = {
                "mean": float(np.mean(values)), "low": min(values), "high": max(values), "num": len(values)
            }  # fmt: skip
    return result


def _notes(comparison: Comparison) -> list[str]:
    plan = comparison.plan
    notes = []
    for shots in plan.shots:
        run = comparison.run(shots, plan.seeds[0], plan.arms[0])
        named = counted(int(shots), "shot") if shots.isdecimal() else f"`{shots}`"
        labels = run.summary["num_train"] + run.summary["num_val"]
        uses = f"{run.summary['num_train']} to train on, {run.summary['num_val']} to choose with"
        notes.append(f"Labels used at {named}: {labels} ({uses}), the same for every arm.")
        scored = len(np.unique(comparison.answers(shots, plan.seeds[0], plan.arms[0]).labels))
        if scored < len(comparison.classes):
            notes.append(f"At {named} only {scored} of {len(comparison.classes)} classes have an image to score.")
    notes += [f"Left out: {shots} shots: {why}" for shots, why in plan.skipped.items()]
    if plan.split == "val":
        notes.append("Scored on images outside the test split, which was not opened.")
        if plan.num_trials > 1 and any(not shots.isdecimal() for shots in plan.shots):
            notes.append("Trials were chosen on the very val images that are scored where all, or a share, is used.")
    if plan.protocol == "paper":
        notes.append("Test-selected: epochs and trials were chosen on the test split, as the authors' code does.")
    return notes


def _trial_rows(comparison: Comparison) -> Iterable[dict[str, Any]]:
    for shots, seed, arm in comparison.plan.cells():
        summary = comparison.run(shots, seed, arm).summary
        for number, trial in enumerate(summary.get("trials", ())):
            yield {
                "arm": arm,
                "shots": shots,
                "seed": seed,
                "trial": number,
                "selected": number == summary["selected_trial"],
                "nll": trial.get("nll"),
                "mean_per_class": trial.get("mean_per_class"),
                "top1": trial.get("top1"),
                "settings": json.dumps(trial["settings"]),
            }


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    write_atomic(path, csv_text(columns, ([row.get(name) for name in columns] for row in rows)))
