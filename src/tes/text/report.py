"""What a text classifier knows about the classes, in figures and in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tes.data.names import is_uninformative
from tes.errors import counted, listing
from tes.text.classifier import TextClassifier

if TYPE_CHECKING:
    from tes.data.classes_file import ClassInfo

SAME_ROW = 0.9999  # cosine above which two classes have one row
NEARLY_SAME_ROW = 0.95
CROWDED = 0.3  # mean cosine of different classes from which the rows stand in a narrow cone
NUM_NEAREST = 3


def text_report(text: TextClassifier, classes: Sequence[ClassInfo]) -> dict[str, Any]:
    """Return what the text says about the classes, ready for JSON.

    Args:
        text: The text classifier.
        classes: The data's classes.

    Returns:
        `classes` (each with `class`, `name`, `prompts`, `nearest`: cosines of the rows in use), `duplicates` (pairs
        with one row), `uninformative` (labels of classes that only have a name, and one that says nothing), `cosine`
        ({`raw`, `centred`}: {`mean`, `max`} over different classes), `centred` (whether the rows in use are),
        `encoder`, `num_classes`, `num_dimensions`, `notes`, `obstacles` and `verdict` (sentences).

    Raises:
        TextError: The classifier is of other classes.
    """
    text.aligned_with(classes)
    raw_rows, used_rows = text.uncentred, text.Z.astype(np.float64)
    centred = _between(_centred_cosines(raw_rows))  # before the others: of 10,000 classes each takes 800 MB
    raw_CC, used_CC = raw_rows @ raw_rows.T, used_rows @ used_rows.T
    report: dict[str, Any] = {
        "encoder": text.encoder,
        "num_classes": len(classes),
        "num_dimensions": text.Z.shape[1],
        "centred": text.centre is not None,
        "cosine": {"raw": _between(raw_CC), "centred": centred},
        "duplicates": [[text.labels[a], text.labels[b]] for a, b in _pairs_above(raw_CC, SAME_ROW)],
        "uninformative": [info.label for info in classes if _says_nothing(info)],
        "classes": [
            {
                "class": info.label,
                "name": info.name,
                "prompts": list(prompts),
                "nearest": _nearest(index, used_CC[index], text.labels),
            }
            for index, (info, prompts) in enumerate(zip(classes, text.prompts, strict=True))
        ],
        "notes": list(text.notes),
    }
    report["obstacles"] = _obstacles(report, classes, raw_CC, used_CC)
    report["verdict"] = _verdict(report, classes)
    return report


def render(report: dict[str, Any]) -> str:
    """Return the report as text for people."""
    centring = "centred" if report["centred"] else "not centred"
    lines = [
        f"Text classifier: {report['encoder']}, {report['num_classes']} classes, "
        f"{report['num_dimensions']} dimensions, {centring}.",
        "",
    ]
    rows = [("class", "text", "nearest classes (cosine)")]
    for entry in report["classes"]:
        sentences = entry["prompts"]
        more = f" (+{len(sentences) - 1})" if len(sentences) > 1 else ""
        shown = _short(sentences[0], 44 - len(more)) + more if sentences else f"{_short(entry['name'], 34)} (a row)"
        nearest = ", ".join(f"{_short(other['class'], 20)} {other['cosine']:.2f}" for other in entry["nearest"])
        rows.append((_short(entry["class"], 28), shown, nearest))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines += [f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}".rstrip() for row in rows]
    raw, centred = report["cosine"]["raw"], report["cosine"]["centred"]
    lines += [
        "",
        "Cosine between different classes: "
        f"mean {raw['mean']:.2f}, max {raw['max']:.2f}; centred: mean {centred['mean']:.2f}, max {centred['max']:.2f}.",
        "",
        "What this means:",
        *(f"- {sentence}" for sentence in (*report["verdict"], *report["notes"])),
    ]
    return "\n".join(lines)


def _obstacles(
    report: dict[str, Any], classes: Sequence[ClassInfo], raw_CC: np.ndarray, used_CC: np.ndarray
) -> list[str]:
    sentences = []
    remedy = "Give them different names or descriptions with --classes."
    if not any(entry["prompts"] for entry in report["classes"]):
        remedy = "Give each a row of its own in the file."
    spelled = [
        info.name
        for info in classes
        if not info.prompts and any(letter.isalpha() and not letter.isascii() for letter in info.name)
    ]
    if spelled and report["encoder"] == "minilm":
        sentences.append(
            f"{counted(len(spelled), 'name')} of {len(classes)} {'has' if len(spelled) == 1 else 'have'} letters that"
            f" English lacks ({listing(spelled, 3)}), and minilm was trained on English text: it may read little or"
            " nothing in them. Give English names with --classes, or take a multilingual encoder (--text st:ID)."
        )
    if pairs := report["duplicates"]:
        sentences.append(
            f"{counted(len(pairs), 'pair')} of classes {_have(len(pairs))} one and the same row "
            f"({listing([f'{a} = {b}' for a, b in pairs])}): the text gives both classes of a pair the same reference, "
            f"so only the images can tell them apart. {remedy}"
        )
    if silent := report["uninformative"]:
        sentences.append(
            f"{counted(len(silent), 'name')} of {len(classes)} {'says' if len(silent) == 1 else 'say'} nothing "
            f"({listing(silent)}): text made from them is noise for these classes. Name them with --classes."
        )
    if close := [pair for pair in _pairs_above(used_CC, NEARLY_SAME_ROW) if raw_CC[pair] <= SAME_ROW]:
        shown = listing([f"{classes[a].label} and {classes[b].label} {used_CC[a, b]:.2f}" for a, b in close], limit=3)
        sentences.append(
            f"{counted(len(close), 'further pair')} of classes {'is' if len(close) == 1 else 'are'} nearly the same to "
            f"the text ({shown}): it mixes them up rather than tells them apart; descriptions may."
        )
    raw, centred = report["cosine"]["raw"]["mean"], report["cosine"]["centred"]["mean"]
    if not report["centred"] and raw > CROWDED:
        sentences.append(
            f"All rows point much the same way (mean cosine {raw:.2f}, centred {centred:.2f}), so the text hardly "
            "tells classes apart: turn centring on with --set text.centre=true."
        )
    return sentences


def _verdict(report: dict[str, Any], classes: Sequence[ClassInfo]) -> list[str]:
    sentences = list(report["obstacles"])
    raw, centred = report["cosine"]["raw"]["mean"], report["cosine"]["centred"]["mean"]
    if not sentences:
        sentences.append(
            f"All {len(classes)} classes have a name that says something and a row of their own: nothing stands in the "
            "way of text supervision. Whether it helps on these images, only a comparison with `ce` tells."
        )
    if report["centred"]:
        sentences.append(
            f"Centring is on: it takes the mean cosine between classes from {raw:.2f} to {centred:.2f}, so that the "
            "text speaks of what sets a class apart, not of what all classes share."
        )
    return sentences


def warnings(classifier: TextClassifier, classes: Sequence[ClassInfo]) -> list[str]:
    """Return what stands in the way of text supervision, in sentences; nothing where nothing does."""
    return text_report(classifier, classes)["obstacles"]


def _says_nothing(info: ClassInfo) -> bool:
    return is_uninformative(info.name) and not info.descriptions and not info.prompts


def _between(cosine_CC: np.ndarray) -> dict[str, float]:
    """Return mean and max over pairs of different classes; 0 for a single class."""
    num_classes = len(cosine_CC)
    if num_classes < 2:
        return {"mean": 0.0, "max": 0.0}
    own_C = cosine_CC.diagonal().copy()
    mean = (cosine_CC.sum() - own_C.sum()) / (num_classes * (num_classes - 1))
    np.fill_diagonal(cosine_CC, -np.inf)
    highest = float(cosine_CC.max())
    np.fill_diagonal(cosine_CC, own_C)
    return {"mean": float(mean), "max": highest}


def _centred_cosines(rows: np.ndarray) -> np.ndarray:
    rest = rows - rows.mean(axis=0)
    rest /= np.maximum(np.linalg.norm(rest, axis=1, keepdims=True), 1e-12)
    return rest @ rest.T


def _pairs_above(cosine_CC: np.ndarray, threshold: float) -> list[tuple[int, int]]:
    """Return the pairs of different classes above the threshold, the closest first."""
    pairs = np.argwhere(np.triu(cosine_CC > threshold, k=1))
    return sorted(((int(a), int(b)) for a, b in pairs), key=lambda pair: (-cosine_CC[pair].round(4), pair))


def _nearest(index: int, cosines_C: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    num_wanted = min(NUM_NEAREST + 1, len(cosines_C))  # itself is one of them
    close = np.flatnonzero(cosines_C >= np.partition(cosines_C, -num_wanted)[-num_wanted])
    order = [other for other in close[np.argsort(-cosines_C[close], kind="stable")].tolist() if other != index]
    return [{"class": labels[other], "cosine": float(cosines_C[other])} for other in order[:NUM_NEAREST]]


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def _have(number: int) -> str:
    return "has" if number == 1 else "have"
