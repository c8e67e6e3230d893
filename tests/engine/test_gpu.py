"""On a real NVIDIA GPU: the same figures as on a CPU, runs that open without one, an end to memory in one sentence."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import tes
from tes.engine.solve import HeadProblem
from tes.objectives import objectives
from tes.run import Run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and there is none here")


@pytest.fixture
def train(photos, with_prior, tmp_path):
    """Train the small ResNet, with its text prior where that is asked for, and return the run."""

    def run(name: str, device: str = "cuda", **flags) -> Run:
        base = {"data.source": str(photos), "device": device, "out": str(tmp_path / name), "train": "all"}
        base |= {"optim.num_steps": 12, "optim.batch_size": 8, "num_workers": 0} | with_prior
        dotted = {key.replace("__", "."): value for key, value in flags.items()}
        return tes.train(tes.load_config(flags=base | dotted), against=False)

    return run


def losses(run: Run) -> list[float]:
    rows = map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def logits(run: Run, split: str = "test") -> np.ndarray:
    return np.load(run.path / "predictions" / f"{split}.npz")["logits_vision"]


def test_a_solved_head_is_the_cpus():
    draw = torch.Generator().manual_seed(0)
    features_NF = torch.randn(200, 32, generator=draw)
    target_NC = torch.eye(7)[torch.arange(200) % 7]
    ours, its = (HeadProblem(0.1, device=device).solve(features_NF, target_NC).head for device in ("cuda", "cpu"))
    assert torch.allclose(ours.weight_CF.cpu(), its.weight_CF, rtol=1e-4, atol=1e-5)
    assert torch.allclose(ours.bias_C.cpu(), its.bias_C, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arm", [{"objective": "ce"}, {"objective": "tes"}, {"objective": "tes", "train": "head"}])
def test_a_training_in_float32_goes_the_cpus_way(arm, train, monkeypatch):
    # TF32, which a GPU's float32 convolutions use by default, keeps ten bits: the two would drift apart.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    flags = {"precision": "fp32", "optim__name": "sgd"} | arm
    flags |= {} if "train" in arm else {"optim__learning_rate": 1e-3}
    ours, its = train("gpu", **flags), train("cpu", "cpu", **flags)
    assert ours.settings["device"] == "cuda" and its.settings["device"] == "cpu"
    if "train" not in arm:
        assert len(losses(ours)) >= 2
    assert losses(ours) == pytest.approx(losses(its), rel=0.02)
    assert logits(ours) == pytest.approx(logits(its), rel=0.02, abs=0.02)


@pytest.mark.parametrize("name", objectives.names())
def test_every_objective_trains_with_the_default_arithmetic(name, train):
    run = train(name, objective=name)
    assert run.settings["precision"] == "bf16"
    assert losses(run) and all(np.isfinite(losses(run)))
    for head in run.metrics["test"].values():
        assert head["mean_per_class"] > 0.6  # of three classes that any network tells apart


@pytest.mark.parametrize(
    "option",
    [
        {"augment__mixup": 0.2, "augment__cutmix": 1.0},
        {"optim__ema": 0.9},
        {"optim__layer_decay": 0.7},
        {"optim__accumulate": 2},
        {"optim__class_weights": "balanced"},
        {"optim__sampling": "balanced"},
        {"train": "last-1"},
        {"num_workers": 2},
        {"start": "random"},
        {"memory_format": "contiguous"},
    ],
    ids=str,
)
def test_every_option_of_a_step_works(option, train):
    assert np.isfinite(logits(train("run", objective="tes", **option))).all()


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0.02), ("bf16", 0.1)])
def test_what_a_gpu_trained_is_opened_where_there_is_none(precision, tolerance, train, photos):
    run = train("run", precision=precision, objective="tes")
    blind = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tes", "predict", str(run.path), str(photos)]
    done = subprocess.run(command, env=blind, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert len(rows) == 36
    probs = {row.path: row for row in tes.Classifier.from_run(run).predict([row["path"] for row in rows])}
    for row in rows:
        ours = probs[row["path"]]
        assert float(row["prob"]) == pytest.approx(ours.prob, abs=tolerance)
        (_, first), (_, second), *_ = ours.top5
        assert row["label"] == ours.label or first - second < 2 * tolerance, "but where two classes are nearly level"


def test_the_same_training_twice_leaves_the_same_weights(train):
    flags = {"objective": "tes", "precision": "bf16"}
    first, second = train("first", **flags), train("second", **flags)
    assert (first.path / "model.safetensors").read_bytes() == (second.path / "model.safetensors").read_bytes()


def test_an_end_to_memory_is_said_in_one_sentence(photos, with_prior, tmp_path, cli):
    words = [f"{key}={json.dumps(value) if isinstance(value, dict) else value}" for key, value in with_prior.items()]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        code, _, err = cli(
            "train", photos, "--device", "cuda", "--train", "all", "--out", tmp_path / "run", "--size", "512",
            *[part for word in words if not word.startswith("image.size") for part in ("--set", word)],
        )  # fmt: skip
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert code == 2 and "not enough memory" in err and "optim.batch_size" in err
    assert "Traceback" not in err


def test_a_comparison_trains_its_cells(photos, with_prior, tmp_path):
    from tes.verbs.compare import Settings, compare

    flags = with_prior | {"data.source": str(photos), "device": "cuda", "optim.num_steps": 4, "train": "all"}
    comparison = compare(
        Settings(flags=flags), ["ce", "tes"], shots=["2"], num_seeds=2, controls=False, out=str(tmp_path / "compared")
    )
    assert set(comparison.summary["arms"]) == {"ce", "tes"}
