"""`--train last-N` from the command to the averaged run."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import tes
from tes.errors import ConfigError
from tes.page.run_page import Findings, run_page
from tes.verbs.compare import compare

STEPPED = {
    "train": "last-1", "data.shots": 3, "optim.num_steps": 3, "optim.batch_size": 6, "optim.learning_rate": 0.01,
}  # fmt: skip


@pytest.fixture
def train(photos, with_prior, tmp_path):
    def run(out="run", **flags):
        given = {"data.source": str(photos), **with_prior, **STEPPED, "out": str(tmp_path / out)}
        return tes.train(tes.load_config(flags=given | {key.replace("__", "."): value for key, value in flags.items()}))

    return run


def moved(run, checkpoint):
    """Return the names of the backbone's tensors that training has changed."""
    before, after = load_file(checkpoint), load_file(run.path / "model.safetensors")
    names = {name.removeprefix("backbone.") for name in after if name.startswith("backbone.")}
    return {name for name in names if not torch.equal(before[name], after[f"backbone.{name}"])}


def test_a_run_ships_the_pre_trained_layers_as_they_were(train, photos, with_prior):
    run = train(objective="tes", optim__freeze_norms=False, optim__ema=0.9, optim__layer_decay=0.7)
    names = moved(run, with_prior["backbone.checkpoint"])
    assert names and all(name.startswith("layer4.1.") for name in names)
    assert "layer4.1.conv2.weight" in names and "layer4.1.bn1.running_mean" in names
    assert run.settings["train"] == run.summary["train"] == "last-1"
    assert "the last layer and the head trained" in (run.path / "README.md").read_text()
    assert "the last layer and the head" in run_page(Findings(run), [], "")
    saved = run.metrics["test"]["vision"]["nll"]
    assert tes.evaluate(run)["heads"]["vision"]["nll"] == pytest.approx(saved, abs=1e-5)
    where = {"data_source": str(photos), "checkpoint": with_prior["backbone.checkpoint"]}
    averaged = tes.average(run, out=str(run.path.with_name("averaged")), **where)
    assert moved(averaged, with_prior["backbone.checkpoint"]) <= names


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["l2_sp", "bss", "co_tuning", "bi_tuning", "text_ce", "static_text"])
@pytest.mark.parametrize("start", ["probe", "random", "probe+prior"])
def test_any_objective_and_start_train_the_last_layers(train, with_prior, objective, start):
    run = train(objective=objective, start=start)
    names = moved(run, with_prior["backbone.checkpoint"])
    assert names and all(name.startswith("layer4.1.") for name in names)


@pytest.mark.slow
def test_arms_are_compared_with_the_last_layers_trained(photos, with_prior, tmp_path):
    flags = {"data.source": str(photos), **with_prior, **STEPPED}
    del flags["data.shots"]
    comparison = compare(flags, ("ce", "tes+probe"), shots=("1",), num_seeds=1, out=str(tmp_path / "c"))
    run = comparison.run("1", 0, "tes+probe")
    assert run.summary["train"] == "last-1"
    assert all(name.startswith("layer4.1.") for name in moved(run, with_prior["backbone.checkpoint"]))


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("last-0", "write `head`"),
        ("last-x", "last-N, for example last-2"),
        ("last-9", "has 9 layers"),
        ("last-99", "has 9 layers"),
    ],
)
def test_a_number_of_layers_that_cannot_be_is_one_sentence(cli, photos, resnet, tmp_path, train, words):
    sets = [f"--set={key}={json.dumps(value)}" for key, value in resnet.items()]
    out = tmp_path / "r"
    code, _, err = cli("train", photos, "--objective", "ce", "--train", train, "--epochs", "1", "--out", out, *sets)
    assert code == 2 and words in err and not out.exists()


def test_zero_shots_leave_nothing_to_train(photos, with_prior):
    config = tes.load_config(flags={"data.source": str(photos), **with_prior, "data.shots": 0, "train": "last-1"})
    with pytest.raises(ConfigError, match="--train last-1"):
        tes.train(config)
