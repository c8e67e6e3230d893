"""How often the interval over images calls two equally good arms different: the 95 % interval should in 5 % of cases.

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
}


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
            arm, ce = (Answers(paths, labels, rng.random(len(labels)) < chance) for _ in range(2))
            interval = bootstrap_images([(arm, ce)], num_resamples=1000)
            assert interval is not None, "every case has images enough"
            wrong += interval[0] > 0 or interval[1] < 0
        print(f"| {name} | {100 * wrong / arguments.repeats:.1f} |", flush=True)


if __name__ == "__main__":
    main()
