"""Readers of files that people hand over, under random damage."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[1] / "benchmarks" / "fuzz.py"


@pytest.mark.parametrize("num_inputs", [240, pytest.param(12_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_a_damaged_file_is_read_or_refused_in_a_sentence(num_inputs):
    counts, failures = runpy.run_path(str(FUZZ))["fuzz"](num_inputs, seed=0)
    assert failures == []
    assert sum(sum(count.values()) for count in counts.values()) == num_inputs
    assert all(count["refused"] for count in counts.values())
