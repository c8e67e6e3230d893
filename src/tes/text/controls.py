"""Controls: permutations that take the names' meaning away and leave everything else as it was."""

from __future__ import annotations

import numpy as np


def derangement(number: int, seed: int) -> np.ndarray:
    """Return a seeded permutation of 0..number-1 without a fixed point: each follows another in a drawn cycle."""
    order = np.random.default_rng(seed).permutation(number)
    follower = np.empty(number, dtype=np.int64)
    follower[order] = np.roll(order, 1)
    return follower
