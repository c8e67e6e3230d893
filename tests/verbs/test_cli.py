"""The command line as a user meets it: what it prints where, and how it fails."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

import tes


@pytest.fixture
def arguments(texts, resnet):
    """Flags that make training quick: a tiny local ResNet and finished text rows."""
    kwargs = json.dumps(resnet["backbone.kwargs"])
    return [
        "--backbone", "resnet18", "--set", f"backbone.kwargs={kwargs}", "--checkpoint", resnet["backbone.checkpoint"],
        "--size", 32, "--text", f"file:{texts}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Where the first test that asks for a run leaves it, for the others to copy."""
    return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture
def run(cli, photos, arguments, trained, tmp_path):
    if not trained.exists():
        code, _, err = cli("train", photos, *arguments, "--out", trained)
        assert code == 0, err
    return shutil.copytree(trained, tmp_path / "run")


def test_help_is_quick_and_imports_nothing_heavy():
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "tes", "--help"], capture_output=True, text=True)
    seconds = time.perf_counter() - began
    assert done.returncode == 0 and "train" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert not imported & {"torch", "timm", "transformers", "torchvision", "numpy"}
    assert seconds < 10  # under a second alone; far above on a machine that does five other things


def test_train_prints_figures_on_stdout_and_says_what_to_run_next(cli, photos, arguments, tmp_path):
    code, out, err = cli("train", photos, *arguments, "--out", tmp_path / "run", "--shots", "all")
    assert code == 0
    assert "mean_per_class" in out and f"tes predict {tmp_path / 'run'}" in out
    assert "decided for you" in err and "start = probe" in err


def test_evaluate_prints_one_json_object_of_the_promised_shape(cli, run):
    code, out, _ = cli("evaluate", run, "--split", "test", "--json")
    result = json.loads(out)
    assert code == 0 and len(out.splitlines()) == 1
    assert result["split"] == "test" and result["num_samples"] == 9 and result["default_head"] == "vision"
    assert set(result["heads"]) == {"vision", "text", "both"}
    for figures in result["heads"].values():
        assert {"top1", "top5", "mean_per_class", "macro_f1", "nll", "ece"} <= figures.keys()
        assert figures["top5"] is None and 0 <= figures["top1"] <= 1
    assert result["heads"] == tes.Run.open(run).metrics["test"]


def test_evaluate_on_other_data_matches_classes_by_name(cli, run, photos, tmp_path):
    other = tmp_path / "other"
    for name in ("Red-Square", "blue_square"):
        shutil.copytree(photos / name.lower().replace("-", "_"), other / name)
    code, out, _ = cli("evaluate", run, "--data", other, "--json")
    result = json.loads(out)
    assert code == 0 and result["num_samples"] == 24 and result["heads"]["vision"]["top1"] > 0.9
    shutil.copytree(photos / "red_square", other / "purple_square")
    code, out, err = cli("evaluate", run, "--data", other, "--json")
    assert code == 2 and out == "" and "purple_square" in err
    code, out, err = cli("evaluate", run, "--data", other, "--ignore-unknown", "--json", "--out", tmp_path / "scores")
    again = json.loads(out)
    assert code == 0 and again["heads"] == result["heads"] and "Left out 12 images" in again["notes"][-1], err
    table = list(csv.DictReader((tmp_path / "scores" / "confusion.csv").open()))
    assert sum(int(row["num_images"]) for row in table) == 24
    right = sum(int(row["num_images"]) for row in table if row["label"] == row["predicted"])
    assert right / 24 == pytest.approx(again["heads"]["vision"]["top1"])
    with np.load(tmp_path / "scores" / "predictions.npz") as saved:
        assert len(saved["paths"]) == 24
    assert len(list(csv.DictReader((tmp_path / "scores" / "per_class.csv").open()))) == 3
    code, _, err = cli("evaluate", run, "--data", other, "--ignore-unknown", "--out", other / "scores")
    assert code == 2 and "among the images" in err
    code, _, err = cli("evaluate", run, "--out", photos / "red_square" / "00.png")
    assert code == 2 and "cannot be written" in err


def test_predict_from_another_folder_takes_files_and_folders(cli, run, photos, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(photos / "red_square", elsewhere / "reds")
    (elsewhere / "fake photo.jpg").write_text("not an image")
    monkeypatch.chdir(elsewhere)
    code, out, err = cli("predict", run, "reds", "fake photo.jpg")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0 and len(rows) == 13
    assert [row["label"] for row in rows[:12]].count("red_square") >= 11
    assert rows[-1]["path"] == "fake photo.jpg" and rows[-1]["label"] == "" and "not an image" in rows[-1]["reason"]
    assert "1 of 13 files could not be read" in err
    code, out, _ = cli("predict", run, "reds", "--json")
    parsed = json.loads(out)
    assert code == 0 and parsed[0]["top5"][0][0] == parsed[0]["label"]


@pytest.mark.parametrize("train", [("head",), ("all", "--epochs", 1)])
def test_text_ce_answers_with_its_text_head_everywhere(cli, photos, arguments, tmp_path, train):
    out = tmp_path / "run"
    same = ("--refit", "none", "--precision", "fp32")  # so that the saved predictions are the saved model's
    chosen = ("--objective", "text_ce", "--train", *train, *same)
    code, shown, err = cli("train", photos, *arguments, *chosen, "--out", out)
    assert code == 0, err
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("test ")] == ["text"]
    assert "answers with its `text` head" in (out / "README.md").read_text()
    for more in ((), ("--data", photos)):
        code, shown, err = cli("evaluate", out, *more, "--json")
        result = json.loads(shown)
        assert code == 0 and result["default_head"] == "text" and result["heads"].keys() == {"text"}, err
    saved = tes.Run.open(out).predictions("test")
    code, shown, err = cli("predict", out, *[photos / path for path in saved.paths], "--json")
    assert code == 0, err
    for row, expected in zip(json.loads(shown), saved.probabilities("text"), strict=True):
        assert row["prob"] == pytest.approx(expected.max(), abs=1e-4)
        assert row["label"] == tes.Run.open(out).classes[int(expected.argmax())]["class"]
    (out / "text_head.safetensors").unlink()
    code, _, err = cli("predict", out, photos)
    assert code == 2 and "ships its text head" in err


def test_text_shows_prompts_neighbours_and_a_verdict(cli, photos, texts):
    code, out, _ = cli("text", photos, "--text", f"file:{texts}", "--json")
    report = json.loads(out)
    assert code == 0 and len(report["classes"]) == 3
    code, out, _ = cli("text", photos, "--text", f"file:{texts}")
    assert code == 0 and "red square" in out


def test_check_finds_imbalance_duplicates_and_bad_images_without_training(
    cli, photos, arguments, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(photos, copy)
    (copy / "red_square" / "bad.png").write_bytes(b"")
    for path in sorted((copy / "green_square").iterdir())[2:]:
        path.unlink()
    for number in range(30):
        shutil.copy(copy / "blue_square" / "00.png", copy / "red_square" / f"copy{number}.png")
    code, out, _ = cli("check", copy, *arguments, "--json")
    result = json.loads(out)
    assert code == 0 and result["unreadable"][0]["path"] == "red_square/bad.png"
    assert result["num_classes"] == 3 and result["metric"] == "mean_per_class"
    assert any("imbalance" in warning for warning in result["warnings"])
    assert any("blue_square/00.png" in entry for group in result["duplicates"] for entry in group)
    assert result["forward"]["shape"][1] == 16
    bad, duplicates = (list(csv.DictReader((tmp_path / f"{n}.csv").open())) for n in ("bad_images", "duplicates"))
    assert bad == [{"path": "red_square/bad.png", "reason": "empty file"}]
    assert {row["kind"] for row in duplicates} >= {"identical"}
    assert any({row["label"], row["other_label"]} == {"blue_square", "red_square"} for row in duplicates)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad_images.csv", "copy", "duplicates.csv"]
    (copy / "red_square" / "bad.png").unlink()
    code, out, _ = cli("check", copy, *arguments, "--out", tmp_path)
    assert code == 0 and "`bad_images.csv` is empty now" in out.replace(f"{tmp_path}/", "")
    assert (tmp_path / "bad_images.csv").read_text() == "path,reason\n"
    (tmp_path / "duplicates.csv").write_text("my own\n")
    code, out, _ = cli("check", copy, *arguments)
    assert code == 0 and "has other content and is kept" in out
    assert (tmp_path / "duplicates.csv").read_text() == "my own\n"


def test_check_lists_all_bad_images_also_where_there_are_too_many(cli, photos, arguments, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(photos, copy)
    for number in range(9):
        (copy / "red_square" / f"bad{number}.png").write_bytes(b"no image")
    code, out, err = cli("check", copy, *arguments, "--out", tmp_path / "tables")
    assert code == 2 and out == "" and "9 of 45 images" in err and "All 9 are listed in `" in err
    assert len((tmp_path / "tables" / "bad_images.csv").read_text().splitlines()) == 10
    monkeypatch.chdir(copy)
    before = sorted(copy.rglob("*"))
    code, _, err = cli("check", ".", *arguments)
    assert code == 2 and "listed" not in err and sorted(copy.rglob("*")) == before  # not among the images


def test_list_names_the_choices(cli):
    code, out, _ = cli("list", "objectives", "--json")
    assert code == 0 and {"ce", "tes", "label_smoothing", "text_ce", "static_text", "l2_sp"} <= set(json.loads(out))
    code, out, _ = cli("list", "backbones")
    assert code == 0 and "lite0" in out.splitlines() and "resnet50" in out.splitlines()


def test_a_config_file_and_set_reach_the_run(cli, photos, arguments, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("objective: ce\nseed: 3\n")
    code, _, _ = cli("train", photos, *arguments, "--config", file, "--set", "seed=5", "--out", tmp_path / "run")
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert code == 0 and saved["seed"] == 5 and saved["objective"]["name"] == "ce"


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--backbone", "resnet81"], "Did you mean `resnet18`"),
        (["--set", "optim.batch_sise=3"], "Did you mean `batch_size`"),
        (["--shots", "30"], "30 shots"),
        (["--shots", "many"], "`data.shots`"),
        (["--objective", "tess"], "Did you mean `tes`"),
        (["--checkpoint", "/nowhere.pth"], "There is no checkpoint"),
        (["--classes", "/nowhere.json"], "nowhere.json"),
        (["--text", "file:/nowhere.npz"], "nowhere.npz"),
        (["--text", "word2vec"], "text encoder"),
        (["--device", "cuda"], "no `cuda`"),
        (["--nonsense"], "No such option"),
    ],
)
def test_bad_input_is_one_sentence_exit_code_2_and_nothing_half_written(
    cli, photos, arguments, tmp_path, monkeypatch, extra, words
):
    import torch

    if extra == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("train", photos, *arguments, *extra)
    assert code == 2 and out == ""
    message = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(message) == 1 and words in message[0]
    assert "Traceback" not in err and not list(tmp_path.iterdir())


def test_bad_folders_are_one_sentence(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo").mkdir()
    for data, words in (("photos", "Did you mean `photo`"), ("photo", "class")):
        code, _, err = cli("train", data)
        assert code == 2 and words in err
    (tmp_path / "photo" / "only").mkdir()
    code, _, err = cli("train", "photo")
    assert code == 2 and "only" in err


def test_a_cell_with_several_labels_is_refused(cli, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [(f"{label}/{number:02}.png", label) for label in ("red_square", "blue_square") for number in range(4)]
    lines = [
        "path,label",
        *(f"{photos}/{path},{label}" for path, label in rows),
        f'{photos}/x.png,"red_square;blue_square"',
    ]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    code, _, err = cli("train", "t.csv")
    assert code == 2 and "several labels" in err


def test_a_damaged_run_folder_is_one_sentence(cli, run):
    (run / "predictions" / "test.npz").write_bytes(b"PK rubbish")
    code, _, err = cli("evaluate", run)
    assert code == 2 and "test.npz" in err
    (run / "run.json").unlink()
    code, _, err = cli("evaluate", run)
    assert code == 2 and "not a finished run" in err


def test_pickled_predictions_are_refused_and_not_executed(cli, run, tmp_path):
    proof = tmp_path / "proof"

    class Evil:
        def __reduce__(self):
            import os

            return os.system, (f"touch {proof}",)

    rows = {"paths": np.array(["a"]), "labels": np.array([0]), "logits_vision": np.array([Evil()], dtype=object)}
    np.savez(run / "predictions" / "test.npz", **rows)
    code, _, err = cli("evaluate", run)
    assert code == 2 and "test.npz" in err and not proof.exists()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("preprocess.json", lambda values: []),
        ("preprocess.json", lambda values: values | {"size": None}),
        ("preprocess.json", lambda values: values | {"crop_fraction": 1e-9}),
        ("classes.json", lambda values: values | {"classes": {}}),
        ("config.yaml", lambda values: values | {"backbone": "resnet18"}),
        ("config.yaml", lambda values: values | {"backbone": {"name": "resnet18", "kwargs": [1]}}),
        ("config.yaml", lambda values: values | {"backbone": {"name": "resnet18", "kwargs": {"act_layer": "no"}}}),
        ("config.yaml", lambda values: values | {"backbone": {"name": "resnet18", "kwargs": {"checkpoint_path": "x"}}}),
    ],
)
def test_an_altered_run_folder_is_one_sentence(cli, run, photos, name, change):
    file = run / name
    file.write_text(json.dumps(change(yaml.safe_load(file.read_text()))))  # JSON is YAML
    code, out, err = cli("predict", run, photos / "red_square" / "00.png", "--json")
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: ")


@pytest.mark.parametrize("bias", [np.zeros(1), np.zeros(5), np.full(3, np.nan)])
def test_a_head_that_cannot_be_is_refused(cli, run, photos, bias):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(run / "model.safetensors")
    save_file(tensors | {"head.bias": bias.astype("float32")}, run / "model.safetensors")
    code, out, err = cli("predict", run, photos / "red_square" / "00.png", "--json")
    assert code == 2 and out == "" and "The head in" in err


def test_a_file_name_that_is_not_utf8_is_a_row_like_any_other(cli, run, photos, tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    try:
        shutil.copy(photos / "red_square" / "00.png", os.fsencode(folder) + b"/\xff.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    code, out, _ = cli("predict", run, folder, "--json")
    assert code == 0 and os.fsencode(json.loads(out)[0]["path"]).endswith(b"/\xff.png")
    assert cli("predict", run, folder)[0] == 0


def test_ctrl_c_says_so(cli, photos, arguments, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("tes.verbs.train.train", interrupted)
    code, out, err = cli("train", photos, *arguments)
    assert (code, out, err) == (130, "", "interrupted\n")


def test_too_little_memory_is_no_bug_of_ours(cli, monkeypatch):
    import torch

    monkeypatch.setattr("tes.catalogue.available", lambda kind: torch.empty(10**15))  # PyTorch's own words for it
    code, _, err = cli("list", "objectives")
    assert code == 2 and "not enough memory" in err and "optim.batch_size" in err and err.count("\n") == 1
