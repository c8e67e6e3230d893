"""What the benchmarks that take hours share: every training that ends leaves a row, whatever becomes of the others."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_training_that_fails_takes_no_others_row_with_it(photos, resnet, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    trainings = importlib.import_module("trainings")

    def training(seed: int, **flags) -> trainings.Training:
        own = {"data.source": str(photos), "objective": "ce", "train": "head", "seed": seed, "refit": "none"}
        return trainings.Training({"data": "photos", "arm": "ce", "seed": seed}, resnet | own | flags)

    record = trainings.Record(tmp_path / "record.jsonl")
    wanted = [training(0), training(1, **{"data.source": str(tmp_path / "none")}), training(2), training(3)]
    with pytest.raises(Exception, match="none"):
        record.do(wanted, num_processes=2)
    rows = list(map(json.loads, record.path.read_text().splitlines()))
    assert sorted(row["seed"] for row in rows) == [0, 2, 3]

    before = record.path.read_text()
    record.do([wanted[0], *wanted[2:]], num_processes=2)
    assert record.path.read_text() == before, "what has a row is not done again"

    capsys.readouterr()
    record.print_table("photos", {"ce": wanted[2:], "the same": wanted[2:]})
    table = capsys.readouterr().out
    assert "+0.0 (+0.0 to +0.0) | 0 of 2 |" in table and "Not all on one kind of machine" not in table
