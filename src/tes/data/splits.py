"""Which image is trained on, which one chooses and which one is only scored. Pure functions; order does not matter.

Everything is decided by hashes of the images' content, so that neither file names nor a shuffled CSV move anything,
and one more photo moves at most two others. Identical images, and rows of one `group`, are one unit: never on both
sides of a boundary that is drawn here.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from tes.errors import DataError, listing

TEST_SHARE = 0.25
VAL_SHARE = 0.10
MAX_VAL_SHOTS = 4


def find_units(sha1s: Sequence[str], groups: Sequence[str | None]) -> np.ndarray:
    """Return for every image the index of the first image of its unit: joined by equal content or equal group."""
    parent = list(range(len(sha1s)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[tuple[str, str], int] = {}
    for index, (sha1, group) in enumerate(zip(sha1s, groups)):
        for key in (("content", sha1), *([("group", group)] if group else [])):
            other = first.setdefault(key, index)
            a, b = root(index), root(other)
            parent[max(a, b)] = min(a, b)
    return np.array([root(index) for index in range(len(parent))], dtype=np.int64)


def carve(
    labels: Sequence[str],
    sha1s: Sequence[str],
    groups: Sequence[str | None],
    split_seed: int,
    *,
    test: bool = True,
    val: bool = True,
) -> np.ndarray:
    """Divide images into train, val and test.

    Of each class 25 % go to test, at least one and at most half; then 10 % of the rest to val, likewise. A class of
    one stays in train. A unit is ranked once, in the class that most of its images have; one that would take more than
    half of any class is passed over, so a quota can be off by a unit, but no class leaves train.

    Args:
        labels: Of the images to divide.
        sha1s: Their content.
        groups: Their groups, or None.
        split_seed: Fixes the outcome.
        test: Carve a test part.
        val: Carve a val part.

    Returns:
        "train", "val" or "test" for every image.
    """
    queues = _ranked_units(labels, sha1s, groups, split_seed)
    splits = np.full(len(labels), "train", dtype="<U6")
    left = Counter(labels)
    for wanted, name, share in ((test, "test", TEST_SHARE), (val, "val", VAL_SHARE)):
        if not wanted:
            continue
        taken: Counter[str] = Counter()
        for label, queue in queues.items():
            quota = min(max(int(share * left[label] + 0.5), 1), left[label] // 2)
            passed_over = []
            for unit in queue:
                added = Counter(labels[index] for index in unit)
                fits = all(taken[other] + number <= left[other] // 2 for other, number in added.items())
                if fits and taken[label] < quota:
                    splits[unit] = name
                    taken += added
                else:
                    passed_over.append(unit)
            queues[label] = passed_over
        left -= taken
    return splits


def _ranked_units(
    labels: Sequence[str], sha1s: Sequence[str], groups: Sequence[str | None], split_seed: int
) -> dict[str, list[list[int]]]:
    """Return the units that each class ranks, by rank, each the list of its images."""
    units: dict[int, list[int]] = defaultdict(list)
    for index, unit in enumerate(find_units(sha1s, groups).tolist()):
        units[unit].append(index)
    ranked: dict[str, list[tuple[str, list[int]]]] = defaultdict(list)
    for indices in units.values():
        owner = min(Counter(labels[index] for index in indices).items(), key=lambda item: (-item[1], item[0]))[0]
        # A group goes by its name, not its content, so that one more photo of a group leaves the group where it is.
        named = [f"group {group}" for index in indices if (group := groups[index])]
        key = min(named or [sha1s[index] for index in indices])
        ranked[owner].append((_rank(split_seed, key), indices))
    return {label: [indices for _, indices in sorted(ranked[label])] for label in sorted(ranked)}


def draw_shots(
    labels: Sequence[str],
    sha1s: Sequence[str],
    groups: Sequence[str | None],
    splits: np.ndarray,
    num_shots: int,
    seed: int,
) -> np.ndarray:
    """Draw k images per class for train and min(k, 4) further ones for val from train + val; the rest is unused.

    The draw is nested: k shots are among 2k. No unit is in both parts, and a class's copies of one image come last.

    Raises:
        DataError: A class has fewer than k.
    """
    units = find_units(sha1s, groups)
    queues = _queues(labels, sha1s, units, np.isin(splits, ("train", "val")), seed)
    short = {label: len(queue) for label, queue in queues.items() if len(queue) < num_shots}
    short |= {label: 0 for label in set(labels) - queues.keys()}
    if short:
        named = listing([f"`{label}` has {count}" for label, count in sorted(short.items())])
        raise DataError(
            f"{num_shots} shots need {num_shots} training images in every class, but {named}; lower --shots, or leave"
            " small classes out with --set data.min_images=N."
        )
    drawn = np.where(splits == "test", "test", "unused").astype("<U6")
    for queue in queues.values():
        drawn[queue[:num_shots]] = "train"
    trained = set(units[drawn == "train"].tolist())
    for queue in queues.values():
        further = [index for index in queue[num_shots:] if int(units[index]) not in trained]
        drawn[further[: min(num_shots, MAX_VAL_SHOTS)]] = "val"
    return drawn


def draw_fraction(
    labels: Sequence[str],
    sha1s: Sequence[str],
    groups: Sequence[str | None],
    splits: np.ndarray,
    fraction: float,
    seed: int,
) -> np.ndarray:
    """Keep a share of each class's training images, at least one; val and test stay, the rest is unused."""
    units = find_units(sha1s, groups)
    drawn = splits.copy()
    for queue in _queues(labels, sha1s, units, splits == "train", seed).values():
        drawn[queue[max(1, int(fraction * len(queue) + 0.5)) :]] = "unused"
    return drawn


def _queues(
    labels: Sequence[str], sha1s: Sequence[str], units: np.ndarray, pool: np.ndarray, seed: int
) -> dict[str, list[int]]:
    """Return every class's images of the pool in the seed's order; further images of a unit behind all first ones."""
    queues: dict[str, list[int]] = defaultdict(list)
    for index in np.flatnonzero(pool).tolist():
        queues[labels[index]].append(index)
    for label, queue in queues.items():
        queue.sort(key=lambda index: _rank(f"shots {seed}", sha1s[index]))
        seen: set[int] = set()
        first, further = [], []
        for index in queue:
            (further if int(units[index]) in seen else first).append(index)
            seen.add(int(units[index]))
        queues[label] = first + further
    return queues


def _rank(seed: int | str, key: str) -> str:
    return hashlib.sha256(f"{seed}:{key}".encode()).hexdigest()
