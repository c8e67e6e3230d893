"""Charts as inline SVG: lines with intervals, bars around zero, a heat map, a reliability diagram.

Colours come from the page's style sheet (`s0`, `s1`, … for series, `h1`, … for a heat map's levels), so that they
follow light and dark mode; no series is told by colour alone: each has a dash, a marker and a label at its end. Every
text goes through `Markup.format`, which escapes it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from markupsafe import Markup

WIDTH = 480
NUM_STYLES = 8
NUM_LEVELS = 9
_CHARACTER = 7.6  # mean width of one in the charts' fonts, the wide ones that are about
_BOLD = 9.0
_SAMPLE = 30  # what a short piece of a line takes before its name

Format = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        name: Its label.
        points: (x, y), ascending in x.
        intervals: (low, high) per point; None where there is none.
        style: Which colour, dash and marker.
        is_minor: Drawn thinner.
    """

    name: str
    points: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[float, float] | None] = ()
    style: int = 0
    is_minor: bool = False


@dataclass(frozen=True)
class Bar:
    """One bar around zero; `mark` stands after its name."""

    name: str
    value: float
    mark: str = ""


def line_chart(
    chart: str,
    title: str,
    description: str,
    series: Sequence[Series],
    x_ticks: Sequence[tuple[float, str]],
    x_label: str,
    y_format: Format,
    zero: bool = False,
    height: int = 280,
) -> Markup:
    """Draw lines, each with a band for its intervals.

    Args:
        chart: A word that no other chart of the page has, for ids.
        title: What it shows.
        description: What a reader who cannot see it should know.
        series: The lines; at least one, with a point each.
        x_ticks: Where the horizontal axis is labelled, and how.
        x_label: What is on it.
        y_format: How the vertical axis is labelled.
        zero: The vertical axis includes 0, which is drawn as a line.
        height: In the units of WIDTH.
    """
    label_width = min(max(len(one.name) for one in series) * _BOLD + _SAMPLE + 12, 200)
    left, right, top, bottom = 52, WIDTH - label_width, 12, height - 44
    xs = [x for x, _ in x_ticks] + [x for one in series for x, _ in one.points]
    values = [y for one in series for _, y in one.points]
    values += [end for one in series for interval in one.intervals if interval for end in interval]
    lowest, highest = min(values + [0] * zero), max(values + [0] * zero)
    margin = 0.06 * (highest - lowest) or 0.01
    lowest, highest = lowest - margin, highest + margin
    ticks = nice_ticks(lowest, highest)
    x_at = _scale(min(xs), max(xs), left + 10, right - 10)
    y_at = _scale(lowest, highest, bottom, top)
    parts = [
        Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(left, _n(right), _n(y_at(t)), _n(y_at(t)))
        + _text(left - 8, y_at(t) + 4, y_format(t), "end")
        for t in ticks
    ]
    parts += [_text(x_at(x), bottom + 18, label, "middle") for x, label in x_ticks]
    parts.append(_text((left + right) / 2, height - 6, x_label, "middle", "axis"))
    if zero:
        parts.append(
            Markup('<line class="zero" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                left, _n(right), _n(y_at(0)), _n(y_at(0))
            )
        )
    parts += [_band(one, x_at, y_at) for one in series]
    parts += [_line(one, x_at, y_at) for one in series]
    ends = [y_at(one.points[-1][1]) for one in series]
    for one, end, y in zip(series, ends, _apart(ends, 16, top + 6, bottom)):
        x = x_at(one.points[-1][0])
        parts.append(Markup('<path class="leader" d="M{} {}L{} {}"/>').format(_n(x + 6), _n(end), _n(right + 4), _n(y)))
        parts.append(_named_sample(one, right + 6, y, label_width - 6))
    return _svg(chart, title, description, WIDTH, height, parts)


def bar_chart(chart: str, title: str, description: str, bars: Sequence[Bar], form: Format) -> Markup:
    """Draw horizontal bars to the left and right of zero, one a row, with their values."""
    row, name_width, top = 21, 168, 6
    longest = max(abs(bar.value) for bar in bars) or 1.0
    room = max(len(form(bar.value)) for bar in bars) * _CHARACTER + 12
    has_both = min(bar.value for bar in bars) < 0 < max(bar.value for bar in bars)
    start, end = name_width + (room if has_both or bars[0].value < 0 else 4), WIDTH - room
    lowest, highest = min(0, *(bar.value for bar in bars)), max(0, *(bar.value for bar in bars))
    x_at = _scale(lowest, highest if highest > lowest else lowest + longest, start, end)
    height = top + row * len(bars) + 6
    parts = [
        Markup('<line class="zero" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(_n(x_at(0)), _n(x_at(0)), top, height - 4)
    ]
    for number, bar in enumerate(bars):
        y = top + row * number
        low, high = sorted((x_at(0), x_at(bar.value)))
        kind = "loss" if bar.value < 0 else "gain"
        parts.append(
            Markup('<g><title>{}: {}</title><rect class="{}" x="{}" y="{}" width="{}" height="{}" rx="2"/>').format(
                bar.name, form(bar.value), kind, _n(low), y + 3, _n(max(high - low, 0.5)), row - 7
            )
        )
        name = f"{_short(bar.name, 16 if bar.mark else 18)} {bar.mark}".rstrip()
        parts.append(_text(name_width - 8, y + 15, name, "end"))
        x, anchor = (low - 5, "end") if bar.value < 0 else (high + 5, "start")
        parts.append(_text(x, y + 15, form(bar.value), anchor))
        parts.append(Markup("</g>"))
    return _svg(chart, title, description, WIDTH, height, parts)


def heat_map(
    chart: str, title: str, description: str, values_RR: np.ndarray, names: Sequence[str], low: float, high: float
) -> Markup:
    """Draw a square matrix as cells of NUM_LEVELS shades; rows are named where there is room for it.

    Args:
        chart: A word that no other chart of the page has, for ids.
        title: What it shows.
        description: What a reader who cannot see it should know.
        values_RR: (R, R).
        names: Of the R rows.
        low: The value of the lightest shade, and below.
        high: The value of the strongest shade, and above.
    """
    num = len(values_RR)
    is_named = num <= 40
    left = 150 if is_named else 4
    cell = (WIDTH - left - 4) / num
    height = round(cell * num + 8)
    levels_RR = np.clip((values_RR - low) / max(high - low, 1e-9) * NUM_LEVELS, 0, NUM_LEVELS - 1).astype(int)
    parts = [Markup('<g transform="translate({} 4) scale({})">').format(left, f"{cell:.4f}")]
    for level in range(1, NUM_LEVELS):  # a level's cells are one path: ten thousand rectangles would be a megabyte
        runs = [run for row in range(num) for run in _runs(levels_RR[row] == level, row)]
        if runs:
            parts.append(Markup('<path class="h{}" d="{}"/>').format(level, "".join(runs)))
    parts.append(Markup("</g>"))
    if is_named:
        size = min(12.0, 0.9 * cell)
        parts += [
            Markup('<text x="{}" y="{}" text-anchor="end" style="font-size:{}px">{}</text>').format(
                left - 6, _n(4 + cell * (row + 0.5) + size / 3), _n(size), _short(name, 20)
            )
            for row, name in enumerate(names)
        ]
    frame = Markup('<rect class="frame" x="{}" y="4" width="{}" height="{}"/>')
    parts.append(frame.format(left, _n(cell * num), _n(cell * num)))
    return _svg(chart, title, description, WIDTH, height, parts)


def reliability_chart(
    chart: str, title: str, description: str, series: Sequence[Series], shares: Sequence[float]
) -> Markup:
    """Draw accuracy over confidence beside the diagonal of perfect calibration, and how many images there are.

    Args:
        chart: A word that no other chart of the page has, for ids.
        title: What it shows.
        description: What a reader who cannot see it should know.
        series: A line per head or arm, of (confidence, accuracy).
        shares: Of the first series: the share of images per bin, as columns along the lower edge.
    """
    left, top, side = 52, 12, 244
    bottom, right = top + side, left + side
    x_at, y_at = _scale(0, 1, left, right), _scale(0, 1, bottom, top)
    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        y = _n(y_at(tick))
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(left, right, y, y))
        parts.append(_text(left - 8, y_at(tick) + 4, f"{tick:.0%}", "end"))
        parts.append(_text(x_at(tick), bottom + 18, f"{tick:.0%}", "middle"))
    width = side / len(shares)
    for number, share in enumerate(shares):
        tall = share * side * 0.5
        column = Markup('<rect class="column" x="{}" y="{}" width="{}" height="{}"/>')
        parts.append(column.format(_n(left + number * width + 1), _n(bottom - tall), _n(width - 2), _n(tall)))
    parts.append(Markup('<line class="ideal" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(left, right, bottom, top))
    parts += [_line(one, x_at, y_at) for one in series]
    parts.append(_text((left + right) / 2, bottom + 38, "confidence", "middle", "axis"))
    for number, one in enumerate(series):
        y = top + 12 + 38 * number
        name, _, rest = one.name.partition("\n")
        parts.append(_named_sample(replace(one, name=name), right + 14, y, WIDTH - right - 14))
        parts.append(_text(right + 14 + _SAMPLE, y + 20, rest, "start"))
    return _svg(chart, title, description, WIDTH, bottom + 46, parts)


def _svg(chart: str, title: str, description: str, width: int, height: int, parts: Sequence[Markup]) -> Markup:
    head = Markup(
        '<svg role="img" viewBox="0 0 {} {}" aria-labelledby="{}-title {}-desc"><title id="{}-title">{}</title>'
        '<desc id="{}-desc">{}</desc>'
    )
    opened = head.format(width, height, chart, chart, chart, title, chart, description)
    return opened + Markup("").join(parts) + Markup("</svg>")


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}" class="{}">{}</text>').format(_n(x), _n(y), anchor, kind, text)


def _band(series: Series, x_at: Format, y_at: Format) -> Markup:
    known = [(x, interval) for (x, _), interval in zip(series.points, series.intervals) if interval]
    if len(known) == 1:
        x, (low, high) = known[0]
        whisker = Markup('<path class="line s{}" d="M{} {}V{}"/>')
        return whisker.format(series.style, _n(x_at(x)), _n(y_at(low)), _n(y_at(high)))
    if not known:
        return Markup("")
    there = [f"{_n(x_at(x))} {_n(y_at(high))}" for x, (_, high) in known]
    back = [f"{_n(x_at(x))} {_n(y_at(low))}" for x, (low, _) in reversed(known)]
    return Markup('<path class="band s{}" d="M{}Z"/>').format(series.style, "L".join([*there, *back]))


def _line(series: Series, x_at: Format, y_at: Format) -> Markup:
    places = [(x_at(x), y_at(y)) for x, y in series.points]
    path = "L".join(f"{_n(x)} {_n(y)}" for x, y in places)
    minor = " minor" if series.is_minor else ""
    line = Markup('<path class="line d{} s{}{}" d="M{}"/>').format(series.style, series.style, minor, path)
    if len(places) > 30:
        return line
    return line + Markup("").join(_marker(series.style, x, y) for x, y in places)


def _named_sample(series: Series, x: float, y: float, width: float) -> Markup:
    line = Markup('<path class="line d{} s{}" d="M{} {}h{}"/>')
    drawn = line.format(series.style, series.style, _n(x), _n(y), _SAMPLE - 6) + _marker(series.style, x + 12, y)
    name = _short(series.name, int((width - _SAMPLE) / _BOLD))
    return drawn + _text(x + _SAMPLE, y + 4, name, "start", f"label s{series.style}")


def _marker(style: int, x: float, y: float) -> Markup:
    shapes = (
        "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z",  # disc
        "m-3.5-3.5h7v7h-7z",  # square
        "m0-4.6l4.4 7.6h-8.8z",  # triangle
        "m0-4.8l4.8 4.8l-4.8 4.8l-4.8-4.8z",  # diamond
        "m0 4.6l4.4-7.6h-8.8z",  # triangle, upside down
        "m-4.5-1.3h3.2v-3.2h2.6v3.2h3.2v2.6h-3.2v3.2h-2.6v-3.2h-3.2z",  # plus
        "m-4.5-1.6h9v3.2h-9z",  # bar, lying
        "m-1.6-4.5h3.2v9h-3.2z",  # bar, standing
    )
    shape = Markup('<path class="mark s{}" d="M{} {}{}"/>')
    return shape.format(style, _n(x), _n(y), Markup(shapes[style % NUM_STYLES]))


def _runs(is_on: np.ndarray, row: int) -> list[str]:
    """Return path pieces that cover the cells of one row that are on, a piece for each run of neighbours."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_on, [False]]).astype(np.int8)))
    return [f"M{start} {row}h{end - start}v1h-{end - start}z" for start, end in edges.reshape(-1, 2)]


def _scale(low: float, high: float, start: float, end: float) -> Format:
    span = high - low
    return lambda value: (start + end) / 2 if span == 0 else start + (value - low) / span * (end - start)


def nice_ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers within a range."""
    span = (high - low) or max(abs(high), 1e-3)
    rough = span / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.7 * rough)
    return [step * number for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move places apart until neighbours are `gap` away from each other, and keep them between low and high."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = list(places)
    for before, after in itertools.pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    if order and moved[order[-1]] > high:
        moved[order[-1]] = high
        for after, before in zip(order[::-1], order[-2::-1]):
            moved[before] = min(moved[before], moved[after] - gap)
    return [max(place, low) for place in moved]


def _short(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: max(length - 1, 1)].rstrip() + "…"


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
