"""Images that show the same though their bytes differ: re-encoded, resized, retouched, or one cut out of another.

Two looks, both at small grey copies. A perceptual hash finds whole images that are alike (Zauner: Implementation and
benchmarking of perceptual image hash functions, 2010): 128 low frequencies of a cosine transform, each above their
median or not; near duplicates differ in at most 12 of the 128 bits. Crops have other frequencies, so the middle square
of every image is also held against square windows of all others, by the correlation of 8 x 8 grey values, and the best
few are moved and scaled until 16 x 16 values agree.

Thresholds were set by looking at the pairs that they give (LOG.md). Shapes: N images, W windows, K values of a patch.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image

from tes import console
from tes.data.dataset import Dataset
from tes.data.images import UnreadableImageError, decode
from tes.data.source import Sample
from tes.errors import TesError
from tes.files import cache_dir, read_json, sha256_text, write_json

MAX_IMAGES = 100_000
MAX_IMAGES_FOR_CROPS = 10_000
"""Both looks compare every image with every other: above these numbers that takes longer than a check should."""
MAX_DISTANCE = 12
MIN_CORRELATION = 0.98
CANDIDATES = 5
CANDIDATE_CORRELATION = 0.87
FLAT = 4.0
"""Below this standard deviation, in grey values of 0..255, there is nothing on an image to know it again by."""

_SIDE = 32
_SCALES = (1.0, 0.87, 0.75, 0.65)
_STEP = 0.15
_MAX_PLACES = 12
_BLOCK = 20_000_000


@dataclass(frozen=True)
class Similar:
    """Two images, by index, that show the same; `kind` is `near` (the whole) or `crop` (one lies within the other)."""

    first: int
    second: int
    kind: str


def find_similar(dataset: Dataset) -> list[Similar] | None:
    """Return all pairs of similar images, identical ones aside; None where there are too many images to compare.

    What was found is kept by the images' content, so that only a data set that has changed is looked through again.
    """
    by_sha1: dict[str, list[int]] = defaultdict(list)
    for index, sha1 in enumerate(dataset.sha1s):
        by_sha1[sha1].append(index)
    if len(by_sha1) > MAX_IMAGES:
        return None
    path = cache_dir() / "similar" / f"{sha256_text('format 1', *sorted(by_sha1))}.json"
    try:
        kept = read_json(path, TesError)
        found = [(str(first), str(second), str(kind)) for first, second, kind in kept]
        if not isinstance(kept, list) or not all({first, second} <= by_sha1.keys() for first, second, _ in found):
            raise ValueError("not what is kept here")
    except (TesError, ValueError, TypeError):  # absent or damaged: everything is looked at again
        found = _compare(dataset, [indices[0] for indices in by_sha1.values()])
        with contextlib.suppress(OSError):
            write_json(path, found)
    pairs = {
        (min(first, second), max(first, second)): kind
        for sha1, other, kind in found
        for first, second in product(by_sha1[sha1], by_sha1[other])
    }
    return [Similar(first, second, kind) for (first, second), kind in sorted(pairs.items())]


def _compare(dataset: Dataset, indices: list[int]) -> list[tuple[str, str, str]]:
    """Return (SHA-1, SHA-1, kind) of the images that are similar."""

    def small(index: int) -> np.ndarray | None:
        try:
            sample = Sample(dataset.paths[index], dataset.classes[dataset.labels[index]].label)
            return _grey(decode(dataset.source.read(sample), max_side_hint=2 * _SIDE))
        except (OSError, UnreadableImageError):  # gone since the scan: not what is asked here
            return None

    grey: list[np.ndarray] = []
    sha1s: list[str] = []
    with console.progress(len(indices), "looking for near duplicates") as progress, ThreadPoolExecutor(4) as threads:
        for index, values in zip(indices, threads.map(small, indices)):
            if values is not None and values.std() >= FLAT:
                grey.append(values)
                sha1s.append(dataset.sha1s[index])
            progress.advance()
    kinds = {pair: "near" for pair in near_pairs(np.array([perceptual_hash(image) for image in grey]))}
    if len(grey) <= MAX_IMAGES_FOR_CROPS:
        kinds = {pair: "crop" for pair in crop_pairs(grey)} | kinds
    return [(sha1s[first], sha1s[second], kind) for (first, second), kind in sorted(kinds.items())]


def _grey(image: Image.Image) -> np.ndarray:
    """Return grey values, float32, with a short side of 32."""
    factor = _SIDE / min(image.size)
    size = (max(_SIDE, round(image.width * factor)), max(_SIDE, round(image.height * factor)))
    return np.asarray(image.convert("L").resize(size, Image.Resampling.BOX), dtype=np.float32)


def perceptual_hash(image: np.ndarray) -> np.ndarray:
    """Return 128 bits, (2,) uint64, of grey values."""
    square = Image.fromarray(image).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
    low = (_COSINES @ np.asarray(square, dtype=np.float64) @ _COSINES.T).ravel()[1:129]  # without the mean
    return np.packbits(low > np.median(low)).view(np.uint64)


def _cosines(num: int, side: int) -> np.ndarray:
    """Return the first rows of the cosine transform (DCT-II) of so many values."""
    return np.cos(np.pi / side * np.arange(num)[:, None] * (np.arange(side) + 0.5))


_COSINES = _cosines(12, _SIDE)


def near_pairs(hashes_N2: np.ndarray) -> list[tuple[int, int]]:
    """Return the pairs whose hashes differ in at most `MAX_DISTANCE` bits."""
    pairs: list[tuple[int, int]] = []
    num = len(hashes_N2)
    step = max(1, _BLOCK // 10 // max(num, 1))
    for start in range(0, num, step):
        block = hashes_N2[start : start + step, None]
        distances = sum(np.bitwise_count(block[..., word] ^ hashes_N2[None, :, word]) for word in range(2))
        rows, columns = np.nonzero(distances <= MAX_DISTANCE)
        pairs += [(row, column) for row, column in zip((rows + start).tolist(), columns.tolist()) if row < column]
    return pairs


def crop_pairs(images: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """Return the pairs of grey images of which one's middle square lies within the other."""
    if len(images) < 2:
        return []
    sums = [_integral(image) for image in images]
    middles = [_middle(image.shape) for image in images]
    windows = [_windows(image.shape) for image in images]
    first_N = np.cumsum([0, *(len(boxes) for boxes in windows[:-1])])
    middle_NK = np.concatenate([_patches(total, box, 8) for total, box in zip(sums, middles)])
    window_WK = np.concatenate([_patches(total, boxes, 8) for total, boxes in zip(sums, windows)])
    fine_NK = np.concatenate([_patches(total, box, 16) for total, box in zip(sums, middles)])
    num_candidates = min(CANDIDATES, len(images) - 1)
    pairs: set[tuple[int, int]] = set()
    step = max(1, _BLOCK // len(window_WK))
    with console.progress(len(images), "looking for crops") as progress:
        for start in range(0, len(images), step):
            correlation_BW = middle_NK[start : start + step] @ window_WK.T
            best_BN = np.maximum.reduceat(correlation_BW, first_N, axis=1)
            for row, best_N in enumerate(best_BN):
                own = start + row
                best_N[own] = -1.0
                for other in np.argpartition(-best_N, num_candidates - 1)[:num_candidates].tolist():
                    if best_N[other] < CANDIDATE_CORRELATION or (min(own, other), max(own, other)) in pairs:
                        continue
                    its = slice(first_N[other], first_N[other] + len(windows[other]))
                    box = windows[other][correlation_BW[row, its].argmax()]
                    if _fitted(sums[other], box, fine_NK[own]) >= MIN_CORRELATION:
                        pairs.add((min(own, other), max(own, other)))
                progress.advance()
    return sorted(pairs)


def _fitted(total: np.ndarray, box: np.ndarray, wanted_K: np.ndarray) -> float:
    """Move and scale a window, in ever smaller steps, to where it agrees best; return the correlation there."""
    height, width = (side - 1 for side in total.shape)
    for step, hopeless in ((0.08, 0.85), (0.04, 0.93), (0.02, MIN_CORRELATION)):
        x, y, side = box
        moved = side * step * _MOVES
        boxes = np.stack([x + moved[:, 0] - moved[:, 2] / 2, y + moved[:, 1] - moved[:, 2] / 2, side + moved[:, 2]], 1)
        boxes[:, 2] = boxes[:, 2].clip(max=min(width, height))
        boxes[:, 0] = boxes[:, 0].clip(0, width - boxes[:, 2])
        boxes[:, 1] = boxes[:, 1].clip(0, height - boxes[:, 2])
        correlation = _patches(total, boxes, 16) @ wanted_K
        box, best = boxes[correlation.argmax()], float(correlation.max())
        if best < hopeless:
            break
    return best


_MOVES = np.array(list(product((-1, 0, 1), repeat=3)), dtype=np.float64)


def _middle(shape: tuple[int, ...]) -> np.ndarray:
    height, width = shape
    side = min(shape)
    return np.array([[(width - side) / 2, (height - side) / 2, side]])


def _windows(shape: tuple[int, ...]) -> np.ndarray:
    """Return squares (x, y, side) all over an image, at several scales."""
    boxes = []
    for scale in _SCALES:
        side = scale * min(shape)
        places = [np.linspace(0, room, min(_MAX_PLACES, 1 + round(room / (_STEP * side)))) for room in
                  (shape[1] - side, shape[0] - side)]  # fmt: skip
        boxes += [(x, y, side) for x, y in product(*places)]
    return np.array(boxes)


def _integral(image: np.ndarray) -> np.ndarray:
    """Return the sums of all values above and left of each corner, (H + 1, W + 1)."""
    return np.pad(image.astype(np.float64).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))


def _patches(total: np.ndarray, boxes: np.ndarray, side: int) -> np.ndarray:
    """Return the mean grey values of side x side cells of each box, (n, K), with mean 0 and norm 1, float32."""
    edges = np.linspace(0, 1, side + 1)
    x, y = (boxes[:, axis, None] + boxes[:, 2, None] * edges for axis in (0, 1))
    column, row = (np.clip(places.astype(int), 0, limit - 2) for places, limit in zip((x, y), total.shape[::-1]))
    right, below = (x - column)[:, None, :], (y - row)[:, :, None]
    row, column = row[:, :, None], column[:, None, :]
    above = total[row, column] * (1 - right) + total[row, column + 1] * right
    under = total[row + 1, column] * (1 - right) + total[row + 1, column + 1] * right
    corners = above * (1 - below) + under * below
    cells = np.diff(np.diff(corners, axis=1), axis=2).reshape(len(boxes), -1)
    cells -= cells.mean(axis=1, keepdims=True)
    return (cells / np.linalg.norm(cells, axis=1, keepdims=True).clip(min=1e-6)).astype(np.float32)
