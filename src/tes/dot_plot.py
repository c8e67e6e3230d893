"""A plot of a few figures per row, as an SVG that needs no library: one mark a figure, readable in light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

SHAPES = (
    '<circle class="a" cx="{x}" cy="{y}" r="5"/>',
    '<circle class="b" cx="{x}" cy="{y}" r="5"/>',
    '<rect class="c" x="{left}" y="{top}" width="9" height="9"/>',
    '<path class="d" d="M{x} {up} L{right} {y} L{x} {down} L{west} {y} Z"/>',
    '<path class="e" d="M{x} {up} L{right} {y} L{x} {down} L{west} {y} Z"/>',
    '<path class="f" d="M{x} {up} L{right} {base} L{west} {base} Z"/>',
)
STYLE = """
text{font:13px system-ui,sans-serif;fill:#222} .axis{stroke:#bbb;stroke-width:1} .zero{stroke:#666}
.a{fill:#0b62a4} .b{fill:none;stroke:#0b62a4;stroke-width:2} .c{fill:#8a8a8a} .d{fill:#c2410c}
.e{fill:none;stroke:#c2410c;stroke-width:2} .f{fill:#5b7f1f} .paper{fill:#fff}
@media (prefers-color-scheme:dark){text{fill:#eee} .axis{stroke:#555} .zero{stroke:#aaa} .paper{fill:#161616}
.a{fill:#6cb4f0} .b{stroke:#6cb4f0} .c{fill:#aaa} .d{fill:#ff9355} .e{stroke:#ff9355} .f{fill:#a8cf6a}}
"""
ROW, LEFT, WIDTH, MARGIN, CHARACTER = 28, 24, 460, 24, 7.4
"""Pixels: a row's height, the space on the left, the axis, the space on the right, a character."""


def dot_plot(
    title: str, legend: Mapping[str, str], rows: Sequence[tuple[str, Mapping[str, float | None]]], description: str
) -> str:
    """Return an SVG.

    Args:
        title: What is shown.
        legend: Figure to its words; at most six, in the order in which shapes are given out.
        rows: Name, and the figures by name, None for those that there are not.
        description: The same in sentences, for those who cannot see it.
    """
    values = [value for _, figures in rows for value in figures.values() if value is not None]
    low, high = min([0.0, *values]), max([1.0, *values])
    label = LEFT + CHARACTER * max(len(name) for name, _ in rows)
    top = 48 + ROW * ((len(legend) + 1) // 2)
    width, height = label + 24 + WIDTH + MARGIN, top + ROW * len(rows) + 40
    start = label + 24

    def place(value: float) -> float:
        return round(start + WIDTH * (value - low) / (high - low), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img"'
        ' aria-labelledby="title desc">',
        f'<title id="title">{escape(title)}</title><desc id="desc">{escape(description)}</desc>',
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{width:.0f}" height="{height:.0f}"/>',
        f'<text x="{LEFT}" y="26" font-weight="600">{escape(title)}</text>',
    ]
    shapes = dict(zip(legend, SHAPES, strict=False))
    for number, (key, words) in enumerate(legend.items()):
        x, y = LEFT + 8 + (number % 2) * 260, 48 + ROW * (number // 2)
        parts += [_mark(shapes[key], x, y), f'<text x="{x + 14}" y="{y + 4}">{escape(words)}</text>']
    bottom = top + ROW * len(rows)
    for tick in (low, 0.0, 0.25, 0.5, 0.75, 1.0) if low < -0.05 else (0.0, 0.25, 0.5, 0.75, 1.0):
        x = place(tick)
        parts.append(
            f'<line class="axis{" zero" if tick == 0 else ""}" x1="{x}" x2="{x}" y1="{top - 14}" y2="{bottom}"/>'
            f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{tick:.2g}</text>'
        )
    for number, (name, figures) in enumerate(rows):
        y = top + ROW * number
        parts.append(f'<text x="{label}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        for key, value in figures.items():
            if value is not None:
                words = escape(f"{name}: {legend[key]} {value:.2f}")
                parts.append(f"<g><title>{words}</title>{_mark(shapes[key], place(value), y)}</g>")
    return "\n".join([*parts, "</svg>"]) + "\n"


def _mark(shape: str, x: float, y: float) -> str:
    return shape.format(
        x=x, y=y, left=x - 4.5, top=y - 4.5, up=y - 6, down=y + 6, right=x + 6, west=x - 6, base=y + 5
    )  # fmt: skip
