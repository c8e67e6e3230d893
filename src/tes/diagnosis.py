"""Where fine-tuning has left a classifier: near the one that the pre-trained model induces, or nearer the text.

The paper's claim (TeS, ICCV 2023): cross-entropy ends near W0, the classifier that the pre-trained features induce, and
text supervision moves it away from W0 and towards the text. Here are the figures, from plain arrays, and what a person
reads of them. Shapes: C classes, F features, D text dimensions, n images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MIN_CLASSES = 4
"""Below, the debiased CKA is not defined."""
NUM_PERMUTATIONS = 500
AGREEMENTS = ("agreement", "expected_agreement")


def centred_cosine(a_CF: np.ndarray, b_CF: np.ndarray) -> float | None:
    """Return the cosine of two classifiers as vectors, each without its mean row, which a softmax does not see.

    None where one of them is the same for every class.
    """
    a, b = (rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64) for rows in (a_CF, b_CF))
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float((a * b).sum() / norms) if norms > 0 else None


def agreement(predicted_n: np.ndarray, others_n: np.ndarray) -> float | None:
    """Return the share of images that two classifiers put in the same class; None without images."""
    return float((predicted_n == others_n).mean()) if len(predicted_n) else None


def expected_agreement(accuracy: float, other_accuracy: float, num_classes: int) -> float:
    """Return the agreement that two accuracies alone imply: right independently, wrong evenly over the other classes.

    Two classifiers of the same images agree more than this by themselves: some images are hard for both.
    """
    both_wrong = (1 - accuracy) * (1 - other_accuracy)
    return accuracy * other_accuracy + both_wrong / (num_classes - 1)


def debiased_cka(x_CF: np.ndarray, y_CD: np.ndarray) -> float | None:
    """Return the debiased linear CKA of two geometries of the same classes, the rows: 1 equal, about 0 unrelated.

    CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), K = X Xᵀ, L = Y Yᵀ, with the unbiased estimator of HSIC of Song et
    al., "Supervised Feature Selection via Dependence Estimation", ICML 2007, eq. 4; as advised by Nguyen, Raghu and
    Kornblith, ICLR 2021. The plain estimate is near 1 for unrelated rows where dimensions outnumber classes.

    None below 4 classes, or where a geometry says nothing (all classes alike).
    """
    if len(x_CF) < MIN_CLASSES:
        return None
    return _cosine(_u_centred(x_CF), _u_centred(y_CD))


def geometry(
    x_CF: np.ndarray, y_CD: np.ndarray, num_permutations: int = NUM_PERMUTATIONS, seed: int = 0
) -> dict[str, float] | None:
    """Hold the debiased CKA against that of classes permuted.

    Returns:
        `cka`; `null_95`, the 95 % quantile of the permuted ones; `p`, the share of the draws (the true order counted)
        that reach it. None where `debiased_cka` is.
    """
    cka = debiased_cka(x_CF, y_CD)
    if cka is None:
        return None
    k_CC, l_CC = _u_centred(x_CF), _u_centred(y_CD)
    draws = np.random.default_rng(seed)
    null = []
    for _ in range(num_permutations):  # U-centring commutes with a permutation of the classes
        order = draws.permutation(len(l_CC))
        null.append(_cosine(k_CC, l_CC[np.ix_(order, order)]))
    return {
        "cka": cka,
        "null_95": float(np.quantile(null, 0.95)),
        "p": float((1 + np.sum(np.array(null) >= cka - 1e-12)) / (1 + num_permutations)),
    }


def _u_centred(x_CF: np.ndarray) -> np.ndarray:
    """Return the Gram matrix U-centred (Székely and Rizzo 2014): inner products of these are C (C-3) HSIC."""
    x = x_CF.astype(np.float64) - x_CF.mean(axis=0, dtype=np.float64)
    gram_CC = x @ x.T
    np.fill_diagonal(gram_CC, 0)
    n = len(gram_CC)
    rows = gram_CC.sum(axis=1) / (n - 2)
    centred_CC = gram_CC - rows[:, None] - rows[None, :] + gram_CC.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(centred_CC, 0)
    # What is left of classes that are all alike is rounding, and must not count as a geometry.
    return np.where(np.abs(centred_CC) > 1e-12 * max(np.abs(gram_CC).max(), 1e-300), centred_CC, 0.0)


def _cosine(a_CC: np.ndarray, b_CC: np.ndarray) -> float | None:
    norms = np.linalg.norm(a_CC) * np.linalg.norm(b_CC)
    return float((a_CC * b_CC).sum() / norms) if norms > 0 else None


def sentence(report: Mapping[str, Any], others: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]]) -> str:
    """Say whether the paper's claim shows in a run.

    Args:
        report: Of the run, see `tes.diagnose`.
        others: Reports of the runs that it can be held against: `ce` from random heads, the same classes and backbone,
            their `text` measured by this run's rows. A single one says nothing about how far seeds lie apart.
        pairs: Figures between runs; those between two `ce` tell how near two seeds are.
    """
    name, near = report["run"], report["cosine_start"]
    if near is None and report["agreement"] is None:
        return f"{name}: whether it ended near W0 cannot be told without its images."
    if report["start"] != "random":
        return (
            f"{name}: says nothing about the claim. Its head started from `{report['start']}`, so that being near W0"
            " (cosine {}) is true by construction.".format(_figure(near))
        )
    plain = [other for other in others if other["run"] != name]
    told = f"cosine with W0 {_figure(near)}, same answer as W0 on {_share(report['agreement'])} of the test images"
    if report["arm_objective"] == "ce":
        names = {name, *(other["run"] for other in plain)}
        between = [
            pair["cosine"] for pair in pairs if name in pair["runs"] and set(pair["runs"]) <= names and pair["cosine"]
        ]
        if not between or near is None:
            return f"{name}: {told}; how near that is a second seed of `ce` would tell."
        yardstick = float(np.mean(between))
        verdict = "nearer to W0 than to another seed of itself" if near >= yardstick else "does not end near W0"
        # Each seed keeps a part of its own random head, which W0 lacks: the yardstick is a low one.
        return (
            f"{name}: {verdict}: {told}; with another seed its cosine is {_figure(yardstick)}, which is lowered by what"
            " each keeps of its own random start."
        )
    if not report["uses_text"]:
        return f"{name}: {told}; the claim is about `ce` and about text, and this is neither."
    if not plain or near is None:
        return (
            f"{name}: {told}; whether that is away from W0, and towards the text, a run of `ce` beside it would tell."
        )
    nearest = [other["cosine_start"] for other in plain if other["cosine_start"] is not None]
    if len(nearest) < 2:
        return (
            f"{name}: {told}; whether that is away from W0, and towards the text, by more than seeds differ, a second"
            " seed of `ce` would tell."
        )
    away = near < min(nearest) - _spread(nearest)
    said = [f"{'further from' if away else 'no further from'} W0 than `ce` ({_figure(near)}; {_span(nearest)})"]
    own, theirs = report["text"], [other["text"]["cka"] for other in plain if other["text"]]
    towards = None
    if own and theirs:
        towards = own["cka"] > max(theirs) + _spread(theirs) and own["p"] < 0.05
        said.append(f"{'nearer' if towards else 'no nearer'} the text (CKA {_figure(own['cka'])}; {_span(theirs)})")
    verdict = {2: "the claim shows", 1: "the claim shows in part", 0: "the claim does not show"}[away + bool(towards)]
    if towards is None:
        verdict = "half of the claim shows" if away else "the claim does not show"
        said.append("how textual it is cannot be told")
    return f"{name}: {verdict}: {', '.join(said)}."


def render(result: Mapping[str, Any]) -> str:
    """Return the diagnosis as tables and sentences."""
    columns = [
        "run",
        "arm",
        "start",
        "cos W,W0",
        "cos W,W0'",
        "same as W0",
        "accuracy alone",
        "CKA W,Z",
        "p",
        "CKA W0,Z",
        "p",
    ]
    rows = [
        [
            report["run"], report["arm"], report["start"], _figure(report["cosine_start"]),
            _figure(report["cosine_features"]), *(_share(report[key]) for key in AGREEMENTS),
            *_geometry(report["text"]), *_geometry(report["start_text"]),
        ]
        for report in result["runs"]
    ]  # fmt: skip
    lines = _table(columns, rows)
    if result["pairs"]:
        pairs = [
            [
                " | ".join(pair["runs"]),
                _figure(pair["cosine"]),
                *map(_share, (pair["agreement"], pair["expected_agreement"])),
            ]
            for pair in result["pairs"]
        ]
        lines += ["", *_table(["between", "cos W,W'", "same answer", "accuracy alone"], pairs)]
    lines += ["", *(report["sentence"] for report in result["runs"]), *result["notes"]]
    return "\n".join(lines)


def marks(result: Mapping[str, Any]) -> tuple[dict[str, str], list[tuple[str, dict[str, float | None]]]]:
    """Return the plot's legend and rows, for dot_plot.py."""
    legend = {
        "cosine_start": "cosine of W and W0",
        "cosine_features": "cosine of W and W0'",
        "agreement": "same answer on test",
        "cka": "CKA of W and text",
        "start_cka": "CKA of W0 and text",
        "cosine": "cosine of two runs",
    }
    rows: list[tuple[str, dict[str, float | None]]] = []
    for report in result["runs"]:
        values = {key: report[key] for key in ("cosine_start", "cosine_features", "agreement")}
        values |= {"cka": (report["text"] or {}).get("cka"), "start_cka": (report["start_text"] or {}).get("cka")}
        rows.append((report["run"], values))
    for pair in result["pairs"]:
        rows.append((" | ".join(pair["runs"]), {"cosine": pair["cosine"], "agreement": pair["agreement"]}))
    used = {key for _, values in rows for key, value in values.items() if value is not None}
    return {key: words for key, words in legend.items() if key in used}, rows


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _spread(values: Sequence[float]) -> float:
    """Return how far seeds lie apart: nearer than this to one of them is no difference."""
    return max(values) - min(values)


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"`ce` {low:.2f}" + (f" to {high:.2f}" if f"{low:.2f}" != f"{high:.2f}" else "")


def _geometry(figures: Mapping[str, float] | None) -> list[str]:
    return ["-", "-"] if figures is None else [f"{figures['cka']:.2f}", f"{figures['p']:.3f}"]


def _table(columns: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[place]) for row in (columns, *rows)) for place in range(len(columns))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (columns, *rows)]
