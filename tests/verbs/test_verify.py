"""`tes verify`: a run holds as it was left, and not after a figure, a prediction, a weight or an image was changed."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import tes
from tes.config import load_config
from tes.predictions import Predictions
from tes.run import Run


@pytest.fixture(scope="module")
def made(tmp_path_factory, photos, texts, resnet):
    """A run whose shipped weights are those that were scored."""
    out = tmp_path_factory.mktemp("made") / "run"
    flags = {"data.source": str(photos), "text.encoder": f"file:{texts}", "out": str(out), "refit": "none", **resnet}
    return tes.train(load_config(flags=flags | {"objective": "tes", "precision": "fp32"})).path


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def judged(cli, *arguments) -> tuple[int, dict[str, bool | None]]:
    code, out, err = cli("verify", *arguments, "--json")
    assert out, err
    return code, {check["name"]: check["holds"] for check in json.loads(out)["checks"]}


def rewrite(run, change) -> None:
    """Change run.json as somebody would who also knows of the hashes."""
    from tes.files import sha256_file

    summary = change(json.loads((run / "run.json").read_text()))
    summary["files"] = {name: sha256_file(run / name) for name in summary["files"]}
    (run / "run.json").write_text(json.dumps(summary))


def test_a_run_holds_as_it_was_left(cli, run, photos):
    code, checks = judged(cli, run)
    assert code == 0 and checks.pop("predictions") is None
    assert set(checks.values()) == {True} and {"files", "test metrics", "val metrics", "splits"} <= checks.keys()
    code, checks = judged(cli, run, "--data", photos)
    assert code == 0 and set(checks.values()) == {True}
    assert {"backbone", "images", "val predictions", "test predictions"} <= checks.keys()
    code, out, _ = cli("verify", run, "--data", photos)
    assert code == 0 and "9 recomputed by the recorded model" in out and out.endswith("all that was checked holds\n")


def test_a_changed_metric_is_found(cli, run):
    def better(summary):
        summary["metrics"]["test"]["vision"]["top1"] += 0.001
        return summary

    rewrite(run, better)
    code, checks = judged(cli, run)
    assert code == 2 and [name for name, holds in checks.items() if holds is False] == ["test metrics"]
    assert "vision top1 is recorded as" in cli("verify", run)[1]


def test_a_changed_prediction_is_found_by_its_hash_its_metrics_or_the_model(cli, run, photos):
    said = Run.open(run).predictions("test")
    said.logits["vision"][0] = said.logits["vision"][0][::-1]
    said.save(run / "predictions" / "test.npz")
    code, checks = judged(cli, run)
    assert code == 2 and checks["files"] is False and checks["test metrics"] is False
    metrics = tes.evaluate(run)["heads"]
    rewrite(run, lambda summary: summary | {"metrics": summary["metrics"] | {"test": metrics}})
    from tes.metrics import write_per_class_csv
    from tes.reopen import saved_classes

    write_per_class_csv(run / "per_class_test.csv", said, saved_classes(Run.open(run)), "vision")
    code, checks = judged(cli, run)
    assert code == 0  # all that the folder says agrees; only the model knows better
    code, checks = judged(cli, run, "--data", photos)
    assert code == 2 and [name for name, holds in checks.items() if holds is False] == ["test predictions"]


@pytest.mark.parametrize("name", ["head.weight", "backbone.conv1.weight"])
def test_a_changed_weight_is_found(cli, run, photos, name):
    tensors = load_file(run / "model.safetensors")
    save_file(tensors | {name: tensors[name] * 1.1}, run / "model.safetensors")
    assert judged(cli, run)[1]["files"] is False
    rewrite(run, lambda summary: summary)
    assert judged(cli, run)[0] == 0
    code, checks = judged(cli, run, "--data", photos)
    assert code == 2 and checks["test predictions"] is False
    assert checks["backbone"] is (name == "head.weight")


def test_splits_that_say_otherwise_are_found(cli, run):
    lines = (run / "splits.csv").read_text().splitlines()
    moved = next(number for number, line in enumerate(lines) if ",test," in line)
    for other, words in (
        (lines[moved].replace(",test,", ",train,"), "num_train is recorded as"),
        (lines[moved].replace(lines[moved].split(",")[1], "another_square", 1).replace("another_square/", "x/"), "x/"),
    ):
        (run / "splits.csv").write_text("\n".join([*lines[:moved], other, *lines[moved + 1 :], ""]))
        rewrite(run, lambda summary: summary)
        code, out, _ = cli("verify", run)
        assert code == 2 and "splits: DOES NOT HOLD" in out and words in out
    (run / "splits.csv").unlink()
    assert judged(cli, run)[1]["splits"] is False


def test_changed_or_missing_images_are_found_and_moved_ones_are_not_missed(cli, run, photos, tmp_path):
    moved = shutil.copytree(photos, tmp_path / "elsewhere" / "other")
    assert judged(cli, run, "--data", moved)[0] == 0
    test = Run.open(run).predictions("test").paths[0]
    shutil.copy(moved / Run.open(run).predictions("test").paths[1], moved / test)
    code, checks = judged(cli, run, "--data", moved)
    assert code == 2 and checks["images"] is False


def test_what_cannot_be_looked_at_is_named_and_no_failure(cli, run, photos):
    rewrite(run, lambda summary: summary | {"refit": "trainval"})
    code, out, _ = cli("verify", run, "--data", photos)
    assert code == 0 and "predictions: not checked: the shipped weights were trained once more, on trainval" in out
    summary = json.loads((run / "run.json").read_text())
    del summary["files"]
    (run / "run.json").write_text(json.dumps(summary))
    assert judged(cli, run)[1]["files"] is None


def test_damage_is_a_check_that_fails_and_a_folder_that_is_no_run_a_sentence(cli, run, tmp_path):
    (run / "predictions" / "test.npz").write_bytes(b"PK")
    (run / "per_class_val.csv").write_bytes(b"\xff")
    code, checks = judged(cli, run)
    assert code == 2 and checks["test metrics"] is False and checks["val per class"] is False
    (run / "predictions" / "test.npz").unlink()
    assert judged(cli, run)[1]["test metrics"] is False
    code, out, err = cli("verify", tmp_path)
    assert code == 2 and out == "" and "not a finished run" in err
    outside = json.loads((run / "run.json").read_text()) | {"files": {"../../secret": "0"}}
    (run / "run.json").write_text(json.dumps(outside))
    assert "which is not in a run" in cli("verify", run)[1]


def test_predictions_of_other_images_than_the_splits_say_are_found(cli, run):
    said = Run.open(run).predictions("test")
    half = Predictions(said.paths[1:], said.labels[1:], {head: rows[1:] for head, rows in said.logits.items()})
    half.save(run / "predictions" / "test.npz")
    rewrite(run, lambda summary: summary | {"metrics": summary["metrics"] | {"test": tes.evaluate(run)["heads"]}})
    assert judged(cli, run)[1]["splits"] is False
    assert dataclasses.asdict(half)["paths"] == said.paths[1:] and np.array_equal(half.labels, said.labels[1:])


def test_the_environment_says_what_it_ran_on(run):
    recorded = json.loads((run / "env.json").read_text())
    assert recorded["packages"]["torch"] and recorded["processor"] and recorded["num_threads"] >= 1
    assert recorded["git"] is None or (
        len(recorded["git"]["commit"]) == 40 and recorded["git"]["changed"] in (True, False)
    )


def test_data_that_are_not_there_say_nothing_about_the_run(cli, run, tmp_path):
    code, out, err = cli("verify", run, "--data", "pets", "--data-root", tmp_path)
    assert code == 2 and not out and "are not in" in err and str(tmp_path) in err
