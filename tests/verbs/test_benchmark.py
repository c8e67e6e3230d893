"""A benchmark: every combination in one table, nothing done twice, nothing lost, and gaps named."""

from __future__ import annotations

import csv
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import miniatures
import tes
from tes.benchmark_folder import Benchmark
from tes.errors import ConfigError, RunError
from tes.verbs.benchmark import benchmark
from tes.verbs.compare import Settings


@pytest.fixture(scope="module")
def sources(photos, tmp_path_factory):
    """Three miniature data sets of known classes: a folder, a CSV with official splits, and a folder of two classes."""
    root = tmp_path_factory.mktemp("sources")
    lines = ["path,label,split"]
    for folder in sorted(photos.iterdir()):
        for number, file in enumerate(sorted(folder.iterdir())):
            split = ("train", "train", "val", "test")[number % 4]
            lines.append(f"{file},{folder.name},{split}")
    (root / "listed.csv").write_text("\n".join(lines))
    for name in ("red_square", "blue_square"):
        shutil.copytree(photos / name, root / "two" / name)
    return [str(photos), str(root / "listed.csv"), str(root / "two")]


@pytest.fixture(scope="module")
def networks(resnet, tmp_path_factory):
    """A ResNet and a ViT, each as a YAML file."""
    import timm
    import torch
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("networks")
    kwargs = {"depth": 1, "embed_dim": 12, "num_heads": 3, "img_size": 32}
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **kwargs)
    save_file({name: tensor.contiguous() for name, tensor in vit.state_dict().items()}, root / "vit.safetensors")
    settings = {
        "tiny-resnet": {key.removeprefix("backbone."): value for key, value in resnet.items() if "backbone" in key},
        "tiny-vit": {"name": "vit_tiny_patch16_224", "kwargs": kwargs, "checkpoint": str(root / "vit.safetensors")},
    }
    for name, backbone in settings.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump({"backbone": backbone, "image": {"size": 32}}))
    return [str(root / f"{name}.yaml") for name in settings]


def table(folder):
    return list(csv.DictReader((folder / "benchmark.csv").open()))


@pytest.mark.slow
def test_an_interrupted_benchmark_continues_and_ends_with_a_complete_table(networks, cli, tmp_path, monkeypatch):
    from tes.verbs import compare as room

    begun, run_job = [], room.run_job

    def interrupted(*given, **how):
        begun.append(given)
        if len(begun) == 20:
            raise KeyboardInterrupt
        return run_job(*given, **how)

    monkeypatch.setattr(room, "run_job", interrupted)
    out, tasks = tmp_path / "b", ("flowers102", "pets", "cifar10")
    for task in tasks:
        miniatures.build(task, tmp_path / "data")
    names = [label for task in tasks for label in miniatures.CLASSES[task].values()]
    rows = np.random.default_rng(0).normal(size=(len(names), 6)).astype("float32")
    np.savez(tmp_path / "rows.npz", names=np.array(names), embeddings=rows)
    command = ["benchmark", *tasks, "--data-root", tmp_path / "data", "--partial", "--backbones", ",".join(networks),
               "--texts", f"minilm,file:{tmp_path / 'rows.npz'}", "--arms", "ce,tes", "--seeds", 2, "--shots", "1",
               "--train", "head", "--out", out]  # fmt: skip
    code, _, err = cli(*command)
    assert code == 75 and "the same command goes on from here" in err
    times = {path: path.stat().st_mtime_ns for path in out.rglob("run.json")}
    assert len(times) == 19
    assert "not run yet" in (out / "benchmark.md").read_text()
    code, printed, err = cli(*command)
    assert code == 0, err
    cells = 3 * 2 * 2 * 2 * 2  # tasks, backbones, texts, arms, seeds
    assert len(begun) == cells + 1 and len(list(out.rglob("run.json"))) == cells
    assert {path: path.stat().st_mtime_ns for path in times} == times

    rows = table(out)
    assert len(rows) == 3 * 2 * 2 * 2 and {row["state"] for row in rows} == {"done"}
    for row in rows:
        comparison = out / row["comparison"]
        scored = [
            float(line["top1" if row["task"].startswith("cifar10") else "mean_per_class"])
            for line in csv.DictReader((comparison / "table.csv").open())
            if line["arm"] == row["arm"] and line["head"] == line["default_head"]
        ]
        assert len(scored) == 2 and float(row["percent"]) == pytest.approx(100 * statistics.mean(scored), abs=1e-3)
    ours = {(row["task"], row["backbone"], row["text"], row["arm"]): float(row["percent"]) for row in rows}
    assert list(dict.fromkeys(key[0] for key in ours)) == list(tasks)
    assert "pets (9 / 7349 images), mean per class" in printed and "cifar10 (33 / 60000 images), top-1" in printed
    line = next(line for line in printed.splitlines() if line.split()[:3] == ["tiny-vit", "minilm", "tes"])
    mine = {key: value for key, value in ours.items() if key[1:] == ("tiny-vit", "minilm", "tes")}
    shown = line.split()
    assert shown[3:6] == [f"{mine[task, 'tiny-vit', 'minilm', 'tes']:.1f}" for task in tasks]
    average = statistics.mean(mine.values())
    assert float(shown[6]) == pytest.approx(average, abs=0.06)
    plain = statistics.mean(value for key, value in ours.items() if key[1:] == ("tiny-vit", "minilm", "ce"))
    assert float(shown[7]) == pytest.approx(average - plain, abs=0.01)
    page = (out / "benchmark.html").read_text()
    assert "8 of" not in page and "12 of 12 done" in page and "http" not in page.replace("http-equiv", "")


@pytest.fixture
def begin(sources, networks, texts, tmp_path):
    def run(data=sources[:1], backbones=networks[:1], arms=("tes",), **how):
        how = {"num_seeds": 1, "shots": ("1",), "out": str(tmp_path / "b")} | how
        settings = Settings(how.pop("file", None), {"train": "head"})
        return benchmark(settings, data, backbones, [f"file:{texts}"], arms, **how)

    return run


def test_what_is_not_there_or_fails_is_named_and_the_others_are_kept(begin, sources, networks, tmp_path):
    made = begin([sources[0], str(tmp_path / "<b>cars"), sources[2]], ["resnetx=weights.pth", networks[0]])
    states = {(row["task"], row["backbone"], row["arm"]): row["state"] for row in table(made.path)}
    assert states == {
        (task, backbone, arm): "skipped" if "cars" in task else "failed" if "=" in backbone else "done"
        for task in ("squares", "<b>cars", "two")
        for backbone in ("resnetx=weights.pth", "tiny-resnet")
        for arm in ("ce", "tes")
    }
    text = (made.path / "benchmark.md").read_text()
    assert "There is no folder" in text and "There is no backbone `resnetx`" in text
    assert text.count("was skipped") == 1 and "average of 2" in text
    page = (made.path / "benchmark.html").read_text()
    assert "&lt;b&gt;cars" in page and "<b>cars" not in page and "There is no backbone <code>resnetx</code>" in page
    again = Benchmark.open(made.path)
    assert [one.state for one in again.combinations] == [one.state for one in made.combinations]
    with pytest.raises(RunError, match=r"is a benchmark, and its page is benchmark\.html"):
        tes.report(made.path)


def test_published_figures_stand_beside_ours_and_a_benchmark_only_grows(begin, sources, tmp_path):
    made = begin()
    empty = table(made.path)
    assert [row["published_percent"] for row in empty] == ["", ""]
    assert "| published |" in (made.path / "benchmark.md").read_text()
    filled = tmp_path / "filled.csv"
    with filled.open("w", newline="") as file:
        out = csv.DictWriter(file, empty[0])
        out.writeheader()
        out.writerows([{**row, "published_percent": "81.5" if row["arm"] == "tes" else ""} for row in empty])
    made = begin([sources[2]], published=str(filled))
    rows = {(row["task"], row["arm"]): row for row in table(made.path)}
    assert rows.keys() == {(task, arm) for task in ("squares", "two") for arm in ("ce", "tes")}
    assert rows["squares", "tes"]["published_percent"] == "81.5" and rows["two", "tes"]["published_percent"] == ""
    ours = float(rows["squares", "tes"]["percent"])
    assert f"| 81.5 | {ours - 81.5:+.1f} |" in (made.path / "benchmark.md").read_text()


@pytest.mark.slow
def test_what_a_gain_from_a_prior_is_owed_to_stands_in_the_table(photos, with_prior, tmp_path):
    given = {key: value for key, value in with_prior.items() if key not in ("backbone.name", "text.encoder")}
    made = benchmark(
        given | {"train": "head"}, [str(photos)], [with_prior["backbone.name"]], [with_prior["text.encoder"]], ("tes",),
        num_seeds=2, shots=("1", "2"), out=str(tmp_path / "b"),
    )  # fmt: skip
    rows = {(row["shots"], row["arm"]): row for row in table(made.path)}
    added = {"ce+probe+prior", "ce+probe+lookup", "ce+probe+permuted"}
    assert rows.keys() == {(shots, arm) for shots in "12" for arm in ("ce", "tes", *added)}
    assert {row["arm"] for row in rows.values() if row["is_added"] == "1"} == added
    text = (made.path / "benchmark.md").read_text()
    assert "ce\\+probe\\+prior \\*" in text and "(*) added, to tell where a gain comes from" in text
    shutil.rmtree(made.path / made.combinations[0].folder)
    assert [one.state for one in Benchmark.open(made.path).combinations] == ["waiting"]


def test_a_benchmark_has_one_writer(begin):
    made = begin()
    code = f"import pathlib, time, tes.run\nwith tes.run.exclusive(pathlib.Path({str(made.path)!r})):\n"
    code += "    print('held', flush=True)\n    time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(RunError, match="Another process is writing"):
                begin(arms=("tes", "label_smoothing"))
        finally:
            other.kill()
    assert {row["arm"] for row in table(begin().path)} == {"ce", "tes"}
    assert not (made.path / ".lock").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("task,backbone,text,arm\n", "has no line"),
        ("task,backbone,text,arm\na,b,c,d\n", "no column `published_percent`"),
        ("task,backbone,text,arm,published_percent\na,b,c,d,high\n", "line 2 of .*`high` is no figure in per cent"),
        ("task,backbone,text,arm,published_percent\na,b,c,d,0.85\n", "are fractions; write them in per cent"),
        (None, "cannot be read"),
    ],
)
def test_published_figures_that_cannot_be_read_are_one_sentence(begin, tmp_path, content, words):
    if content is not None:
        (tmp_path / "p.csv").write_text(content)
    with pytest.raises(ConfigError, match=words):
        begin(published=str(tmp_path / "p.csv"))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"arms": ("ce", "tess")}, "Did you mean `tes`"),
        ({"backbones": ["resnet18=", "x"]}, "`resnet18=` is no backbone"),
        ({"backbones": ["resnet18", "resnet18"]}, "called `resnet18` in the table"),
        ({"backbones": []}, "at least one of its --backbones"),
        ({"shots": ("none",)}, "`none` is neither"),
        ({"file": Path("own.yaml")}, "--config and the YAML file of the backbone `tiny-resnet` cannot both be read"),
    ],
)
def test_a_mistake_that_concerns_all_is_told_before_any_work(begin, tmp_path, how, words):
    with pytest.raises(ConfigError, match=words):
        begin(**how)
    assert not (tmp_path / "b").exists()


def test_where_nothing_can_be_compared_the_command_fails(begin, tmp_path):
    with pytest.raises(RunError, match=r"Nothing could be compared; .*benchmark\.md` says why: There is no folder"):
        begin([str(tmp_path / "nowhere")])


def test_a_damaged_plan_is_one_sentence(begin, tmp_path):
    folder = tmp_path / "b"
    folder.mkdir()
    (folder / "benchmark.json").write_text('{"format": 1, "arms": ["ce"], "published": [], "combinations": [1]}')
    with pytest.raises(RunError, match="is not the plan of a benchmark"):
        begin()
    outside = {"task": "a", "backbone": "b", "text": "c", "folder": "../x", "state": "done", "reason": ""}
    plan = {"format": 1, "arms": ["ce"], "published": [], "combinations": [outside]}
    (folder / "benchmark.json").write_text(json.dumps(plan))
    with pytest.raises(RunError, match="is no comparison of it"):
        Benchmark.open(folder)
