"""How often the interval over images calls two equally good arms different: the 95 % interval should in 5 % of cases.

One cell, all of its images; in the last cases ten seeds that scored some of 20 classes of 9 images each.

    python benchmarks/coverage.py [--repeats 1000] [--seed 0]

Each image has a chance of its own to be answered rightly, the same for both arms, from Beta(2, 2).
"""

from __future__ import annotations

import argparse

import numpy as np

from tes.statistics import Answers, bootstrap_images

CASES = {
    "100 classes of 2": [2] * 100,
    "20 classes of 2": [2] * 20,
    "10 classes of 2": [2] * 10,
    "100 classes of 4": [4] * 100,
    "5 classes of 4": [4] * 5,
    "40 classes of 1, 10 of 2": [1] * 40 + [2] * 10,
    "20 classes of 1, one of 2": [1] * 20 + [2],
    "one class of 1, 5 of 20": [1] + [20] * 5,
    "10 classes of 20": [20] * 10,
    "2 classes of 10": [10] * 2,
    "1 of 9, from 10 seeds": [9] * 20,
    "2 of 9, from 10 seeds": [9] * 20,
    "4 of 9, from 10 seeds": [9] * 20,
}
SCORED = {"1 of 9, from 10 seeds": 1, "2 of 9, from 10 seeds": 2, "4 of 9, from 10 seeds": 4}


def _some(rng: np.random.Generator, sizes: list[int], number: int) -> np.ndarray:
    """Return which images a seed scores: `number` of each class."""
    starts = np.cumsum([0, *sizes[:-1]])
    return np.concatenate(
        [start + rng.choice(size, number, replace=False) for start, size in zip(starts, sizes, strict=True)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    print("| scored images | called different, % |\n|---|---|")
    for name, sizes in CASES.items():
        labels = np.repeat(np.arange(len(sizes)), sizes)
        paths = [str(index) for index in range(len(labels))]
        wrong = 0
        for _ in range(arguments.repeats):
            chance = rng.beta(2, 2, len(labels))
            arms = [rng.random(len(labels)) < chance for _ in range(2)]
            parts = [np.arange(len(labels))]
            if (num_scored := SCORED.get(name)) is not None:
                parts = [_some(rng, sizes, num_scored) for _ in range(10)]
            cells = [
                tuple(Answers([paths[i] for i in part], labels[part], arm[part]) for arm in arms) for part in parts
            ]
            interval = bootstrap_images(cells, num_resamples=1000)
            assert interval is not None, "every case has images enough"
            wrong += interval[0] > 0 or interval[1] < 0
        print(f"| {name} | {100 * wrong / arguments.repeats:.1f} |", flush=True)


if __name__ == "__main__":
    main()
