"""What the pages of runs and comparisons share: tables, sections that may be missing, how figures are written."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape

from tes.errors import TesError, one_line
from tes.files import read_json
from tes.metrics import CalibrationBins
from tes.page.charts import Series

MISSING = "–"


@dataclass(frozen=True)
class Cell:
    """A table's cell: what is read, what it is sorted by, and the length 0..1 of a bar behind it."""

    text: str
    key: float | str | None = None
    bar: float | None = None


@dataclass(frozen=True)
class Table:
    """A table with a caption; the first column names the row.

    Attributes:
        caption: What it holds.
        columns: Their headings.
        rows: Texts or cells.
        texts: Indices of the columns that hold words; the others hold figures and stand to the right.
        sortable: Whether a click on a heading sorts it.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    texts: frozenset[int] = frozenset({0})
    sortable: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page: what fills it, or why it is left out."""

    id: str
    title: str
    content: dict[str, Any] | None = None
    missing: str | None = None


def section(id_: str, title: str, make: Callable[[], dict[str, Any] | str]) -> Section:
    """Return the section that `make` fills; where it returns or raises a sentence, that stands in its place."""
    try:
        made = make()
    except TesError as problem:
        return Section(id_, title, missing=str(problem))
    except (OSError, KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as problem:
        # What a damaged file can lead to, in places too many to name; the rest of the page is still worth having.
        detail = one_line(problem)
        return Section(id_, title, missing=f"What the folder holds for this part is damaged ({detail}).")
    return Section(id_, title, missing=made) if isinstance(made, str) else Section(id_, title, content=made)


def percent(value: float | None, digits: int = 1) -> str:
    """Write a fraction as per cent."""
    return MISSING if value is None else f"{100 * value:.{digits}f}\u00a0%"


def points(value: float | None, digits: int = 1) -> str:
    """Write a difference of fractions in points, with its sign."""
    if value is None:
        return MISSING
    shown = f"{100 * value:+.{digits}f}"
    return f"{0:.{digits}f}" if float(shown) == 0 else shown.replace("-", "−")


def interval(low: float | None, high: float | None) -> str:
    """Write an interval of differences in points."""
    return MISSING if low is None or high is None else f"{points(low)} to {points(high)}"


def figure(value: float | None) -> str:
    """Write a loss or a calibration error."""
    return MISSING if value is None else f"{value:.3f}"


def calibration_series(name: str, bins: CalibrationBins, style: int) -> Series:
    """Return the line of a reliability diagram, with its expected calibration error under the name."""
    filled = bins.num > 0
    error = float((bins.num * np.abs(bins.accuracy - bins.confidence)).sum() / bins.num.sum())
    dots = list(zip(bins.confidence[filled].tolist(), bins.accuracy[filled].tolist()))
    return Series(f"{name}\nECE {error:.3f}", dots, style=style)


def calibration_table(caption: str, named: Sequence[tuple[str, CalibrationBins]]) -> Table:
    """Return the numbers of a reliability diagram."""
    rows = [
        [name, str(int(num)), percent(float(confidence)), percent(float(accuracy))]
        for name, bins in named
        for num, confidence, accuracy in zip(bins.num, bins.confidence, bins.accuracy)
        if num
    ]
    return Table(caption, ["model", "images", "confidence", "accuracy"], rows)


def environment(folder: Path) -> dict[str, Any]:
    """Return the command and the versions that env.json records."""
    stored = read_json(folder / "env.json", TesError)
    command = [str(word) for word in stored["command"]]
    if command and command[0] in ("__main__.py", "tes"):
        command[0] = "tes"
        shown = shlex.join(command)
    else:
        shown = None  # begun from Python: its arguments say nothing
    machine = {name: stored.get(name) for name in ("python", "platform", "processor", "num_cores", "num_threads")}
    versions = {name: number for name, number in stored["packages"].items() if number}
    rows = [[name, str(value)] for name, value in (*versions.items(), *machine.items()) if value is not None]
    return {"command": shown, "versions": Table("Versions and machine", ["what", "which"], rows, frozenset({0, 1}))}


def code(sentence: str) -> Markup:
    """Set in type what a sentence has between backticks."""
    parts = (sentence[:1].upper() + sentence[1:]).split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if number % 2 and number < len(parts) - 1 else escape(part)
        for number, part in enumerate(parts)
    )


def pretty_json(path: Path) -> str:
    """Return a JSON file's content, indented."""
    return json.dumps(read_json(path, TesError), indent=1, ensure_ascii=False)


def render(template: str, context: dict[str, Any]) -> str:
    """Return the page. Every value is escaped; the page may load nothing and run one script, its own."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tes.page"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": percent, "code": code}
    own = resources.files("tes.page") / "templates"
    style = (own / "style.css").read_text(encoding="utf-8")
    script = (own / "sort.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    html = environment.get_template(template).render(
        **context, style=style, script=script, script_hash=digest, Cell=Cell
    )
    return html.encode("utf-8", "replace").decode()  # a file's name need not be UTF-8
