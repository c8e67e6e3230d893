"""The page of a comparison. Shapes: n images of a cell, C classes."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tes.comparison import BASELINE, Comparison, summary_metric
from tes.data.source import Source
from tes.errors import RunError, counted
from tes.metrics import METRICS, CalibrationBins, calibration_bins
from tes.mistakes import NUM_PAIRS, NUM_PER_PAIR
from tes.page.charts import NUM_STYLES, Bar, Series, bar_chart, line_chart, reliability_chart
from tes.page.parts import (
    MISSING,
    Cell,
    Table,
    calibration_series,
    calibration_table,
    environment,
    figure,
    interval,
    percent,
    points,
    pretty_json,
    render,
    section,
)
from tes.page.thumbnails import Thumbnails
from tes.statistics import paired

NUM_BARS = 12
NUM_BARS_OF_MANY = 7


@dataclass
class _Tally:
    """What the seeds of one arm say at one number of shots, added up."""

    num_C: np.ndarray
    correct_C: np.ndarray
    confused: dict[tuple[int, int], Counter[str]] = field(default_factory=dict)
    confidence: list[np.ndarray] = field(default_factory=list)
    is_correct: list[np.ndarray] = field(default_factory=list)

    @property
    def accuracy_by_class(self) -> np.ndarray:
        """Over all seeds, (C,); NaN without images."""
        with np.errstate(invalid="ignore"):
            return self.correct_C / self.num_C

    def bins(self) -> CalibrationBins:
        """Return the reliability diagram over all seeds."""
        return calibration_bins(np.concatenate(self.confidence), np.concatenate(self.is_correct))


class Findings:
    """A comparison, and what its page says about it, worked out once each.

    Args:
        comparison: With all of its cells.
        photos: The photos themselves, where the user points to them.
    """

    def __init__(self, comparison: Comparison, photos: Source | None = None) -> None:
        self.comparison, self.plan, self.photos = comparison, comparison.plan, photos
        self.summary = comparison.summary
        self._tallies: dict[tuple[str, str], _Tally] = {}

    @property
    def arms(self) -> list[str]:
        """The baseline first, then the arms as they were typed, then the added ones."""
        everyone = [*self.plan.arms, *self.plan.added]
        return [BASELINE, *(arm for arm in everyone if arm != BASELINE)]

    @property
    def rivals(self) -> list[str]:
        """The arms that the user asked about: typed, and not the baseline."""
        return [arm for arm in self.plan.arms if arm != BASELINE]

    @cached_property
    def metric(self) -> str:
        """The data's metric."""
        return summary_metric(self.summary)

    @cached_property
    def title(self) -> str:
        """Its name at the beginning of a line."""
        return METRICS[self.metric].capitalize()

    @cached_property
    def names(self) -> list[str]:
        """The classes' readable names."""
        return [str(row["name"]) for row in self.comparison.classes]

    @cached_property
    def labels(self) -> list[str]:
        """The classes as the data calls them."""
        return [str(row["class"]) for row in self.comparison.classes]

    @cached_property
    def rows(self) -> list[dict[str, str]]:
        """The rows of table.csv that are about default heads."""
        try:
            text = (self.comparison.path / "table.csv").read_text(encoding="utf-8")
            return [row for row in csv.DictReader(text.splitlines()) if row["head"] == row["default_head"]]
        except FileNotFoundError:
            raise RunError("There is no table.csv in the folder.") from None
        except (OSError, ValueError, KeyError, csv.Error):
            raise RunError("table.csv is damaged.") from None

    @cached_property
    def thumbnails(self) -> Thumbnails:
        """Pictures of some images; without a list of the images, of none."""
        folder = self.comparison.path / "shared" / "thumbnails"
        try:
            run = self.comparison.run(self.plan.shots[0], self.plan.seeds[0], self.arms[0])
            return Thumbnails(folder, run.images, self.photos)
        except RunError:
            return Thumbnails(folder, [])

    def tally(self, shots: str, arm: str) -> _Tally:
        """Return what the seeds of an arm say, from their saved predictions."""
        if (shots, arm) not in self._tallies:
            self._tallies[shots, arm] = self._count(shots, arm)
        return self._tallies[shots, arm]

    def _count(self, shots: str, arm: str) -> _Tally:
        num_classes = len(self.names)
        tally = _Tally(np.zeros(num_classes), np.zeros(num_classes))
        for seed in self.plan.seeds_of(shots, arm):
            run = self.comparison.run(shots, seed, arm)
            said = run.predictions(self.plan.split)
            p_NC = said.probabilities(run.summary["default_head"])
            predicted_N = p_NC.argmax(axis=1)
            right_N = predicted_N == said.labels
            tally.num_C += np.bincount(said.labels, minlength=num_classes)
            tally.correct_C += np.bincount(said.labels, weights=right_N, minlength=num_classes)
            tally.confidence.append(p_NC.max(axis=1))
            tally.is_correct.append(right_N)
            for index in np.flatnonzero(~right_N):
                pair = (int(said.labels[index]), int(predicted_N[index]))
                tally.confused.setdefault(pair, Counter())[said.paths[index]] += 1
        return tally


def comparison_page(found: Findings) -> str:
    """Return the page of a comparison as HTML."""
    plan, summary = found.plan, found.summary
    sections = [
        section("curves", "Accuracy over shots", lambda: _curves(found)),
        section("figures", "All arms", lambda: _figures(found)),
        section("credit", "Where the gain comes from", lambda: _credit(found)),
        section("classes", "Classes that gain and lose", lambda: _classes(found)),
        section("confused", "Classes taken for one another", lambda: _confused(found)),
        section("calibration", "Calibration", lambda: _calibration(found)),
        section("reproduce", "How to reproduce this", lambda: _reproduce(found)),
    ]
    arms = ", ".join(plan.arms) if len(plan.arms) <= 3 else f"{len(plan.arms)} arms"
    how = {"val-selected": "chosen on val", "paper": "chosen on test, as the authors do"}
    facts = [
        ("data", summary["dataset"]),
        ("arms", ", ".join(plan.arms)),
        ("shots", ", ".join(plan.shots)),
        ("seeds", _seeds(plan.seeds)),
        ("scored on", plan.split),
        ("protocol", how.get(plan.protocol, plan.protocol)),
    ]
    return render(
        "comparison.html",
        {
            "title": f"{summary['dataset']} · {arms}",
            "kind": "Comparison",
            "facts": facts,
            "sentences": summary["sentences"],
            "tiles": _tiles(found),
            "sections": sections,
        },
    )


def _seeds(seeds: Sequence[int]) -> str:
    runs = list(seeds)
    consecutive = runs == list(range(runs[0], runs[-1] + 1)) and len(runs) > 2
    return f"{runs[0]} to {runs[-1]}" if consecutive else ", ".join(map(str, runs))


def _tiles(found: Findings) -> list[tuple[str, str, str]]:
    tiles = []
    for arm in found.rivals[:6]:
        effect = found.summary["arms"][arm].get("effect")
        if effect is not None:
            ends = interval(effect["low"], effect["high"])
            sure = f"95 %: {ends}" if ends != MISSING else "no interval over seeds"
            tiles.append((f"{arm} against {BASELINE}", points(effect["mean"]), f"points; {sure}"))
    return tiles


def _curves(found: Findings) -> dict[str, Any]:
    shots = found.plan.shots
    ticks = [(float(place), shot) for place, shot in enumerate(shots)]
    series, differences, rows = [], [], []
    for style, arm in enumerate(found.arms):
        entry = found.summary["arms"][arm]
        dots, ends = [], []
        for place, shot in enumerate(shots):
            values = _values(found, arm, shot)
            result = paired(values, len(values) > 1)
            dots.append((float(place), result.mean))
            ends.append(None if result.low is None or result.high is None else (result.low, result.high))
            against = (entry.get("by_shots") or {}).get(shot)
            rows.append(
                [
                    arm,
                    shot,
                    percent(result.mean),
                    f"{percent(result.low)} to {percent(result.high)}" if result.low is not None else MISSING,
                    points(against["mean"]) if against else MISSING,
                    interval(against["low"], against["high"]) if against else MISSING,
                ]
            )
        look = {"style": style % NUM_STYLES, "is_minor": arm not in found.plan.arms}
        series.append(Series(arm, dots, ends, **look))
        if entry.get("by_shots"):
            parts = [entry["by_shots"][shot] for shot in shots]
            differences.append(
                Series(
                    arm,
                    [(float(place), part["mean"]) for place, part in enumerate(parts)],
                    [None if part["low"] is None else (part["low"], part["high"]) for part in parts],
                    **look,
                )
            )
    told = "; ".join(f"{one.name}: {', '.join(percent(y) for _, y in one.points)}" for one in series)
    charts = [
        {
            "title": f"{found.title} on {found.plan.split}",
            "chart": line_chart(
                "accuracy-chart", f"{found.title} over shots", told, series, ticks, "images per class", _whole
            ),
        }
    ]
    if differences:
        told = "; ".join(f"{one.name}: {', '.join(points(y) for _, y in one.points)}" for one in differences)
        drawn = line_chart(
            "difference-chart", f"Difference to {BASELINE} in points", told, differences, ticks, "images per class",
            _points, zero=True,
        )  # fmt: skip
        charts.append({"title": f"Difference to {BASELINE}, points, paired by seed", "chart": drawn})
    columns = ["arm", "shots", METRICS[found.metric], "95 % over seeds", f"difference to {BASELINE}", "95 % paired"]
    return {"charts": charts, "table": Table("The same in numbers", columns, rows, frozenset({0}))}


def _whole(value: float) -> str:
    return f"{100 * value:.3g} %"


def _points(value: float) -> str:
    return points(value, 1).removesuffix(".0")


def _values(found: Findings, arm: str, shots: str) -> list[float]:
    values = [float(row[found.metric]) for row in found.rows if row["arm"] == arm and row["shots"] == shots]
    if not values:
        raise RunError(f"table.csv has no row of `{arm}` at {shots} shots.")
    return values


def _figures(found: Findings) -> dict[str, Any]:
    shots = found.plan.shots
    rows = []
    for arm in found.arms:
        entry = found.summary["arms"][arm]
        means = {name: np.mean([entry["figures"][shot][name]["mean"] for shot in shots]) for name in ("nll", "ece")}
        effect = entry.get("effect")
        row: list[Cell | str] = [arm + ("" if entry["typed"] else " *"), str(entry["start"])]
        row += [f"{100 * entry['figures'][shot][found.metric]['mean']:.1f}" for shot in shots]
        row.append(f"{points(effect['mean'])} ({interval(effect['low'], effect['high'])})" if effect else MISSING)
        # Of an added arm nobody asked whether it helps, so it has no part in the correction for several questions.
        row.append(str(effect["verdict"]) if effect and entry["typed"] else MISSING)
        row.append(interval(effect["bootstrap_low"], effect["bootstrap_high"]) if effect else MISSING)
        row += [figure(float(means["nll"])), figure(float(means["ece"]))]
        rows.append(row)
    at = [counted(int(shot), "shot") if shot.isdecimal() else shot for shot in shots]
    columns = ["arm", "start", *at, f"against {BASELINE} (95 %)", "verdict", "over images", "NLL", "ECE"]
    texts = frozenset({0, 1, columns.index("verdict")})
    added = any(not entry["typed"] for entry in found.summary["arms"].values())
    return {
        "table": Table(
            f"{found.title}, %; differences in points, over all shots, with 95 % intervals over seeds and over images",
            columns,
            rows,
            texts,
        ),
        "added": added,
        "notes": found.summary["notes"],
    }


def _credit(found: Findings) -> dict[str, Any] | str:
    shown, rows = [], []
    for arm in found.rivals:
        credit = found.summary["arms"][arm].get("credit")
        if credit:
            total = sum(credit.values())
            shown.append((arm, [(name, value) for name, value in credit.items()], total))
            rows.append([arm, *(points(credit.get(name)) for name in _sources(found)), points(total)])
    if not shown:
        return "No plain arm from the same start was run, so a gain cannot be split; without --no-controls it is."
    bars = [
        Bar(arm if len(parts) == 1 else f"{name.split()[-1]}, {arm}", value)
        for arm, parts, _ in shown
        for name, value in parts
    ]
    told = "; ".join(f"{bar.name} {points(bar.value, 2)}" for bar in bars)
    chart = bar_chart("credit-chart", "Parts of the difference to ce, in points", told, bars, lambda v: points(v, 2))
    return {
        "chart": chart,
        "table": Table("Credit, in points", ["arm", *_sources(found), "together"], rows),
        "has_prior": any("prior" in name for _, parts, _ in shown for name, _ in parts),
    }


def _sources(found: Findings) -> list[str]:
    credits = [found.summary["arms"][arm].get("credit") or {} for arm in found.rivals]
    return list(dict.fromkeys(name for credit in credits for name in credit))


def _classes(found: Findings) -> dict[str, Any] | str:
    if not found.rivals:
        return f"There is no arm beside `{BASELINE}`."
    known = found.comparison.known
    baseline_C = _accuracy(found, BASELINE)
    gains = {arm: _accuracy(found, arm) - baseline_C for arm in found.rivals}
    charts = []
    for number, (arm, gain_C) in enumerate(gains.items()):
        scored = [index for index in np.argsort(-gain_C, kind="stable") if np.isfinite(gain_C[index])]
        num = NUM_BARS if len(gains) <= 2 else NUM_BARS_OF_MANY
        chosen = scored if len(scored) <= 2 * num else [*scored[:num], *scored[-num:]]
        bars = [
            Bar(found.names[index], float(gain_C[index]), "●" if known is not None and known[index] else "")
            for index in chosen
        ]
        better, worse = int((gain_C > 0).sum()), int((gain_C < 0).sum())
        told = f"{better} classes gain, {worse} lose. " + "; ".join(f"{bar.name} {points(bar.value)}" for bar in bars)
        drawn = bar_chart(f"gain-chart-{number}", f"{arm} against {BASELINE}, points", told, bars, points)
        charts.append({"arm": arm, "chart": drawn, "better": better, "worse": worse, "num": len(scored),
                       "is_cut": len(chosen) < len(scored)})  # fmt: skip
    num_C = sum(found.tally(shot, BASELINE).num_C for shot in found.plan.shots)
    rows: list[list[Cell | str]] = []
    for index, name in enumerate(found.names):
        row: list[Cell | str] = [name]
        if known is not None:
            row.append("known" if known[index] else "other")
        row.append(_share(float(baseline_C[index])))
        row += [_gain(float(gain_C[index])) for gain_C in gains.values()]
        row.append(Cell(f"{num_C[index]:.0f}", float(num_C[index])))
        rows.append(row)
    columns = ["class", *(["name"] if known is not None else []), BASELINE, *gains, "answers"]
    texts = frozenset({0, 1}) if known is not None else frozenset({0})
    caption = f"Every class: accuracy of {BASELINE}, and the difference to it in points, over all shots and seeds"
    return {
        "charts": charts,
        "table": Table(caption, columns, rows, texts, sortable=True),
        "known": _known(found),
    }


def _accuracy(found: Findings, arm: str) -> np.ndarray:
    """Return accuracy per class, the mean over shots; NaN for a class that is not scored at all of them."""
    return np.mean([found.tally(shot, arm).accuracy_by_class for shot in found.plan.shots], axis=0)


def _share(value: float) -> Cell:
    return Cell(percent(value, 0), value, value) if np.isfinite(value) else Cell(MISSING, -1.0)


def _gain(value: float) -> Cell:
    return Cell(points(value), value) if np.isfinite(value) else Cell(MISSING, -9.0)


def _known(found: Findings) -> Table | None:
    if found.comparison.known is None:
        return None
    num_known = int(found.comparison.known.sum())
    parts = {
        "known_names": f"known names ({num_known})",
        "other_names": f"the others ({len(found.names) - num_known})",
    }
    rows = []
    for arm in found.arms:
        entry = found.summary["arms"][arm]
        if "prior" not in entry["start"]:
            continue
        for key, shown in parts.items():
            if entry.get(key):
                mean = entry[key]["mean"]
                by_shots = [entry[key].get(shot) for shot in found.plan.shots]
                rows.append(
                    [
                        arm,
                        shown,
                        *(points(part["mean"]) if part else MISSING for part in by_shots),
                        points(mean["mean"]) if mean else MISSING,
                        interval(mean["low"], mean["high"]) if mean else MISSING,
                    ]
                )
    if not rows:
        return None
    caption = "Difference to ce in points, apart for names that the source network knows"
    return Table(caption, ["arm", "classes", *found.plan.shots, "mean", "95 %"], rows, frozenset({0, 1}))


def _confused(found: Findings) -> dict[str, Any] | str:
    shots = found.plan.shots[-1]
    arms = [BASELINE, *found.rivals]
    tallies = {arm: found.tally(shots, arm) for arm in arms}
    totals: Counter[tuple[int, int]] = Counter()
    for tally in tallies.values():
        answers = max(tally.num_C.sum(), 1)  # an arm that is run once counts as much as one with ten seeds
        for pair, paths in tally.confused.items():
            totals[pair] += paths.total() / answers
    if not totals:
        return "No image is taken for another class."
    pairs = []
    for pair in sorted(totals, key=lambda pair: (-totals[pair], pair))[:NUM_PAIRS]:
        label, predicted = pair
        together: Counter[str] = sum((tally.confused.get(pair, Counter()) for tally in tallies.values()), Counter())
        paths = sorted(together, key=lambda path: (-together[path], path))
        pictures = [(path, found.thumbnails.get(path)) for path in paths if path in found.thumbnails]
        own = False
        if not pictures:  # an older comparison kept no picture of these: any of the class will do
            own = True
            pictures = [(path, found.thumbnails.get(path)) for path in found.thumbnails.some_of(found.labels[label], 2)]
        others = found.thumbnails.some_of(found.labels[predicted])
        pairs.append(
            {
                "label": found.names[label],
                "predicted": found.names[predicted],
                "shares": [
                    (arm, percent(tally.confused.get(pair, Counter()).total() / max(tally.num_C[label], 1), 0))
                    for arm, tally in tallies.items()
                ],
                "pictures": pictures[:NUM_PER_PAIR],
                "is_any": own,
                "examples": [(path, found.thumbnails.get(path)) for path in others],
            }
        )
    return {"pairs": pairs, "shots": shots}


def _calibration(found: Findings) -> dict[str, Any]:
    charts, named = [], []
    arms = [BASELINE, *found.rivals][:NUM_STYLES]
    for number, shots in enumerate(dict.fromkeys((found.plan.shots[0], found.plan.shots[-1]))):
        bins = {arm: found.tally(shots, arm).bins() for arm in arms}
        series = [calibration_series(arm, one, found.arms.index(arm) % NUM_STYLES) for arm, one in bins.items()]
        shares = (bins[BASELINE].num / bins[BASELINE].num.sum()).tolist()
        at = f"{counted(int(shots), 'image')} per class" if shots.isdecimal() else f"shots: {shots}"
        errors = "; ".join(one.name.replace("\n", ": ") for one in series)
        told = f"Accuracy over confidence. {errors}. On the dashed diagonal both are equal."
        drawn = reliability_chart(f"calibration-chart-{number}", f"Reliability, {at}", told, series, shares)
        charts.append({"title": at, "chart": drawn})
        named += [(f"{arm}, {shots}", one) for arm, one in bins.items()]
    return {"charts": charts, "table": calibration_table("Images by confidence, all seeds together", named)}


def _reproduce(found: Findings) -> dict[str, Any]:
    plan = found.plan
    run = found.comparison.run(plan.shots[0], plan.seeds[0], found.arms[0])
    made = environment(run.path)
    return made | {
        "folder": str(found.comparison.path),
        "plan": pretty_json(Path(found.comparison.path) / "compare.json"),
        "seeds": _seeds(plan.seeds),
        "config": (run.path / "config.yaml").read_text(encoding="utf-8"),
        "cell": run.path.relative_to(found.comparison.path).as_posix(),
    }
