"""The demo's photographs, drawn by code: paper shapes on a table, twelve classes with names in plain English.

Several classes differ in one thing alone (red or orange, plain or striped, disc or ring), and every image has its own
position, size, turn, table, light, shadow, clutter and grain, so that a few shots do not say everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from tes.errors import DataError
from tes.files import replacing

SIDE = 160  # pixels
OVERSAMPLING = 4  # shapes are drawn this many times larger, then reduced: smooth edges

Outline = np.ndarray  # (points, 2): the corners of a shape that about fills the unit circle, y pointing down


def _regular(num_corners: int, inner_radius: float | None = None) -> Outline:
    """Return a regular polygon, or a star where an inner radius is given."""
    num_points = num_corners if inner_radius is None else 2 * num_corners
    angle = 2 * math.pi * np.arange(num_points) / num_points - math.pi / 2
    radius = np.ones(num_points)
    if inner_radius is not None:
        radius[1::2] = inner_radius
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _heart() -> Outline:
    t = np.linspace(0, 2 * math.pi, 90, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2.5], axis=1) / 16.5


def _cross() -> Outline:
    long, short = 0.95, 0.32
    arm = np.array([[short, long], [short, short], [long, short]])
    quarter_turn = np.array([[0, -1], [1, 0]])
    return np.concatenate([arm @ np.linalg.matrix_power(quarter_turn, n) for n in range(4)])


SHAPES: dict[str, Outline] = {
    "circle": _regular(72) * 0.92,
    "ring": _regular(72) * 0.95,
    "square": _regular(4) * 1.12,
    "triangle": _regular(3) * 1.12,
    "hexagon": _regular(6),
    "star": _regular(5, inner_radius=0.46) * 1.12,
    "heart": _heart() * 1.05,
    "cross": _cross(),
}
RING_HOLE = 0.52  # of the ring's radius

# Hue in turns, saturation, value: what a word of colour means, before each image's own variation.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.985, 0.82, 0.84),
    "orange": (0.065, 0.86, 0.94),
    "yellow": (0.135, 0.80, 0.95),
    "green": (0.370, 0.68, 0.62),
    "blue": (0.600, 0.76, 0.80),
    "purple": (0.765, 0.56, 0.68),
    "pink": (0.930, 0.44, 0.95),
}


@dataclass(frozen=True)
class _Kind:
    colour: str
    shape: str
    texture: str = "plain"

    @property
    def name(self) -> str:
        words = (self.colour, self.shape) if self.texture == "plain" else (self.colour, self.texture, self.shape)
        return " ".join(words)


_KINDS = (
    _Kind("red", "circle"),
    _Kind("orange", "circle"),
    _Kind("red", "ring"),
    _Kind("blue", "square"),
    _Kind("blue", "square", "striped"),
    _Kind("blue", "square", "checkered"),
    _Kind("green", "star"),
    _Kind("green", "star", "spotted"),
    _Kind("yellow", "triangle"),
    _Kind("yellow", "cross"),
    _Kind("purple", "heart"),
    _Kind("pink", "heart"),
)
CLASS_NAMES = tuple(kind.name for kind in _KINDS)


def draw_dataset(folder: Path | str, images_per_class: int = 40, seed: int = 0) -> Path:
    """Draw the image set into class folders, `folder/red_circle/000.png` and so on.

    Image i of a class depends on (seed, class, i) alone, so a larger set contains the smaller one. Images of the same
    name are replaced, others are left.

    Args:
        folder: Where to draw; made if it does not exist.
        images_per_class: Number of images of each of the classes `CLASS_NAMES`.
        seed: Another seed draws other images.

    Returns:
        `folder`.

    Raises:
        DataError: The folder cannot be written to.
    """
    folder = Path(folder)

    try:
        for number, kind in enumerate(_KINDS):
            class_folder = folder / kind.name.replace(" ", "_")
            class_folder.mkdir(parents=True, exist_ok=True)
            for index in range(images_per_class):
                image = _draw_image(kind, np.random.default_rng((seed, number, index)))
                image.save(class_folder / f"{index:03d}.png", compress_level=1)
    except OSError as problem:
        raise DataError(f"The demo's images cannot be drawn into `{folder}`: {problem.strerror or problem}.") from None
    return folder


def contact_sheet(folder: Path | str, out_path: Path | str, images_per_class: int = 8) -> Path:
    """Show the first images of every class folder, a labelled row per class, as one PNG.

    Args:
        folder: Class folders, as `draw_dataset` makes them.
        out_path: The PNG to write.
        images_per_class: Number of images in a row, at most.

    Returns:
        `out_path`.

    Raises:
        DataError: There are no images in `folder`, or the PNG cannot be written.
    """
    rows = [(sub.name.replace("_", " "), sorted(sub.glob("*.png"))[:images_per_class]) for sub in _subfolders(folder)]
    rows = [(name, paths) for name, paths in rows if paths]
    if not rows:
        raise DataError(f"There are no class folders with PNG images in `{folder}`; draw them first.")
    tile, gap, margin, font = 88, 6, 20, ImageFont.load_default(size=15)
    label_width = max(math.ceil(font.getlength(name)) for name, _ in rows) + 16
    num_columns = max(len(paths) for _, paths in rows)
    size = (2 * margin + label_width + num_columns * (tile + gap) - gap, 2 * margin + len(rows) * (tile + gap) - gap)
    sheet = Image.new("RGB", size, (250, 249, 246))
    pen = ImageDraw.Draw(sheet)
    corners = Image.new("L", (4 * tile, 4 * tile), 0)
    ImageDraw.Draw(corners).rounded_rectangle((0, 0, 4 * tile - 1, 4 * tile - 1), radius=28, fill=255)
    corners = corners.reduce(4)
    for row, (name, paths) in enumerate(rows):
        top = margin + row * (tile + gap)
        pen.text((margin, top + tile / 2), name, fill=(52, 50, 47), font=font, anchor="lm")
        for column, path in enumerate(paths):
            with Image.open(path) as image:
                small = image.convert("RGB").resize((tile, tile), Image.Resampling.LANCZOS)
            sheet.paste(small, (margin + label_width + column * (tile + gap), top), corners)
    try:
        with replacing(Path(out_path)) as temporary:
            sheet.save(temporary, format="PNG", optimize=True)
    except OSError as problem:
        raise DataError(f"The contact sheet `{out_path}` cannot be written: {problem.strerror or problem}.") from None
    return Path(out_path)


def _subfolders(folder: Path | str) -> list[Path]:
    return sorted(sub for sub in Path(folder).iterdir() if sub.is_dir()) if Path(folder).is_dir() else []


# ---- one image. Arrays are (SIDE, SIDE) masks or (SIDE, SIDE, 3) colours, float32 in 0..1.


def _draw_image(kind: _Kind, rng: np.random.Generator) -> Image.Image:
    light = rng.uniform(0, 2 * math.pi)
    canvas = _table(rng)
    for _ in range(rng.integers(1, 5)):
        canvas = _lay_scrap(canvas, light, rng)
    canvas = _lay_subject(canvas, kind, light, rng)
    if rng.random() < 0.3:
        canvas = _lay_scrap(canvas, light, rng)
    return _photograph(canvas, light, rng)


def _table(rng: np.random.Generator) -> np.ndarray:
    """Return a surface of two neighbouring colours: clouded, or grained like wood."""
    hue, saturation, value = rng.random(), rng.uniform(0.03, 0.28), rng.uniform(0.40, 0.92)
    first = _rgb(hue, saturation, value)
    second = _rgb(hue + rng.uniform(-0.12, 0.12), saturation, value * rng.uniform(0.62, 0.92))
    cells = (int(rng.integers(2, 9)), int(rng.integers(2, 9)))
    if rng.random() < 0.35:
        cells = (3, int(rng.integers(24, 48)))
    weave = _clouds(cells, rng)
    weave = weave.T if rng.random() < 0.5 else weave
    return first + (second - first) * weave[..., None]


def _lay_scrap(canvas: np.ndarray, light: float, rng: np.random.Generator) -> np.ndarray:
    """Lay a small scrap of any shape and colour somewhere near the edge."""
    outline = SHAPES[rng.choice(list(SHAPES))]
    angle, distance = rng.uniform(0, 2 * math.pi), rng.uniform(0.36, 0.60)
    centre = (0.5 + distance * math.cos(angle), 0.5 + distance * math.sin(angle))
    mask = _mask(outline, centre, rng.uniform(0.035, 0.08), rng.uniform(0, 2 * math.pi))
    paint = _rgb(rng.random(), rng.uniform(0.15, 0.65), rng.uniform(0.4, 0.95))
    return _lay(canvas, mask, np.broadcast_to(paint, canvas.shape), light, height=1.5)


def _lay_subject(canvas: np.ndarray, kind: _Kind, light: float, rng: np.random.Generator) -> np.ndarray:
    size = rng.uniform(0.24, 0.40)
    reach = 0.46 - size
    centre = (0.5 + rng.uniform(-reach, reach), 0.5 + rng.uniform(-reach, reach))
    # Hearts and triangles stay more or less upright, as people lay them; the others may lie any way.
    turn = rng.normal(0, 0.45) if kind.shape in ("heart", "triangle") else rng.uniform(0, 2 * math.pi)
    outline = SHAPES[kind.shape] * rng.uniform(0.93, 1.07, 2)
    mask = _mask(outline, centre, size, turn)
    if kind.shape == "ring":
        mask = mask - _mask(outline * RING_HOLE, centre, size, turn)
    hue, saturation, value = COLOURS[kind.colour]
    hue = hue + rng.normal(0, 0.012)
    saturation = min(1, saturation * rng.uniform(0.8, 1.15))
    value = min(1, value * rng.uniform(0.82, 1.08))
    ink = _rgb(hue, saturation, value)
    pattern = TEXTURES[kind.texture](*_own_frame(centre, size, turn), rng)
    other = _rgb(hue, saturation * 0.22, min(1, value * 1.25))
    paint = ink + (other - ink) * pattern[..., None]
    return _lay(canvas, mask, paint, light, height=rng.uniform(2, 5))


def _photograph(canvas: np.ndarray, light: float, rng: np.random.Generator) -> Image.Image:
    """Light the scene from one side, tint it, focus it more or less well, and add the sensor's grain."""
    y, x = _grid()
    falloff = (x - 0.5) * math.cos(light) + (y - 0.5) * math.sin(light)
    exposure = rng.uniform(0.78, 1.15) * (1 + rng.uniform(0.1, 0.6) * falloff)
    tint = 1 + 0.04 * rng.standard_normal(3, dtype=np.float32)
    lit = np.clip(canvas * exposure[..., None] * tint, 0, 1)
    image = Image.fromarray((lit * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.1)))
    grain = rng.standard_normal(canvas.shape, dtype=np.float32) * rng.uniform(1, 8)
    return Image.fromarray(np.clip(np.asarray(image) + grain + 0.5, 0, 255).astype(np.uint8))


def _lay(canvas: np.ndarray, mask: np.ndarray, paint: np.ndarray, light: float, height: float) -> np.ndarray:
    """Lay paper on the canvas, `height` pixels above it: it casts a shadow away from the light."""
    away = (round(-height * math.cos(light)), round(-height * math.sin(light)))
    cast = Image.new("L", (SIDE, SIDE), 0)
    cast.paste(Image.fromarray((mask * 255).astype(np.uint8)), away)
    shadow = np.asarray(cast.filter(ImageFilter.GaussianBlur(height)), dtype=np.float32) / 255
    canvas = canvas * (1 - 0.45 * shadow[..., None])
    return canvas + (paint - canvas) * mask[..., None]


def _mask(outline: Outline, centre: tuple[float, float], size: float, turn: float) -> np.ndarray:
    cos, sin = math.cos(turn), math.sin(turn)
    points = outline @ np.array([[cos, sin], [-sin, cos]]) * size + centre
    large = Image.new("L", (SIDE * OVERSAMPLING, SIDE * OVERSAMPLING), 0)
    ImageDraw.Draw(large).polygon([tuple(point) for point in points * SIDE * OVERSAMPLING], fill=255)
    return np.asarray(large.reduce(OVERSAMPLING), dtype=np.float32) / 255


def _grid() -> tuple[np.ndarray, np.ndarray]:
    """Return each pixel's y and x, 0..1."""
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    return (y + 0.5) / SIDE, (x + 0.5) / SIDE


def _own_frame(centre: tuple[float, float], size: float, turn: float) -> tuple[np.ndarray, np.ndarray]:
    """Return each pixel's u and v in the frame of a shape that lies at `centre`."""
    y, x = _grid()
    x, y = (x - centre[0]) / size, (y - centre[1]) / size
    return x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)


def _clouds(cells: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    coarse = Image.fromarray(rng.random(cells, dtype=np.float32))
    return np.clip(np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)), 0, 1)


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """Return (3,) red, green, blue of a hue in turns."""
    sector = (np.array([5, 3, 1]) + hue * 6) % 6
    return (value - value * saturation * np.clip(np.minimum(sector, 4 - sector), 0, 1)).astype(np.float32)


# ---- textures: 0 where the paper has its colour, 1 where it is pale, from a shape's own coordinates u and v.


def _edge(distance: np.ndarray, sharpness: float = 14) -> np.ndarray:
    """Return 1 inside (positive distances), 0 outside, with a soft step between."""
    return np.clip(0.5 + distance * sharpness, 0, 1)


def _plain(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.zeros_like(u)


def _striped(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    angle, period = float(rng.choice([0.25, 0.75])) * math.pi, rng.uniform(0.30, 0.46)
    along = (u * math.cos(angle) + v * math.sin(angle)) / period + rng.random()
    return _edge(period * (np.abs(along % 1 - 0.5) - 0.27))


def _checkered(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    period = rng.uniform(0.55, 0.75)
    a, b = (u + v) / math.sqrt(2), (u - v) / math.sqrt(2)
    return _edge(0.3 * np.sin(2 * math.pi * a / period) * np.sin(2 * math.pi * b / period))


def _spotted(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    period = rng.uniform(0.42, 0.54)
    a, b = u / period + rng.random(), v / period + rng.random()
    a = a + 0.5 * (np.floor(b) % 2)
    return _edge(period * (0.29 - np.hypot(a % 1 - 0.5, b % 1 - 0.5)))


TEXTURES: dict[str, Callable[..., np.ndarray]] = {
    "plain": _plain,
    "striped": _striped,
    "checkered": _checkered,
    "spotted": _spotted,
}
