"""Tasks by name through the verbs, on miniatures; and one of them for real where its photos are at hand."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import yaml

import tes
from miniatures import CLASSES
from tes.data.task import load_task
from tes.metrics import METRICS
from tes.text.encoder import TextEncoder, encoders


@encoders.register("vowels")
class Vowels(TextEncoder):
    """Embeds a sentence by its vowels: no network to load."""

    def __init__(self, identifier, config):
        super().__init__(identifier, config)
        self.spec = self.fingerprint = "vowels"

    def encode(self, sentences):
        return np.array([[sentence.count(letter) + 1 for letter in "aeiou"] for sentence in sentences], np.float32)


@pytest.fixture
def arguments(resnet) -> list[str]:
    """Flags of a backbone that is small enough for a test."""
    kwargs = json.dumps(resnet["backbone.kwargs"])
    return [
        *("--backbone", resnet["backbone.name"], "--checkpoint", resnet["backbone.checkpoint"]),
        *("--set", f"backbone.kwargs={kwargs}", "--size", "32", "--text", "vowels"),
    ]


def test_the_tasks_are_listed(cli):
    code, out, _ = cli("list", "tasks")
    assert code == 0
    assert "cub200       200 classes  top1            5994 train / 5794 test" in out.splitlines()
    code, out, _ = cli("list", "tasks", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert len(rows) == 11
    assert rows["flowers102"] == {
        "name": "flowers102",
        "num_classes": 102,
        "metric": "mean_per_class",
        "splits": {"train": 1020, "val": 1020, "test": 6149},
    }
    assert tes.available("tasks") == list(rows)


def test_check_prints_metric_counts_and_names_with_prompts(cli, miniature, arguments):
    root = miniature("cars")
    code, out, err = cli("check", "cars", "--data-root", root, "--partial", *arguments)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "cars (9 / 16185 images): 3 classes, 3 train, 3 val, 3 test images; metric: top-1"
    assert "found / official: 3 / 196 classes, 6 / 8144 train, 3 / 8041 test" in lines
    name = "2012 Ram C/V Cargo Van Minivan"
    assert f"  Ram C/V Cargo Van Minivan 2012 → {name}: a photo of a {name}." in lines
    assert any("text.templates = ['a photo of a {}.']  (the task's own)" in line for line in lines)
    code, out, err = cli("check", "cars", "--data-root", root, "--partial", "--json", *arguments)
    found = json.loads(out)
    assert (found["metric"], found["official"]["train"]) == ("top1", [6, 8144])


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_check_of_every_task_says_metric_classes_and_splits(name, cli, miniature, arguments):
    code, out, err = cli("check", name, "--data-root", miniature(name), "--partial", *arguments)
    assert code == 0, err
    task, lines = load_task(name), out.splitlines()
    assert lines[0].startswith(f"{name} (") and ": 3 classes, " in lines[0]
    assert lines[0].endswith(f"metric: {METRICS[task.metric]}")
    (official,) = [line for line in lines if line.startswith("found / official: ")]
    assert f"3 / {task.num_classes} classes" in official
    assert all(f" / {number} {split}" in official for split, number in task.splits.items())
    prompts = [task.templates.single.replace("{}", task.classes[label]) for label in CLASSES[name].values()]
    assert all(any(line.endswith(f": {prompt}") for line in lines) for prompt in prompts)


def test_a_task_whose_data_are_not_there_is_one_sentence(cli, tmp_path):
    code, out, err = cli("train", "flowers102", "--data-root", tmp_path)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/" in err and "--data-root" in err


def test_cifar_is_cut_at_its_own_size_before_it_is_enlarged(miniature, resnet, cli, arguments):
    root = miniature("cifar10")
    command = ["train", "cifar10", "--data-root", root, "--partial", "--objective", "ce", "--train", "all", "--dry-run"]
    code, out, err = cli(*command, *arguments)
    assert code == 0 and "augment.crop_size = 32  (the task's own)" in err, err
    code, out, err = cli(*command, *arguments, "--set", "augment.policy=resized_crop")
    assert code == 0 and "crop_size: null" in out, err


def test_a_task_is_trained_on_evaluated_and_reported(cli, tmp_path, monkeypatch, arguments, miniature):
    monkeypatch.chdir(tmp_path)
    root = miniature("caltech101")
    flags = ["--data-root", root, "--partial"]
    code, out, err = cli("train", "caltech101", *flags, "--objective", "ce", *arguments)
    assert code == 0, err
    assert "caltech101 (93 / 8677 images): 3 classes" in err
    assert f"tes compare caltech101 --arms ce,tes --seeds 10 --data-root {root}" in out and "--partial" in out
    run = tmp_path / "runs/caltech101-ce-1"
    summary = json.loads((run / "run.json").read_text())
    assert summary["data"] == "caltech101 (93 / 8677 images)"
    assert [row["class"] for row in json.loads((run / "classes.json").read_text())["classes"]] == [
        "Faces", "accordion", "water_lilly"
    ]  # fmt: skip
    code, out, err = cli("evaluate", run, "--data", "caltech101", *flags, "--json")
    assert (code, json.loads(out)["num_samples"]) == (0, 93), err
    assert any("Scored all splits" in note for note in json.loads(out)["notes"])
    code, _, err = cli("evaluate", run, "--data", "caltech101", "--data-root", root)
    assert code == 2 and "--partial" in err
    code, out, err = cli("verify", run, "--data", "caltech101", "--data-root", root)
    assert code == 0 and "images: holds: all 93 are in `caltech101`" in out, out + err
    code, _, err = cli("report", run)
    assert code == 0, err
    with (run / "doubts.csv").open() as file:
        first = next(csv.DictReader(file))
    assert first["path"].startswith(str(root / "caltech101/101_ObjectCategories"))
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"]["root"] = ["no", "path"]
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert cli("report", run)[0] == 0  # without a table of doubts
    code, _, err = cli("verify", run, "--data", "caltech101", "--data-root", root)
    assert code == 2 and "`data.root`" in err, err


@pytest.mark.slow
def test_a_comparison_marks_what_is_not_the_whole_task(cli, tmp_path, monkeypatch, arguments, miniature):
    monkeypatch.chdir(tmp_path)
    flags = ["--data-root", miniature("cifar10"), "--partial", "--arms", "ce,label_smoothing", "--seeds", 1]
    code, out, err = cli("compare", "cifar10", *flags, "--train", "head", *arguments)
    assert code == 0, err
    with (tmp_path / "runs/cifar10-compare/table.csv").open() as file:
        assert {row["dataset"] for row in csv.DictReader(file)} == {"cifar10 (33 / 60000 images)"}
    assert "33 / 60000" in out


def test_the_ensemble_is_taken_on_request_and_refused_where_there_is_none(cli, photos):
    flags = ["--names-only", "--json", "--text", "vowels"]  # for names, the data need not be there
    code, out, err = cli("text", "dtd", *flags, "--set", "text.templates=ensemble")
    assert code == 0, err
    prompts = json.loads(out)["classes"][0]["prompts"]
    assert prompts == [template.replace("{}", "banded") for template in load_task("dtd").templates.ensemble]
    code, out, _ = cli("text", "dtd", *flags)
    assert json.loads(out)["classes"][0]["prompts"] == ["banded texture."]
    code, _, err = cli("text", photos, "--names-only", "--set", "text.templates=ensemble")
    assert code == 2 and "these data are no task" in err


def test_published_descriptions_serve_the_real_flowers_without_a_change(shared, cli):
    texts = shared / "text/cupl/flower_prompts_full.json"
    flags = ["--classes", texts, "--names-only", "--json", "--text", "vowels"]
    code, out, err = cli("text", "flowers102", *flags)
    assert code == 0, err
    prompts = {row["class"]: row["prompts"] for row in json.loads(out)["classes"]}
    assert prompts["ball moss"][0] == "ball moss: " + json.loads(texts.read_text())["air plant"][0]


def test_a_task_that_is_not_there_is_to_be_fetched_to_where_it_was_looked_for(cli, tmp_path):
    code, _, err = cli("check", "pets", "--data-root", tmp_path)
    assert code == 2 and f"`tes download pets --data-root {tmp_path}`" in err


@pytest.mark.parametrize(
    ("flags", "given", "proposed"),
    [
        ({"image.size": 64}, ["backbone.source_classes=imagenet1k", "out=elsewhere", "seed=3"],
         "ce,tes --seeds 10 --size 64 --set backbone.source_classes=imagenet1k"),
        ({"optim.batch_size": 8, "precision": "fp32", "data.shots": 4}, ["optim.num_epochs=2"],
         "ce,tes --seeds 10 --shots 4 --batch-size 8 --epochs 2.0 --precision fp32 --set optim.num_epochs=2"),
        ({"objective": "tes@paper", "data.only_classes": ["a b", "c"]}, ["objective.temperature=0.2"],
         "ce,tes@paper --seeds 10 --only-classes 'a b,c' --set objective.temperature=0.2"),
        ({"objective": "tes", "data.only_classes": ["Ford F-150, 2012", "c"]}, [],
         "ce,tes --seeds 10 --only-classes '\"Ford F-150, 2012\",c'"),
        ({"objective": "label_smoothing"}, ["objective.smoothing=0.2"], "ce,tes --seeds 10"),
        ({}, ["objective.name=tes", "objective.preset=paper"], "ce,tes@paper --seeds 10"),
    ],
)  # fmt: skip
def test_the_comparison_that_is_proposed_has_the_training_s_settings(flags, given, proposed):
    from tes.cli import _comparison
    from tes.config import load_config

    settings = load_config(flags={"data.source": "photos", **flags}, assignments=given)
    assert _comparison(settings, None, given) == f"tes compare photos --arms {proposed}"
