"""The text prior through the public interface: when it is used, what it writes, and when it is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tes
from tes.config import load_config
from tes.errors import ConfigError
from tes.statistics import standard_error


@pytest.fixture
def settings(photos, with_prior, tmp_path):
    def make(**flags):
        base = {"data.source": str(photos), "out": str(tmp_path / "run"), **with_prior}
        return load_config(flags=base | {key.replace("__", "."): value for key, value in flags.items()})

    return make


def test_auto_is_the_text_prior_where_it_is_possible_and_the_run_tells_of_it(settings):
    run = tes.train(settings(objective="tes", data__shots=1))
    assert run.summary["start"] == "probe+prior" and run.summary["prior"]["form"] in ("joint", "per_class")
    for row in run.classes:
        assert row["source"]["name"].startswith("thing ") and -1 <= row["source"]["cosine"] <= 1
        assert np.isfinite(row["trust"])
    against = run.summary["against"]
    assert against["arm"] == "ce" and against["num_samples"] == run.summary["num_val"]
    mine = run.metrics["val"]["vision"]
    assert against["mean_per_class"] + against["difference"] == pytest.approx(mine["mean_per_class"])
    assert against["nll"] + against["nll_difference"] == pytest.approx(mine["nll"])


@pytest.mark.parametrize("objective", ["ce", "label_smoothing", "tes"])
def test_every_objective_can_start_from_the_prior(settings, objective):
    run = tes.train(settings(objective=objective, start="probe+prior", data__shots=2))
    assert run.summary["start"] == "probe+prior" and "trust" in run.classes[0]


def test_ce_by_itself_never_sees_a_word_of_text(settings):
    run = tes.train(settings(objective="ce", data__shots=2))
    assert run.summary["start"] == "probe" and run.summary["text"] is None and "prior" not in run.summary
    assert "source" not in run.classes[0] and run.classes[0]["prompts"] == []


def test_a_head_of_the_prior_alone_points_where_the_names_say(settings):
    run = tes.train(settings(objective="ce", start="prior", data__shots=2))
    more = tes.train(settings(objective="ce", start="prior", data__shots=4, out=str(run.path) + "-4"))
    one, other = (load_file(path / "model.safetensors")["head.weight"] for path in (run.path, more.path))
    assert torch.nn.functional.cosine_similarity(one, other).abs().min() > 0.999


def test_zero_shots_ship_the_prior(settings, photos):
    run = tes.train(settings(objective="tes", data__shots=0))
    assert run.summary["num_train"] == 0 and run.summary["num_val"] == 0 and run.summary["num_test"] > 0
    assert set(run.metrics) == {"test"} and set(run.metrics["test"]) == {"vision"}
    head = load_file(run.path / "model.safetensors")
    assert head["head.weight"].shape == (3, 16)
    assert {row["trust"] for row in run.classes} == {load_config(run.path / "config.yaml").prior.zero_shot_trust}
    row = next(tes.Classifier.from_run(run).predict([photos / "red_square" / "00.png"]))
    assert row.label in {"red_square", "green_square", "blue_square"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"objective": "ce", "start": "prior", "backbone__source_classes": None}, "source classes are not known"),
        ({"objective": "ce", "start": "probe+prior", "text__encoder": "file:{texts}"}, "cannot embed the source"),
        ({"objective": "ce", "data__shots": 0}, "add --start prior"),
        ({"objective": "ce", "data__shots": 0, "start": "probe"}, "use --start prior"),
        ({"objective": "tes", "data__shots": 0, "train": "all"}, "nothing to train on"),
        ({"objective": "tes", "data__shots": 0, "backbone__source_classes": None}, "there can be none"),
    ],
)
def test_a_prior_that_is_not_possible_is_refused_with_the_reason(settings, texts, tmp_path, flags, words):
    flags = {key: value.format(texts=texts) if isinstance(value, str) else value for key, value in flags.items()}
    config = settings(**{key: value for key, value in flags.items() if value is not None})
    if "backbone__source_classes" in flags:
        config = config.replace({"backbone.source_classes": None})
    with pytest.raises(ConfigError) as caught:
        tes.train(config)
    assert words in str(caught.value) and not (tmp_path / "run").exists()


def test_auto_falls_back_to_the_probe_and_says_why(settings, capsys):
    run = tes.train(settings(objective="tes").replace({"backbone.source_classes": None}))
    assert run.summary["start"] == "probe"
    assert "no text prior: the names of `resnet18`'s source classes are not known" in capsys.readouterr().err


def test_all_weights_can_be_trained_from_the_prior_and_compared_on_request(settings, tmp_path):
    flags = {"objective": "tes", "train": "all", "optim__num_steps": 3, "data__shots": 2}
    run = tes.train(settings(**flags))
    assert "against" not in run.summary and run.summary["start"] == "probe+prior"
    asked = tes.train(settings(**flags, out=str(tmp_path / "asked")), against=True)
    assert asked.summary["against"]["num_samples"] == asked.summary["num_val"]
    for file in ("model.safetensors", "text_head.safetensors"):  # the other training leaves this one as it was
        assert (run.path / file).read_bytes() == (asked.path / file).read_bytes()


def test_the_text_verb_scores_the_names_on_images_outside_test(cli, photos, with_prior, monkeypatch):
    from tes.engine import features

    asked = []
    call = features.FrozenFeatures.__call__
    monkeypatch.setattr(
        features.FrozenFeatures, "__call__", lambda self, indices: asked.extend(indices) or call(self, indices)
    )
    sets = [f"--set={key}={json.dumps(value)}" for key, value in with_prior.items()]
    code, out, err = cli("text", photos, "--json", *sets)
    assert code == 0, err
    zero_shot = json.loads(out)["zero_shot"]
    dataset = tes.data.load(load_config(flags={"data.source": str(photos), "objective": "ce"}).data)
    assert set(asked) == set(np.flatnonzero(dataset.splits != "test")) and zero_shot["num_images"] == len(set(asked))
    assert 0 < zero_shot["standard_error"] < 0.5
    assert zero_shot["chance"] == pytest.approx(1 / 3) and 0 <= zero_shot["mean_per_class"] <= 1
    code, out, _ = cli("text", photos, "--json", "--names-only", *sets)
    assert code == 0 and "zero_shot" not in json.loads(out)


@pytest.mark.parametrize(
    ("accuracy", "chance", "number", "words"),
    [
        (0.495, 0.01, 2000, "help clearly"),
        (0.132, 0.012, 2000, "help a little"),
        (0.039, 0.01, 2000, "next to nothing"),
        (1.0, 0.5, 2, "too few to tell"),
        (0.6, 0.5, 20, "too few to tell"),
    ],
)
def test_what_to_expect_of_the_names_depends_on_how_sure_their_accuracy_is(accuracy, chance, number, words):
    from tes.verbs.text import _sentences

    num_C = np.full(round(1 / chance), number * chance)
    error = standard_error(accuracy * num_C, num_C)
    result = {"mean_per_class": accuracy, "chance": chance, "num_images": number, "standard_error": error}
    result |= {"trust": 1.0, "known_names": None, "other_names": None, "trust_of_permuted_names": 0.0}
    assert words in _sentences(result)[-1]


def test_the_error_of_a_mean_per_class_comes_from_its_smallest_classes():
    right_C, num_C = np.array([1154, 7, 0, 5]), np.array([1990, 10, 0, 6])
    shares = [1155 / 1992, 8 / 12, 6 / 8]
    variances = [share * (1 - share) / number for share, number in zip(shares, (1990, 10, 6))]
    assert standard_error(right_C, num_C) == pytest.approx((sum(variances) / 9) ** 0.5)
    draw = np.random.default_rng(0)
    means = np.mean([draw.binomial(n, 0.6, 4000) / n for n in (200, 20)], axis=0)
    assert standard_error(np.array([120, 12]), np.array([200, 20])) == pytest.approx(means.std(), rel=0.05)
