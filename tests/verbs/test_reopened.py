"""What can be done with finished runs: diagnose, average, calibrate; and what is refused when a part has changed."""

from __future__ import annotations

import csv
import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import tes
from tes.config import load_config
from tes.diagnosis import debiased_cka
from tes.errors import ModelError, RunError
from tes.predictions import Predictions
from tes.reopen import reopen
from tes.run import Run
from tes.search import choose
from tes.verbs.average import calibrated_losses


@pytest.fixture(scope="module")
def squares(tmp_path_factory, photos):
    """The three classes of `photos` and a fourth, since a geometry takes four."""
    from PIL import Image

    root = tmp_path_factory.mktemp("four") / "squares"
    shutil.copytree(photos, root)
    (root / "yellow_square").mkdir()
    for number in range(12):
        noise = np.random.default_rng(number).integers(-30, 30, size=(40, 48, 3))
        Image.fromarray((np.array((200, 200, 30)) + noise).clip(0, 255).astype("uint8")).save(
            root / "yellow_square" / f"{number:02}.png"
        )
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory, squares, texts, resnet):
    """Runs by name, trained when they are first asked for. Read-only: copy one to change it."""
    folder, runs = tmp_path_factory.mktemp("trained"), {}
    stepped = {"train": "all", "start": "random", "optim.num_steps": 3, "optim.learning_rate": 0.01}
    flags = {
        "ce-0": {"objective": "ce", **stepped},
        "ce-1": {"objective": "ce", "seed": 1, **stepped},
        "tes-0": {"objective": "tes", **stepped},
        "norms": {"objective": "tes", "optim.freeze_norms": False, **stepped},
        "solved": {"objective": "tes", "refit": "none", "objective.text_target_weight": 0.4},
        "solved-ce": {"objective": "ce", "refit": "none"},
    }

    def run(name):
        if name not in runs:
            base = {"data.source": str(squares), "text.encoder": f"file:{texts}", "out": str(folder / name), **resnet}
            base |= {"precision": "fp32", "data.shots": 5, **flags[name]}
            runs[name] = tes.train(load_config(flags=base))
        return runs[name]

    return run


@pytest.fixture
def again(squares, resnet):
    """What a caller repeats, since a run folder's word opens nothing."""
    return {"data_source": str(squares), "checkpoint": resnet["backbone.checkpoint"]}


@pytest.fixture
def flags_again(again):
    return ("--data", again["data_source"], "--checkpoint", again["checkpoint"])


@pytest.fixture
def copied(trained, tmp_path):
    def copy(name):
        return Run.open(shutil.copytree(trained(name).path, tmp_path / name))

    return copy


def test_diagnose_reports_every_run_and_every_pair_and_says_it_in_sentences(trained, flags_again, cli, tmp_path):
    runs = [trained(name) for name in ("ce-0", "ce-1", "tes-0")]
    code, out, err = cli("diagnose", *(run.path for run in runs), *flags_again, "--out", tmp_path, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert json.loads((tmp_path / "diagnosis.json").read_text()) == result
    one, other, taught = result["runs"]
    assert [pair["runs"] for pair in result["pairs"]] == [["ce-0", "ce-1"], ["ce-0", "tes-0"], ["ce-1", "tes-0"]]
    for report, run in zip(result["runs"], runs):
        assert report["accuracy"] == pytest.approx(run.metrics["test"]["vision"]["top1"])
        assert -1 <= report["cosine_start"] <= 1 and report["cosine_start"] != report["cosine_features"]
        rows_CD = load_file(runs[2].path / "text_head.safetensors")["Z"].numpy()  # the same text for all
        weight_CF = load_file(run.path / "model.safetensors")["head.weight"].numpy()
        assert report["text"]["cka"] == pytest.approx(debiased_cka(weight_CF, rows_CD), abs=1e-6)
    heads = [load_file(run.path / "model.safetensors")["head.weight"] for run in runs[:2]]
    cosine = torch.cosine_similarity(*((head - head.mean(dim=0)).flatten() for head in heads), dim=0)
    assert result["pairs"][0]["cosine"] == pytest.approx(cosine.item(), abs=1e-5)
    answers = [run.predictions("test").logits["vision"].argmax(axis=1) for run in runs[:2]]
    assert result["pairs"][0]["agreement"] == pytest.approx((answers[0] == answers[1]).mean())
    assert "W0" in one["sentence"] and "another seed" in other["sentence"] and "the claim" in taught["sentence"]
    root = ElementTree.parse(tmp_path / "diagnosis.svg").getroot()
    assert one["sentence"] in root.find("{http://www.w3.org/2000/svg}desc").text


def test_a_solved_ce_is_w0_itself_and_is_said_to_be_so_by_construction(trained, squares, cli, tmp_path):
    runs = (trained("solved-ce").path, trained("solved").path)
    code, out, _ = cli("diagnose", *runs, "--data", squares, "--out", tmp_path)
    assert code == 0 and out.count("true by construction") == 2 and "W0' is W0" in out
    (plain, taught) = json.loads((tmp_path / "diagnosis.json").read_text())["runs"]
    assert plain["cosine_start"] == pytest.approx(1, abs=1e-4) and plain["agreement"] == 1
    assert 0.5 < taught["cosine_start"] < 0.999


@pytest.mark.slow
def test_runs_of_other_classes_are_not_compared(trained, photos, texts, resnet, tmp_path):
    flags = {"data.source": str(photos), "objective": "ce", "refit": "none", "out": str(tmp_path / "three"), **resnet}
    three = tes.train(load_config(flags=flags | {"text.encoder": f"file:{texts}"}))
    result = tes.diagnose([trained("solved"), three], out=tmp_path)
    assert result["pairs"] == [] and any("other classes" in note for note in result["notes"])
    assert any("--text" in note for note in result["notes"])  # a file is not opened on the folder's word
    assert tes.diagnose([three], text_encoder=f"file:{texts}", out=tmp_path)["runs"][0]["text"] is None  # 3 classes


def test_without_its_images_a_run_is_held_against_its_text_and_what_is_left_out_is_named(trained, copied, tmp_path):
    run = copied("tes-0")
    settings = yaml.safe_load((run.path / "config.yaml").read_text())
    settings["backbone"]["name"] = "subprocess:check_output"  # nothing of it is needed
    (run.path / "config.yaml").write_text(yaml.safe_dump(settings))
    result = tes.diagnose([run.path], out=tmp_path)
    (report,) = result["runs"]
    tensors = load_file(run.path / "text_head.safetensors")
    weight_CF = load_file(run.path / "model.safetensors")["head.weight"].numpy()
    assert report["text"]["cka"] == pytest.approx(debiased_cka(weight_CF, tensors["Z"].numpy()), abs=1e-6)
    assert report["cosine_start"] is None and "without its images" in report["sentence"]
    assert any(f"--data {settings['data']['source']}" in note for note in result["notes"])
    save_file(tensors | {"Z": tensors["Z"][:2].clone()}, run.path / "text_head.safetensors")
    with pytest.raises(RunError, match="a finite row for each"):
        tes.diagnose([run.path], out=tmp_path)


def test_images_are_known_by_content_wherever_they_have_moved(trained, squares, tmp_path):
    moved = tmp_path / "moved"
    for file in squares.rglob("*.png"):
        (moved / "all").mkdir(parents=True, exist_ok=True)
        shutil.copy(file, moved / "all" / f"{file.parent.name}-{file.name}")
    (moved / "empty").mkdir()
    shutil.copy(squares / "red_square" / "00.png", moved / "empty")
    there = tes.diagnose([trained("solved")], data_source=str(moved), out=tmp_path)
    assert there["runs"] == tes.diagnose([trained("solved")], data_source=str(squares), out=tmp_path)["runs"]


def test_missing_and_changed_images_are_one_sentence(trained, squares, cli, tmp_path):
    run, other = trained("solved"), tmp_path / "other"
    shutil.copytree(squares, other)
    gone, changed = [
        row["path"] for row in csv.DictReader((run.path / "splits.csv").open()) if row["split"] == "train"
    ][:2]
    (other / gone).unlink()
    shutil.copy(squares / "blue_square" / "11.png", other / changed)
    code, out, err = cli("diagnose", run.path, "--data", other)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert "2 are not in" in err and f"{gone} (missing)" in err and f"{changed} (changed since)" in err
    assert not (run.path / "diagnosis.json").exists()


def test_images_and_weights_are_not_opened_on_the_folders_word(trained, squares, copied, again, tmp_path):
    new = str(tmp_path / "new")
    with pytest.raises(RunError, match="not opened on a run folder's word; say where they are: --data"):
        tes.average(trained("solved"), out=new)
    with pytest.raises(RunError, match=r"not opened on a run folder's word.*--checkpoint"):
        tes.diagnose([trained("ce-0")], data_source=str(squares))
    run = copied("ce-0")
    settings = yaml.safe_load((run.path / "config.yaml").read_text())
    settings["backbone"] |= {"checkpoint": None, "name": "resnet18"}
    (run.path / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(RunError, match=r"not fetched on a run folder's word.*--backbone resnet18"):
        tes.average(run.path, data_source=str(squares), out=new)
    assert not Path(new).exists()


def test_a_backbone_other_than_the_one_it_started_from_is_refused(trained, squares, resnet, tmp_path):
    data = str(squares)
    weights = load_file(resnet["backbone.checkpoint"])
    save_file(weights | {"conv1.weight": weights["conv1.weight"] * 1.01}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=r"is not the backbone that .* started from.*--checkpoint"):
        tes.diagnose([trained("ce-0")], data_source=data, checkpoint=str(tmp_path / "other.safetensors"), out=tmp_path)
    with pytest.raises(ModelError, match=r"started from cannot be loaded: There is no checkpoint"):
        tes.average(trained("ce-0"), data_source=data, checkpoint="/nowhere.pth", out=str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    shutil.copy(resnet["backbone.checkpoint"], tmp_path / "moved.safetensors")
    there = str(tmp_path / "moved.safetensors")
    assert tes.diagnose([trained("ce-0")], data_source=data, checkpoint=there, out=tmp_path)["runs"]


def test_an_own_module_is_never_imported_on_the_folders_word(copied, again):
    run = copied("ce-0")
    file = run.path / "config.yaml"
    file.write_text(file.read_text().replace("name: resnet18", "name: subprocess:check_output"))
    for verb in (lambda: tes.diagnose([run.path], **again), lambda: tes.average(run.path, **again)):
        with pytest.raises(RunError, match="not imported on a run folder's word"):
            verb()


@pytest.mark.slow
def test_an_own_module_in_python_is_repeated(squares, tmp_path):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 5, 3, stride=2)

        def forward(self, x):
            return self.conv(x).relu().mean(dim=(2, 3))

    torch.manual_seed(0)
    network = Own()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    flags = {"data.source": str(squares), "objective": "ce", "train": "all", "optim.num_steps": 2, "image.size": 32}
    config = load_config(flags=flags | {"data.shots": 5, "out": str(tmp_path / "run"), "backbone.name": "mine:Own"})
    run = tes.train(config, network=network)
    with pytest.raises(RunError, match="--backbone mine:Own"):
        tes.average(run, data_source=str(squares), out=str(tmp_path / "new"))
    repeated = {"network": network, "data_source": str(squares)}
    assert "averaged" in tes.average(run, **repeated, out=str(tmp_path / "new")).summary
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    with pytest.raises(ModelError, match="not the backbone"):
        tes.diagnose([run], network=Own(), data_source=str(squares))


def test_averaging_a_solved_head_moves_the_head_alone_and_leaves_a_whole_run(trained, squares, cli, tmp_path):
    run, out = trained("solved"), tmp_path / "new"
    code, shown, err = cli("average", run.path, "--data", squares, "--out", out)
    assert code == 0, err
    new = Run.open(out)
    averaged = new.summary["averaged"]
    assert [row["alpha"] for row in averaged["val"]] == pytest.approx(np.arange(0, 1.05, 0.1).tolist())
    assert averaged["val"][-1]["nll"] == pytest.approx(run.metrics["val"]["vision"]["nll"], abs=1e-5)
    chosen = next(row for row in averaged["val"] if row["alpha"] == averaged["alpha"])
    assert new.metrics["val"]["vision"]["nll"] == pytest.approx(chosen["nll"])
    assert new.summary["arm"] == run.summary["arm"] and str(run.path) not in (out / "run.json").read_text()
    assert {path.name for path in run.path.iterdir()} == {path.name for path in out.iterdir()}
    models = [load_file(folder / "model.safetensors") for folder in (run.path, out)]
    start = load_file(run.path / "start_head.safetensors")
    alpha = averaged["alpha"]
    assert torch.allclose(models[1]["head.weight"], alpha * models[0]["head.weight"] + (1 - alpha) * start["weight"])
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0] if name.startswith("backbone."))
    code, shown, _ = cli("evaluate", out, "--json")
    assert json.loads(shown)["heads"] == new.metrics["test"]
    for verb in (("predict", out, squares / "red_square"), ("diagnose", out), ("calibrate", out)):
        assert cli(*verb)[0] == 0


def test_averaging_all_weights_with_trained_norms_estimates_their_statistics_anew(
    trained, resnet, again, monkeypatch, tmp_path
):
    monkeypatch.setattr("tes.verbs.average.ALPHAS", (1.0, 0.5))
    monkeypatch.setattr("tes.verbs.average.choose", lambda losses: 1)
    run = trained("norms")
    new = tes.average(run, **again, out=str(tmp_path / "new"))
    assert new.summary["averaged"]["num_norm_images"] == run.summary["num_train"]
    end, middle = (load_file(folder / "model.safetensors") for folder in (run.path, new.path))
    start = load_file(resnet["backbone.checkpoint"])
    name = "layer1.0.conv1.weight"
    assert torch.allclose(middle[f"backbone.{name}"], (start[name] + end[f"backbone.{name}"]) / 2)
    ends = (start["bn1.running_mean"] + end["backbone.bn1.running_mean"]) / 2
    assert not torch.allclose(middle["backbone.bn1.running_mean"], ends, rtol=0.05)
    # Independently: the mean over all pixels of all training images of what the first layer gives.
    it = reopen(new, **again)
    images = torch.stack([_prepared(it, index) for index in it.train_indices])
    first = torch.nn.functional.conv2d(images, middle["backbone.conv1.weight"], stride=2, padding=3)
    assert torch.allclose(middle["backbone.bn1.running_mean"], first.mean(dim=(0, 2, 3)), atol=2e-3)


def _prepared(it, index):
    from tes.engine.loader import eval_transform

    pixels = eval_transform(it.learner.backbone.images)(it.dataset.read_image(int(index))).float()
    images = it.learner.backbone.images
    return (pixels / 255 - torch.tensor(images.mean).view(3, 1, 1)) / torch.tensor(images.std).view(3, 1, 1)


def test_a_model_that_is_always_right_is_not_given_up_for_one_that_is_surer():
    labels = np.zeros(12, dtype=np.int64)
    paths = [f"{i}.png" for i in range(12)]
    right = np.tile(np.log(np.float32([0.8, 0.2])), (12, 1))
    surer = np.tile(np.log(np.float32([0.995, 0.005])), (12, 1))
    surer[0] = surer[0, ::-1]
    losses = [calibrated_losses(Predictions(paths, labels, {"vision": logits})) for logits in (right, surer)]
    assert losses[0].mean() < 1e-6 < losses[1].mean() and choose(losses) == 0


def test_what_cannot_be_averaged_is_refused_and_leaves_nothing(trained, copied, again, tmp_path):
    new = tmp_path / "new"
    with pytest.raises(RunError, match="ended where it started"):
        tes.average(trained("solved-ce"), out=str(new), **again)
    changes = {"refit": ("trainval", "--refit none"), "default_head": ("text", "text head"), "num_val": (0, "no valid")}
    run = copied("solved")
    whole = (run.path / "run.json").read_text()
    for key, (value, words) in changes.items():
        (run.path / "run.json").write_text(json.dumps(json.loads(whole) | {key: value}))
        with pytest.raises(RunError, match=words):
            tes.average(run.path, out=str(new), **again)
    (run.path / "run.json").write_text(whole)
    with pytest.raises(RunError, match="choose another --out"):
        tes.average(run.path, out=str(run.path), overwrite=True, **again)
    save_file({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, run.path / "start_head.safetensors")
    with pytest.raises(RunError, match="The head in"):
        tes.average(run.path, out=str(new), **again)
    (run.path / "splits.csv").write_text("path,label\na,b\n")
    with pytest.raises(RunError, match="does not hold a run's splits"):
        tes.average(run.path, out=str(new), **again)
    assert not new.exists() and (run.path / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_cell_of_a_comparison_is_reopened_and_its_probe_solved_again(squares, texts, resnet, tmp_path):
    flags = {
        "data.source": str(squares),
        "text.encoder": f"file:{texts}",
        "train": "head",
        "precision": "fp32",
        **resnet,
    }
    comparison = tes.compare(flags, ["ce", "tes"], shots=["5"], num_seeds=1, out=str(tmp_path / "comparison"))
    cell = comparison.run("5", 0, "tes")
    alone = tes.train(load_config(flags=flags | {"objective": "tes", "data.shots": 5, "out": str(tmp_path / "run")}))
    assert not cell.file("start_head.safetensors").exists()
    saved = load_file(alone.path / "start_head.safetensors")
    assert torch.allclose(reopen(cell, data_source=str(squares)).start_head.weight_CF, saved["weight"], atol=1e-5)
    new = tes.average(cell, data_source=str(squares), out=str(tmp_path / "new"))
    assert (
        "shared" not in new.summary
        and (new.path / "splits.csv").is_file()
        and (new.path / "model.safetensors").is_file()
    )
    assert len(tes.diagnose([cell, alone], data_source=str(squares), out=tmp_path)["pairs"]) == 1
    tes.calibrate(cell)
    assert (cell.path / "calibration.json").is_file()


def test_calibrated_probabilities_come_with_the_same_labels(copied, squares, again, cli, tmp_path):
    run = copied("tes-0")
    files = sorted(squares.rglob("*.png"))[::5]
    before = list(tes.Classifier.from_run(run).predict(files))
    code, out, err = cli("calibrate", run.path, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["num_samples"] == run.summary["num_val"] and set(result["temperature"]) == {"vision", "text", "both"}
    for head, figures in result["splits"]["val"]["after"].items():
        if head != "ensemble":
            assert figures["nll"] <= result["splits"]["val"]["before"][head]["nll"] + 1e-6
            assert figures["top1"] == result["splits"]["val"]["before"][head]["top1"]
    (run.path / "calibration.json").write_text(
        json.dumps(json.loads((run.path / "calibration.json").read_text()) | {"temperature": {"vision": 2.0}})
    )
    after = list(tes.Classifier.from_run(run).predict(files))
    assert [row.label for row in before] == [row.label for row in after]
    learner = reopen(run, **again).learner
    logits = learner.heads(_features(learner, files))["vision"]
    assert [row.prob for row in after] == pytest.approx(
        (logits / 2).softmax(dim=1).max(dim=1).values.tolist(), abs=1e-4
    )
    code, out, _ = cli("evaluate", run.path, "--json")
    shown = json.loads(out)
    assert code == 0 and shown["calibrated"]["vision"]["nll"] != shown["heads"]["vision"]["nll"]
    assert "vision/T" in cli("evaluate", run.path)[1]


def _features(learner, files):
    from PIL import Image

    from tes.engine.loader import eval_transform

    images = torch.stack([eval_transform(learner.backbone.images)(Image.open(file)) for file in files])
    with torch.no_grad():
        return learner.backbone(images)


def test_calibrate_is_refused_without_validation_images_and_with_a_damaged_file(copied, cli):
    run = copied("solved")
    (run.path / "calibration.json").write_text('{"format": 1, "temperature": {"vision": 0}}')
    code, _, err = cli("evaluate", run.path)
    assert code == 2 and "calibration.json" in err
    (run.path / "predictions" / "val.npz").write_bytes(b"PK rubbish")
    assert cli("calibrate", run.path)[0] == 2
    (run.path / "predictions" / "val.npz").unlink()
    code, out, err = cli("calibrate", run.path)
    assert code == 2 and out == "" and "no validation image" in err
    assert isinstance(run.predictions("test"), Predictions) and Path(run.path / "run.json").is_file()
