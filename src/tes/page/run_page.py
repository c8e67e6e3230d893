"""The page of one run. Shapes: n images, C classes, D dimensions of the text embedding."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tes.card import trained_part
from tes.data.source import Source
from tes.doubts import Doubt, doubts
from tes.errors import RunError, counted
from tes.metrics import LOSSES, METRICS, calibration_bins, ordered, per_class_table
from tes.mistakes import NUM_PER_PAIR, confusions, mistakes
from tes.page.charts import NUM_STYLES, Series, heat_map, line_chart, nice_ticks, reliability_chart
from tes.page.parts import (
    MISSING,
    Cell,
    Table,
    calibration_series,
    calibration_table,
    environment,
    figure,
    percent,
    points,
    render,
    section,
)
from tes.page.thumbnails import Thumbnails
from tes.predictions import Predictions
from tes.run import Run
from tes.statistics import judged

HEADS = {"vision": "vision head", "text": "text head", "both": "both, averaged"}
NUM_DOUBTS = 24
NUM_DOUBTS_WITH_PHOTOS = 96
NUM_SURE = 12
NUM_REFERENCES = 12
MAX_HEAT_ROWS = 120


class Findings:
    """A run, and what its page says about it, worked out once each.

    Args:
        run: The run.
        photos: The photos themselves, where the user points to them.
    """

    def __init__(self, run: Run, photos: Source | None = None) -> None:
        self.run, self.photos = run, photos

    @cached_property
    def names(self) -> list[str]:
        """The classes' readable names."""
        return [str(row["name"]) for row in self.run.classes]

    @cached_property
    def labels(self) -> list[str]:
        """The classes as the data calls them."""
        return [str(row["class"]) for row in self.run.classes]

    @cached_property
    def head(self) -> str:
        """The head that is shipped."""
        return str(self.run.summary.get("default_head", "vision"))

    @cached_property
    def thumbnails(self) -> Thumbnails:
        """Pictures of some images; without splits.csv, of none."""
        in_cell = isinstance(self.run.summary.get("shared"), dict)
        folder = self.run.path.resolve().parents[2] / "shared" if in_cell else self.run.path
        try:
            return Thumbnails(folder / "thumbnails", self.run.images, self.photos)
        except RunError:
            return Thumbnails(folder / "thumbnails", [], self.photos)

    @cached_property
    def split(self) -> str:
        """The split that the page looks at most: test, where it was scored."""
        return next((name for name in ("test", "val") if name in self.run.metrics), "test")

    @cached_property
    def scored(self) -> Predictions:
        """What the run says about that split."""
        return self.run.predictions(self.split)

    @cached_property
    def doubts(self) -> list[Doubt]:
        """Training images, the most doubted label first.

        Raises:
            RunError: No image was judged by a model that had not seen it, or what it said is damaged.
        """
        if not (self.run.path / "predictions" / "train.npz").exists():
            raise RunError(
                "No label could be doubted: that takes a head solved without the image, so two images of a class and a"
                " start that is not random, in a run of its own."
            )
        return doubts(self.run.predictions("train"))


class _Classes:
    """The classes as `per_class_table` wants them."""

    def __init__(self, label: str, name: str) -> None:
        self.label, self.name = label, name


def run_page(found: Findings, sentences: list[str], doubts_file: str) -> str:
    """Return the page of a run as HTML.

    Args:
        found: The run.
        sentences: What to say first.
        doubts_file: How the table of doubts beside the page is called.
    """
    summary = found.run.summary
    sections = [
        section("figures", "Figures", lambda: _figures(found)),
        section("classes", "Classes", lambda: _classes(found)),
        section("confused", "Classes taken for one another", lambda: _confused(found)),
        section("sure", "Sure and wrong", lambda: _sure(found)),
        section("calibration", "Calibration", lambda: _calibration(found)),
        section("text", "What the text says", lambda: _text(found)),
        section("doubts", "Labels that the model doubts", lambda: _doubts(found, doubts_file)),
        section("training", "Training", lambda: _training(found)),
        section("reproduce", "How to reproduce this", lambda: _reproduce(found)),
    ]
    return render(
        "run.html",
        {
            "title": f"{summary.get('data', 'run')} · {summary.get('arm', '')}",
            "kind": "Run",
            "facts": _facts(found),
            "sentences": sentences,
            "tiles": _tiles(found),
            "sections": sections,
        },
    )


def headline(found: Findings) -> list[str]:
    """Return the sentences that say what came out."""
    summary = found.run.summary
    scores = found.run.metrics.get(found.split, {}).get(found.head)
    if not isinstance(scores, dict):
        return ["This run records no figures."]
    num_classes, metric = len(found.run.classes), found.run.primary_metric
    first = (
        f"The model reaches {percent(scores[metric])} {METRICS[metric]} on {found.split} ({num_classes} classes,"
        f" {summary.get(f'num_{found.split}', '?')} images), after training on {summary.get('num_train', '?')} images."
    )
    said = [first, *_against(summary.get("against"), str(summary.get("arm")))]
    if summary.get("shipped") == "start":
        said.append("On val the steps did not beat the head that they started from, so that head is shipped.")
    if summary.get("protocol") == "paper":
        said.append("Test-selected: trained on train and val, and chosen on test, as the authors' code does.")
    return said


def _against(against: Any, arm: str) -> list[str]:
    if not isinstance(against, dict):
        return []
    difference, ends = against["difference"], against.get("interval")
    low, high = ends or (-1, 1)
    metric = METRICS[against.get("metric", "mean_per_class")]
    sure = f" (95 % {points(ends[0])} to {points(ends[1])})" if ends else ""
    return [
        f"Against plain fine-tuning on {counted(against['num_samples'], 'validation image')}, `{arm}` is"
        f" {points(difference)} points {metric}{sure}: {judged(low, high)}. One draw; a comparison tells how sure."
    ]


def _facts(found: Findings) -> list[tuple[str, str]]:
    summary, settings = found.run.summary, _settings(found)
    data = settings.get("data") or {}
    drawn = f"{data['shots']} per class" if data.get("shots") is not None else None
    if data.get("fraction") is not None:
        drawn = percent(data["fraction"], 0)
    text = summary.get("text")
    rows = [
        ("data", summary.get("data")),
        ("arm", summary.get("arm")),
        ("start", summary.get("start")),
        ("trained", trained_part(summary["train"]) if summary.get("train") else None),
        ("backbone", (summary.get("backbone") or {}).get("name")),
        ("text", text.get("encoder") if isinstance(text, dict) else "none"),
        ("training images", f"{drawn} ({summary.get('num_train')})" if drawn else summary.get("num_train")),
        ("seed", settings.get("seed")),
    ]
    return [(name, str(value)) for name, value in rows if value is not None]


def _settings(found: Findings) -> dict[str, Any]:
    try:
        return found.run.settings
    except RunError:
        return {}


def _tiles(found: Findings) -> list[tuple[str, str, str]]:
    scores = found.run.metrics.get(found.split, {}).get(found.head)
    if not isinstance(scores, dict):
        return []
    tiles = [
        *(
            (METRICS[name], percent(scores.get(name)), f"{found.split}, {HEADS[found.head]}")
            for name in ordered(found.run.primary_metric)
            if name in ("mean_per_class", "top1")
        ),
        ("calibration error", figure(scores.get("ece")), "ECE; 0 is perfect"),
    ]
    against = found.run.summary.get("against")
    if isinstance(against, dict):
        tiles.append(("against plain fine-tuning", points(against["difference"]), "points on val, one draw"))
    return tiles


def _figures(found: Findings) -> dict[str, Any]:
    metrics = found.run.metrics
    if not metrics:
        return "run.json records no figures."
    scored = [figures for heads in metrics.values() for figures in heads.values()]
    shown = [name for name in ordered(found.run.primary_metric) if any(row.get(name) is not None for row in scored)]
    rows = []
    for split, heads in metrics.items():
        for head, figures in heads.items():
            row: list[Cell | str] = [split, HEADS.get(head, head) + (" (shipped)" if head == found.head else "")]
            row += [(figure if name in LOSSES else percent)(figures.get(name)) for name in shown]
            rows.append(row)
    columns = ["split", "head", *(METRICS[name] for name in shown)]
    refit = found.run.summary.get("refit", "none")
    return {"table": Table("Figures of all heads", columns, rows, frozenset({0, 1})), "refit": refit}


def _classes(found: Findings) -> dict[str, Any]:
    rows = per_class_table(found.scored, [_Classes(*pair) for pair in zip(found.labels, found.names)], found.head)
    by_label = dict(zip(found.labels, found.names))
    known = [row.get("source") for row in found.run.classes]
    has_prior = all(isinstance(source, dict) for source in known)
    cells = []
    for row, source in zip(rows, known):
        taken_for = by_label.get(row["most_confused_with"] or "", MISSING)
        count = row["num_confused"]
        cell: list[Cell | str] = [row["name"]]
        cell += [_share(row["accuracy"]), _share(row["precision"]), _share(row["f1"])]
        cell += [Cell(str(row["num_samples"]), row["num_samples"])]
        cell += [Cell(f"{taken_for} ({count})" if count else MISSING, count)]
        if has_prior:
            near = f"{source['name']} ({source['cosine']:.2f})"
            cell.append(Cell(near + (", known" if source.get("known") else ""), source["cosine"]))
        cells.append(cell)
    columns = ["class", "accuracy", "precision", "F1", "images", "most often taken for"]
    texts = frozenset({0, 5, 6})
    if has_prior:
        columns.append("nearest source class (cosine)")
    scored = [row for row in rows if row["accuracy"] is not None]
    worst = sorted(scored, key=lambda row: row["accuracy"])[:3]
    caption = f"Every class on {found.split}, {HEADS[found.head]}"
    return {
        "table": Table(caption, columns, cells, texts, sortable=True),
        "worst": [(row["name"], percent(row["accuracy"], 0)) for row in worst],
        "num_perfect": sum(row["accuracy"] == 1 for row in scored),
        "num_scored": len(scored),
    }


def _share(value: float | None) -> Cell:
    return Cell(percent(value, 0), -1.0 if value is None else value, value)


def _confused(found: Findings) -> dict[str, Any] | str:
    pairs = confusions(found.scored, found.head)
    if not pairs:
        return f"No image of {found.split} is taken for another class."
    shown = [
        {
            "label": found.names[pair.label],
            "predicted": found.names[pair.predicted],
            "num": len(pair.paths),
            "num_samples": pair.num_samples,
            "pictures": _pictures(found, pair.paths, NUM_PER_PAIR),
            "examples": _pictures(found, found.thumbnails.some_of(found.labels[pair.predicted]), 1),
        }
        for pair in pairs
    ]
    return {"pairs": shown, "split": found.split}


def _sure(found: Findings) -> dict[str, Any] | str:
    wrong = mistakes(found.scored, found.head)
    if not wrong:
        return f"No image of {found.split} is taken for another class."
    shown = [mistake for mistake in wrong if mistake.path in found.thumbnails][:NUM_SURE]
    if not shown:
        return "The run has kept no pictures of its surest mistakes; `--data` with the folder of photos shows them."
    figures = [
        {
            "picture": found.thumbnails.get(mistake.path),
            "path": mistake.path,
            "label": found.names[mistake.label],
            "predicted": found.names[mistake.predicted],
            "prob": percent(mistake.prob, 0),
        }
        for mistake in shown
    ]
    return {"figures": figures, "num_wrong": len(wrong), "num_samples": len(found.scored), "split": found.split}


def _pictures(found: Findings, paths: list[str], limit: int) -> list[tuple[str, str]]:
    return [(path, found.thumbnails.get(path)) for path in paths if path in found.thumbnails][:limit]


def _calibration(found: Findings) -> dict[str, Any]:
    named = []
    for head in found.scored.heads():
        p_NC = found.scored.probabilities(head)
        named.append((HEADS[head], calibration_bins(p_NC.max(axis=1), p_NC.argmax(axis=1) == found.scored.labels)))
    series = [calibration_series(name, bins, style) for style, (name, bins) in enumerate(named, start=1)]
    shares = (named[0][1].num / max(named[0][1].num.sum(), 1)).tolist()
    errors = "; ".join(one.name.replace("\n", ": ") for one in series)
    description = f"Accuracy over confidence on {found.split}. {errors}. On the dashed diagonal both are equal."
    chart = reliability_chart("calibration-chart", "Reliability diagram", description, series, shares)
    return {"chart": chart, "table": calibration_table("Images by confidence", named), "split": found.split}


def _text(found: Findings) -> dict[str, Any] | str:
    settings = found.run.settings.get("objective", {})
    path = found.run.file("text_head.safetensors")
    if not path.is_file():
        return "This run has no text head; objectives with text, such as `tes`, train one."
    z_CD = _text_rows(path, len(found.names))
    return _similarity(found, z_CD) | {
        "references": _references(found),
        "temperature": settings.get("temperature"),
        "weight": settings.get("text_target_weight"),
    }


def _text_rows(path: Path, num_classes: int) -> np.ndarray:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        z_CD = load_file(path)["Z"].astype(np.float64)
    except (OSError, SafetensorError, KeyError, ValueError):
        raise RunError(f"`{path.name}` is damaged: its class texts cannot be read.") from None
    if z_CD.ndim != 2 or len(z_CD) != num_classes or not np.isfinite(z_CD).all():
        raise RunError(f"`{path.name}` is damaged: its rows are not one for each of the {num_classes} classes.")
    return z_CD


def _similarity(found: Findings, z_CD: np.ndarray) -> dict[str, Any]:
    cosine_CC = z_CD @ z_CD.T
    order = _order_by_similarity(z_CD)
    ordered_CC = cosine_CC[np.ix_(order, order)]
    names = [found.names[index] for index in order]
    block = -(-len(order) // MAX_HEAT_ROWS)
    if block > 1:
        ordered_CC = _coarsened(ordered_CC, block)
    between = cosine_CC - 2 * np.eye(len(order))
    pairs = [(i, int(between[i].argmax())) for i in range(len(order))]
    closest = sorted({tuple(sorted(pair)) for pair in pairs}, key=lambda pair: -between[pair])[:12]
    rows = [[found.names[a], found.names[b], Cell(f"{between[a, b]:.2f}")] for a, b in closest]
    nearest = [
        [
            found.names[i],
            ", ".join(f"{found.names[j]} {between[i, j]:.2f}" for j in np.argsort(-between[i])[:3] if j != i),
        ]
        for i in range(len(order))
    ]
    prompts = [[str(prompt) for prompt in row.get("prompts") or []][:1] for row in found.run.classes]
    if any(prompts):
        nearest = [[name, (own or [MISSING])[0], near] for (name, near), own in zip(nearest, prompts)]
    columns = ["class", "text", "nearest classes"] if any(prompts) else ["class", "nearest classes"]
    description = "Cosine between the texts of all classes, like beside like. Closest: " + "; ".join(
        f"{found.names[a]} and {found.names[b]}, {between[a, b]:.2f}" for a, b in closest[:3]
    )
    return {
        "chart": heat_map("text-chart", "How alike the class texts are", description, ordered_CC, names, 0.0, 1.0),
        "block": block,
        "closest": Table("The closest texts", ["class", "and", "cosine"], rows, frozenset({0, 1})),
        "nearest": Table("Every class's text and its neighbours", columns, nearest, frozenset({0, 1, 2})),
    }


def _order_by_similarity(z_CD: np.ndarray) -> np.ndarray:
    if len(z_CD) < 3:
        return np.arange(len(z_CD))
    from scipy.cluster.hierarchy import leaves_list, linkage

    return leaves_list(linkage(z_CD, "average", optimal_ordering=len(z_CD) <= 400))


def _coarsened(values_CC: np.ndarray, block: int) -> np.ndarray:
    starts = np.arange(0, len(values_CC), block)
    sizes = np.diff([*starts, len(values_CC)])
    sums = np.add.reduceat(np.add.reduceat(values_CC, starts, axis=0), starts, axis=1)
    return sums / np.outer(sizes, sizes)


def _references(found: Findings) -> list[dict[str, Any]]:
    """Return what the text head says of some held-out images, surest first, at most one of a class."""
    if "text" not in found.scored.heads():
        return []
    p_NC = found.scored.probabilities("text")
    entropy_N = -(p_NC * np.log(np.maximum(p_NC, 1e-12))).sum(axis=1)
    kept = set(found.thumbnails.kept())
    one_each: dict[int, int] = {}
    for index, path in enumerate(found.scored.paths):
        if path in kept and path in found.thumbnails:
            one_each.setdefault(int(found.scored.labels[index]), index)
    ordered = sorted(one_each.values(), key=lambda index: entropy_N[index])
    chosen = sorted({round(place) for place in np.linspace(0, len(ordered) - 1, min(NUM_REFERENCES, len(ordered)))})
    shown = []
    for index in (ordered[place] for place in chosen):
        top = np.argsort(-p_NC[index], kind="stable")[:4]
        label = int(found.scored.labels[index])
        shown.append(
            {
                "picture": found.thumbnails.get(found.scored.paths[index]),
                "path": found.scored.paths[index],
                "label": found.names[label],
                "bars": [(found.names[c], float(p_NC[index, c]), int(c) == label) for c in top],
            }
        )
    return shown


def _doubts(found: Findings, doubts_file: str) -> dict[str, Any] | str:
    found_doubts = found.doubts
    limit = NUM_DOUBTS if found.photos is None else NUM_DOUBTS_WITH_PHOTOS
    suspected = [doubt for doubt in found_doubts if doubt.suggested is not None]
    figures = []
    for doubt in suspected:
        if len(figures) == limit:
            break
        if doubt.path in found.thumbnails:
            figures.append(
                {
                    "picture": found.thumbnails.get(doubt.path),
                    "path": doubt.path,
                    "label": found.names[doubt.label],
                    "suggested": found.names[doubt.suggested or 0],
                    "doubt": f"{doubt.doubt:.2f}",
                }
            )
    return {
        "figures": figures,
        "num_suspected": len(suspected),
        "num_images": len(found_doubts),
        "num_left": sum(image.split == "train" for image in found.run.images) - len(found_doubts),
        "file": doubts_file,
        "has_photos": found.photos is not None,
    }


def _training(found: Findings) -> dict[str, Any] | str:
    try:
        lines = (found.run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
    except FileNotFoundError:
        return "There is no metrics.jsonl in the folder."
    except (OSError, ValueError):
        return "metrics.jsonl is damaged."
    own = [row for row in rows if not row.keys() & {"trial", "refit", "arm"}]
    losses: dict[str, list[tuple[float, float]]] = {}
    for row in own:
        if row.get("split") == "train":
            for name, value in row.items():
                if name not in ("split", "step", "epoch", "learning_rate") and np.isfinite(value):
                    losses.setdefault(name, []).append((float(row["step"]), float(value)))
    if not losses:
        return "The head was solved to its optimum in one go, so there is no curve."
    metric = found.run.primary_metric
    charts = [_curves("loss-chart", "Training losses", losses, lambda value: f"{value:g}")]
    for split in ("val", "test"):  # by the protocol `paper` test is looked at on the way
        looks: dict[str, list[tuple[float, float]]] = {}
        rows = [row for row in own if row.get("split") == split]
        looked_at = {row["step"] for row in rows if "epoch" in row}
        for row in rows:
            # The score of what is shipped, which has no epoch, stands for the end where that was not looked at.
            if "epoch" in row or row["step"] not in looked_at:
                for head, figures in row["heads"].items():
                    looks.setdefault(HEADS.get(head, head), []).append((float(row["step"]), float(figures[metric])))
        if any(len(dots) > 1 for dots in looks.values()):
            title = f"{METRICS[metric].capitalize()} on {split}"
            charts.append(_curves(f"{split}-chart", title, looks, lambda value: f"{100 * value:.3g} %"))
    table = Table(
        "Losses by step",
        ["loss", "step", "value"],
        [[name, f"{step:.0f}", f"{value:.4g}"] for name, dots in losses.items() for step, value in _thinned(dots)],
    )
    return {"charts": charts, "table": table}


def _curves(chart: str, title: str, named: dict[str, list[tuple[float, float]]], form: Any) -> dict[str, Any]:
    series = [
        Series(name, _thinned(dots, 200), style=style % NUM_STYLES)
        for style, (name, dots) in enumerate(named.items(), 1)
    ]
    last = max(dots[-1][0] for dots in named.values())
    ticks = [(step, f"{step:g}") for step in nice_ticks(0, last)]
    description = "; ".join(f"{name}: from {dots[0][1]:.3g} to {dots[-1][1]:.3g}" for name, dots in named.items())
    return {"title": title, "chart": line_chart(chart, title, description, series, ticks, "step", form)}


def _thinned(dots: list[tuple[float, float]], limit: int = 40) -> list[tuple[float, float]]:
    if len(dots) <= limit:
        return dots
    return [dots[index] for index in sorted({round(place) for place in np.linspace(0, len(dots) - 1, limit)})]


def _reproduce(found: Findings) -> dict[str, Any]:
    made = environment(found.run.path)
    config = (found.run.path / "config.yaml").read_text(encoding="utf-8")
    return made | {"folder": str(found.run.path), "config": config, "seed": _settings(found).get("seed")}
