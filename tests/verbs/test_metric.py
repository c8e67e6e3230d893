"""The data's own metric selects, is reported first and is what is compared; a task may ask for top-1."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest

import tes
from tes.data.folder import FolderSource
from tes.data.source import sources
from tes.page.run_page import Findings, headline
from tes.verbs.compare import compare


class Top1(FolderSource):
    """A task that is scored by top-1."""

    metric = "top1"


@pytest.fixture(scope="module", autouse=True)
def registered():
    sources.register("top1-task")(Top1)
    yield
    del sources._registered["top1-task"]


@pytest.fixture(scope="module")
def lopsided(photos, tmp_path_factory):
    """Test images that differ in number, and one class that looks like another: top-1 is not the mean per class."""
    root = tmp_path_factory.mktemp("data") / "lopsided"
    for folder, tested, pictures in (("a", 6, "red_square"), ("b", 2, "red_square"), ("c", 1, "blue_square")):
        for number in range(5 + tested):
            split = "test" if number < tested else "val" if number == tested else "train"
            (root / split / folder).mkdir(parents=True, exist_ok=True)
            shift = 0 if folder == "a" else 4
            shutil.copy(photos / pictures / f"{number + shift:02}.png", root / split / folder)
    return root


def test_a_comparison_is_in_the_tasks_metric(lopsided, resnet, texts, tmp_path):
    flags = {"data.source": f"top1-task:{lopsided}", "train": "head", **resnet}
    comparison = compare(flags, ("ce", "label_smoothing"), num_seeds=1, out=str(tmp_path / "c"))
    rows = {row["arm"]: row for row in csv.DictReader((comparison.path / "table.csv").open())}
    assert any(row["top1"] != row["mean_per_class"] for row in rows.values())
    difference = float(rows["label_smoothing"]["top1"]) - float(rows["ce"]["top1"])
    entry = comparison.summary["arms"]["label_smoothing"]
    assert comparison.summary["metric"] == "top1" and entry["effect"]["mean"] == pytest.approx(difference)
    from tes.comparison import render

    shown = render(comparison.summary)
    assert "top-1 on test" in shown and f"{100 * float(rows['ce']['top1']):.1f}" in shown
    page = tes.report(comparison).read_text()
    assert "Top-1 over shots" in page and "Mean per class" not in page


def test_a_run_records_and_reports_it_first(lopsided, resnet, cli, tmp_path):
    sets = [f"--set={key}={json.dumps(value)}" for key, value in resnet.items()]
    code, out, err = cli(
        "train", f"top1-task:{lopsided}", "--objective", "label_smoothing", "--train", "head", "--out", tmp_path / "r",
        *sets,
    )  # fmt: skip
    assert code == 0, err
    run = tes.Run.open(tmp_path / "r")
    assert run.summary["primary_metric"] == run.primary_metric == "top1"
    assert out.splitlines()[0].split()[:3] == ["split", "head", "top1"] and "points top-1" in err
    assert run.summary["against"]["metric"] == "top1"
    card = (run.path / "README.md").read_text()
    assert "| split | head | top-1 | mean per class |" in card and "metric of this data: top-1" in card
    assert f"{run.metrics['test']['vision']['top1']:.1%}".replace("%", "\u00a0% top-1") in headline(Findings(run))[0]
    assert tes.evaluate(run)["metric"] == "top1"


def test_check_names_it(lopsided, resnet, photos):
    def metric(source):
        return tes.check(tes.load_config(flags={"data.source": source, "objective": "ce", **resnet}))["metric"]

    assert metric(f"top1-task:{lopsided}") == "top1" and metric(str(photos)) == "mean_per_class"


@pytest.mark.parametrize(("metric", "kept"), [("top1", 1), ("mean_per_class", 2)])
def test_the_best_weights_are_those_that_the_metric_likes(photos, resnet, metric, kept):
    import dataclasses

    from tes import data
    from tes.engine.compute import Compute
    from tes.engine.features import FrozenFeatures
    from tes.engine.fit import Given, fit
    from tes.models.backbone import load_backbone

    config = tes.load_config(
        flags={
            "data.source": str(photos), "objective": "ce", "start": "random", "train": "all", "optim.num_steps": 3,
            "optim.learning_rate": 0.01, "optim.head_learning_rate": 0.01, "optim.freeze_norms": True, **resnet,
        }
    )  # fmt: skip
    dataset = dataclasses.replace(data.load(config.data), metric=metric)
    compute = Compute("cpu", "fp32", "contiguous", 0)
    given = Given(dataset, FrozenFeatures(load_backbone(config.backbone, config.image), dataset, compute))
    seen = []

    def score(learner, features):
        figures = [{"top1": 0.9, "mean_per_class": 0.1}, {"top1": 0.2, "mean_per_class": 0.8}, {"top1": 0.0,
                   "mean_per_class": 0.0}][len(seen)]  # fmt: skip
        seen.append(learner.head.weight.detach().numpy().copy())
        return {"vision": figures}

    fitted = fit(config, given, dataset.indices("train"), evaluate=score, evaluate_every=1, keep_best=True)
    assert len(seen) == 3 and not np.array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(fitted.learner.head.weight.detach().numpy(), seen[kept - 1])


def test_before_the_first_step_the_features_of_the_pretrained_network_are_those_of_the_learner(photos, resnet):
    from tes import data
    from tes.engine.compute import Compute
    from tes.engine.features import FrozenFeatures
    from tes.engine.fit import Given, fit
    from tes.engine.scoring import predict
    from tes.models.backbone import load_backbone

    config = tes.load_config(
        flags={
            "data.source": str(photos), "objective": "ce", "start": "probe", "train": "all", "optim.num_steps": 5,
            "optim.learning_rate": 0.01, "optim.head_learning_rate": 0.01, "optim.freeze_norms": True, **resnet,
        }
    )  # fmt: skip
    dataset = data.load(config.data)
    compute = Compute("cpu", "fp32", "contiguous", 0)
    given = Given(dataset, FrozenFeatures(load_backbone(config.backbone, config.image), dataset, compute))
    val, handed = dataset.indices("val"), []

    def score(learner, features):
        handed.append(features)
        ours = predict(learner, dataset, val).logits["vision"]
        frozen = predict(learner, dataset, val, given.features).logits["vision"]
        assert np.allclose(ours, frozen, atol=1e-5) == (len(handed) == 1), "from the first step on the network moves"
        return {"vision": {"mean_per_class": 0.5}}

    fit(config, given, dataset.indices("train"), evaluate=score, evaluate_every=1)
    assert handed == [given.features, None, None, None, None]
