"""The main job from folder to run folder, on small real files, through the public functions."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import tes
from tes.config import load_config
from tes.errors import ConfigError, DataError, RunError, TextError, TrainingError
from tes.job import run_job
from tes.loaded import Loaded
from tes.objectives import objectives
from tes.settle import check_needs


@pytest.fixture
def settings(photos, texts, resnet, tmp_path):
    def make(**flags):
        base = {"data.source": str(photos), "text.encoder": f"file:{texts}", "out": str(tmp_path / "run"), **resnet}
        dotted = {key.replace("__", "."): value for key, value in flags.items()}
        return load_config(flags=base | dotted)

    return make


def test_the_run_folder_holds_format_1(settings):
    run = tes.train(settings(objective="tes"))
    names = {str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()}
    expected = """
        run.json config.yaml env.json classes.json metrics.jsonl timing.jsonl splits.csv README.md preprocess.json
        predictions/train.npz predictions/val.npz predictions/test.npz per_class_val.csv per_class_test.csv
        model.safetensors text_head.safetensors start_head.safetensors
    """
    assert set(expected.split()) <= names
    assert run.summary["format"] == 1 and run.summary["status"] == "complete" and run.summary["arm"] == "tes"
    assert [row["class"] for row in run.classes] == ["blue_square", "green_square", "red_square"]
    assert [row["name"] for row in run.classes] == ["blue square", "green square", "red square"]
    model = load_file(run.path / "model.safetensors")
    assert model["head.weight"].shape == (3, 16) and "backbone.conv1.weight" in model
    text_head = load_file(run.path / "text_head.safetensors")
    assert {"Z", "centre", "temperature", "projection.0.weight"} <= text_head.keys()
    rows = list(csv.DictReader((run.path / "splits.csv").open()))
    assert len(rows) == 36 and {row["split"] for row in rows} == {"train", "val", "test"}
    predictions = np.load(run.path / "predictions" / "test.npz", allow_pickle=False)
    assert set(predictions["paths"]) == {row["path"] for row in rows if row["split"] == "test"}
    assert predictions["labels"].dtype == np.int64 and predictions["logits_vision"].dtype == np.float32
    assert set(run.metrics["test"]) == {"vision", "text", "both"}
    assert load_config(run.path / "config.yaml").start == "probe"


def test_a_solved_head_tells_the_colours_apart_and_the_saved_model_says_the_same(settings, photos):
    run = tes.train(settings(objective="ce", refit="none"))
    assert run.metrics["test"]["vision"]["top1"] == 1.0
    assert set(run.metrics["test"]) == {"vision"} and not (run.path / "text_head.safetensors").exists()
    saved = run.predictions("test")
    rows = list(tes.Classifier.from_run(run).predict([photos / path for path in saved.paths]))
    expected = saved.probabilities("vision")
    for row, probabilities in zip(rows, expected):
        assert row.prob == pytest.approx(probabilities.max(), abs=2e-2)  # bf16 features in training, fp32 here
        assert row.label == run.classes[int(probabilities.argmax())]["class"]


def test_photos_in_memory_are_prepared_as_files_are(settings, tmp_path):
    from PIL import Image

    classifier = tes.Classifier.from_run(tes.train(settings(objective="ce")))
    pixels = np.zeros((40, 60, 4), dtype=np.uint8)
    pixels[:, :20] = (200, 30, 30, 255)  # the rest is transparent
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    image.save(tmp_path / "photo.png", exif=exif)
    with Image.open(tmp_path / "photo.png") as held:
        said = classifier.probabilities([held])[0]
    [row] = classifier.predict([tmp_path / "photo.png"])
    assert row.prob == pytest.approx(said.max().item(), abs=1e-6)
    assert (row.label, row.name) == ("red_square", "red square")


def test_large_photos_are_let_go_of_one_by_one_while_a_batch_is_read(settings, photos, monkeypatch):
    import weakref

    from tes.verbs import predict

    classifier = tes.Classifier.from_run(tes.train(settings(objective="ce")))
    decode, alive, most = predict.decode, {}, []

    def counted_decode(content):
        image, number = decode(content), len(most)
        alive[number] = weakref.ref(image, lambda _: alive.pop(number))
        most.append(len(alive))
        return image

    monkeypatch.setattr(predict, "decode", counted_decode)
    assert len(list(classifier.predict(sorted(photos.rglob("*.png")) * 2))) == 72
    assert len(most) == 72 and max(most) <= 40  # as many as there are threads, not as there are in a batch of 64


@pytest.mark.parametrize("rate", [1e-4, 0.3])
def test_a_training_says_how_far_its_steps_took_it_from_the_head_that_it_started_from(settings, capsys, rate):
    run = tes.train(settings(objective="ce", train="all", optim__num_steps=5, optim__learning_rate=rate, data__shots=4))
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if row["split"] == "val")
    before, after = first["heads"]["vision"]["mean_per_class"], run.metrics["val"]["vision"]["mean_per_class"]
    assert first["step"] == 0
    shown = f"on val from {before:.1%} (the head that it started from) to {after:.1%} mean per class"
    said = capsys.readouterr().err
    assert f"the steps took it {'down, ' if rate == 0.3 else ''}{shown}" in said and (rate != 0.3 or after < before)


def test_the_start_is_shipped_on_request_where_the_steps_do_not_beat_it(settings, resnet, capsys):
    steps = {"train": "all", "optim__num_steps": 5, "optim__learning_rate": 0.3, "data__shots": 4}
    run = tes.train(settings(objective="tes", start_fallback="val", **steps))
    assert run.summary["shipped"] == "start" and "the start is shipped" in capsys.readouterr().err
    looks = run.summary["start_fallback"]
    assert looks["start"]["vision"]["mean_per_class"] > looks["trained"]["vision"]["mean_per_class"]
    assert run.metrics["val"]["vision"]["nll"] == pytest.approx(looks["start"]["vision"]["nll"], abs=1e-5)
    saved, start = load_file(run.path / "model.safetensors"), load_file(run.path / "start_head.safetensors")
    assert torch.equal(saved["head.weight"], start["weight"])
    before = load_file(resnet["backbone.checkpoint"])["layer1.0.conv1.weight"]
    assert torch.equal(saved["backbone.layer1.0.conv1.weight"], before)
    assert "did not beat the head" in (run.path / "README.md").read_text()
    assert tes.verify(run, data_source=run.settings["data"]["source"])["holds"]


def test_what_was_trained_is_shipped_where_it_beats_its_start(settings, monkeypatch):
    from tes import job

    looks, score = itertools.count(1), job.evaluate_split

    def rising(*given):
        heads = score(*given)
        heads["vision"]["mean_per_class"] = next(looks) / 100
        return heads

    monkeypatch.setattr(job, "evaluate_split", rising)
    steps = {"train": "all", "optim__num_steps": 5, "optim__learning_rate": 0.01, "data__shots": 4}
    run = tes.train(settings(objective="ce", start_fallback="val", **steps))
    assert run.summary["shipped"] == "trained"
    saved, start = load_file(run.path / "model.safetensors"), load_file(run.path / "start_head.safetensors")
    assert not torch.equal(saved["head.weight"], start["weight"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"train": "head"}, "changes nothing with `train: head`"),
        ({"train": "all", "start": "random"}, "would ship a random head"),
        ({"train": "all", "refit": "trainval"}, "would train on val"),
    ],
)
def test_a_fallback_that_makes_no_sense_is_refused(settings, flags, words):
    with pytest.raises(ConfigError, match=words):
        tes.train(settings(objective="ce", start_fallback="val", **flags))


def test_equal_training_gives_equal_bytes(settings, tmp_path):
    paths = []
    for name in ("a", "b"):
        out = tmp_path / name
        tes.train(settings(objective="tes", train="all", optim__num_steps=3, out=str(out)))
        paths.append(out)
    for file in ("model.safetensors", "text_head.safetensors", "metrics.jsonl", "splits.csv", "classes.json"):
        assert (paths[0] / file).read_bytes() == (paths[1] / file).read_bytes(), file


def test_training_all_moves_the_weights_and_lowers_the_loss(settings, resnet):
    flags = {"optim__num_steps": 40, "optim__learning_rate": 0.02}
    run = tes.train(settings(objective="ce", start="random", train="all", **flags))
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    assert losses[-1] < losses[0]
    before = load_file(resnet["backbone.checkpoint"])["layer1.0.conv1.weight"]
    assert not torch.equal(before, load_file(run.path / "model.safetensors")["backbone.layer1.0.conv1.weight"])


@pytest.mark.slow
def test_the_options_of_a_stepped_training_go_together_whatever_the_workers(settings, tmp_path):
    options = {"augment__mixup": 0.3, "augment__cutmix": 1.0, "optim__layer_decay": 0.8, "optim__ema": 0.99}
    flags = {"objective": "tes", "train": "all", "optim__num_steps": 3, "optim__accumulate": 2}
    files = []
    for num_workers in (0, 2):
        out = tmp_path / str(num_workers)
        run = tes.train(settings(**flags, **options, num_workers=num_workers, out=str(out)))
        assert run.settings["augment"]["mixup"] == 0.3 and run.settings["optim"]["ema"] == 0.99
        files.append([(out / name).read_bytes() for name in ("model.safetensors", "text_head.safetensors")])
        saved = run.predictions("test")
        rows = list(
            tes.Classifier.from_run(run).predict([Path(run.settings["data"]["source"]) / p for p in saved.paths])
        )
        for row, probabilities in zip(rows, saved.probabilities("vision")):
            assert row.prob == pytest.approx(probabilities.max(), abs=2e-2)  # what is scored is what is shipped
    assert files[0] == files[1]


@pytest.mark.parametrize(
    "option", [{"augment.mixup": 0.2}, {"augment.cutmix": 1.0}, {"optim.layer_decay": 0.8}, {"optim.ema": 0.9}]
)
def test_an_option_of_steps_is_refused_where_a_head_is_solved(settings, option):
    (key,) = option
    for train in ("head", "auto"):
        with pytest.raises(ConfigError, match=f"`{key}` changes nothing with `train: head`.*add `--train all`"):
            tes.train(settings(objective="ce", train=train, device="cpu").replace(option))
    assert not Path(settings().out).exists()


@pytest.mark.parametrize("key", ["augment.mixup", "augment.cutmix"])
def test_mixed_images_are_refused_to_an_objective_of_two_views(settings, key):
    class TwoViews(objectives.get("ce")):
        needs = frozenset({"two_views"})

    check_needs(settings(objective="ce", train="all"), TwoViews)
    with pytest.raises(ConfigError, match="a mixed image has two"):
        check_needs(settings(objective="ce", train="all").replace({key: 1.0}), TwoViews)


def test_weights_of_zero_equal_ce_step_for_step(settings, tmp_path):
    models = []
    flags = {"train": "all", "optim__num_steps": 4, "precision": "fp32"}
    zero = {"objective.text_target_weight": 0, "objective.text_loss_weight": 0}
    for name, config in (
        ("ce", settings(objective="ce", out=str(tmp_path / "ce"), **flags)),
        ("tes", settings(objective="tes", start="probe", out=str(tmp_path / "tes"), **flags).replace(zero)),
    ):
        run = tes.train(config)
        rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        losses = [row["vision_loss"] for row in rows if row["split"] == "train"]
        models.append((load_file(run.path / "model.safetensors"), losses, name))
    (ce, ce_loss, _), (zeroed, tes_loss, _) = models
    assert ce_loss == tes_loss
    assert all(torch.equal(ce[name], zeroed[name]) for name in ce)


def test_l2_sp_keeps_the_backbone_where_it_started(settings, resnet, tmp_path):
    start = load_file(resnet["backbone.checkpoint"])
    flags = {
        "objective": "l2_sp",
        "start": "random",
        "train": "all",
        "optim__learning_rate": 0.02,
        "optim__name": "sgd",
    }
    distances = []
    for alpha in (0.0, 10.0):
        config = settings(**flags, optim__num_steps=12, objective__alpha=alpha, out=str(tmp_path / str(alpha)))
        assert config.optim.weight_decay == 0
        model = load_file(tes.train(config).path / "model.safetensors")
        moved = [model[f"backbone.{name}"] - start[name] for name in start if name.endswith("conv1.weight")]
        distances.append(sum(part.square().sum().item() for part in moved))
    assert 0 < distances[1] < 0.5 * distances[0]
    with pytest.raises(ConfigError, match="trains the backbone; use it with `--train all`"):
        tes.train(settings(objective="l2_sp", train="head", out=str(tmp_path / "head")))


def test_a_frozen_projection_is_the_one_fitted_beforehand_to_the_last_bit(settings, tmp_path):
    heads = []
    for objective, flags in (
        ("tes", {"train": "head", "refit": "none"}),
        ("tes@frozen-projection", {"train": "all", "optim__num_steps": 4, "optim__learning_rate": 0.01}),
    ):
        out = tmp_path / objective
        tes.train(settings(objective=objective, precision="fp32", out=str(out), **flags))
        heads.append((out / "text_head.safetensors").read_bytes())
    assert heads[0] == heads[1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [({"train": "head"}, "add `--train all`"), ({"start": "random", "train": "all"}, "a random start has none")],
)
def test_a_frozen_projection_is_refused_where_there_is_none(settings, flags, words):
    with pytest.raises(ConfigError, match=words):
        settings(objective="tes@frozen-projection", **flags)


def test_a_frozen_projection_is_refused_where_the_head_alone_is_trained_by_default(settings, tmp_path):
    with pytest.raises(ConfigError, match="add `--train all`"):
        tes.train(settings(objective="tes@frozen-projection", device="cpu"))
    assert not (tmp_path / "run").exists()


def test_the_learner_shows_the_weights_in_training_to_objectives_that_ask(resnet):
    from tes.config import BackboneConfig, ImageConfig
    from tes.engine.compute import Compute
    from tes.engine.learner import Learner
    from tes.engine.start import random_head
    from tes.models.backbone import load_backbone
    from tes.objectives import objectives

    named = {key.removeprefix("backbone."): value for key, value in resnet.items() if key.startswith("backbone.")}
    backbone = load_backbone(BackboneConfig(**named), ImageConfig(size=32))
    backbone.network.conv1.requires_grad_(False)
    shown = {}
    for name in ("ce", "l2_sp"):
        objective = objectives.get(name)(objectives.get(name).Config())
        learner = Learner(backbone, random_head(16, 3, 0), objective, Compute("cpu", "fp32", "contiguous", 0))
        shown[name] = learner.output(torch.zeros(2, 16)).weights
    assert shown["ce"] is None
    assert shown["l2_sp"]["head.weight"] is learner.head.weight
    assert shown["l2_sp"]["backbone.layer1.0.conv1.weight"] is backbone.network.layer1[0].conv1.weight
    assert not {"backbone.conv1.weight", "backbone.bn1.running_mean"} & shown["l2_sp"].keys()


def test_a_vit_trains_from_a_local_checkpoint(settings, tmp_path):
    import timm
    from safetensors.torch import save_file

    kwargs = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=5, **kwargs)
    save_file(network.state_dict(), tmp_path / "vit.safetensors")
    run = tes.train(
        settings(
            objective="tes", train="all", optim__num_steps=3, backbone__name="vit_tiny_patch16_224",
            backbone__kwargs=kwargs, backbone__checkpoint=str(tmp_path / "vit.safetensors"),
        )
    )  # fmt: skip
    assert run.summary["status"] == "complete"
    assert (
        len(list(tes.Classifier.from_run(run).probabilities([__import__("PIL.Image").Image.new("RGB", (40, 40))]))) == 1
    )


def test_an_own_module_in_python_trains_and_is_repeated_to_predict(settings, photos):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 5, 3, stride=2)
            self.fc = torch.nn.Linear(5, 2)

        def forward(self, x):
            return self.conv(x).mean(dim=(2, 3))

    config = settings(objective="ce", train="all", optim__num_steps=2).replace({"backbone.name": "mine:Own"})
    config = config.replace({"backbone.checkpoint": None, "backbone.kwargs": {}})
    run = tes.train(config, network=Own())
    with pytest.raises(RunError, match="repeat it: --backbone mine:Own"):
        tes.Classifier.from_run(run)
    image = next(photos.rglob("*.png"))
    assert next(iter(tes.Classifier.from_run(run, network=Own()).predict([image]))).label


def test_refit_uses_every_photo_and_keeps_the_figures_from_before(settings, tmp_path):
    plain = tes.train(settings(objective="ce", refit="none", out=str(tmp_path / "plain")))
    everything = tes.train(settings(objective="ce", refit="all", out=str(tmp_path / "all")))
    assert plain.metrics == everything.metrics and everything.summary["refit"] == "all"
    heads = [load_file(run.path / "model.safetensors")["head.weight"] for run in (plain, everything)]
    assert not torch.equal(*heads)
    # The refitted head is the solution on all images: the same as a run that is told to solve on them.
    assert "before this refit" in (everything.path / "README.md").read_text()


def test_shots_are_nested_and_val_is_drawn_beside_them(settings, tmp_path):
    def paths(k):
        run = tes.train(settings(objective="ce", data__shots=k, out=str(tmp_path / f"k{k}")))
        rows = list(csv.DictReader((run.path / "splits.csv").open()))
        return {split: {row["path"] for row in rows if row["split"] == split} for split in ("train", "val", "test")}

    one, two = paths(1), paths(2)
    assert len(one["train"]) == 3 and len(one["val"]) == 3 and len(two["train"]) == 6 and len(two["val"]) == 6
    assert one["train"] < two["train"] and one["test"] == two["test"]


def test_a_second_run_computes_no_feature_again(settings, monkeypatch, tmp_path):
    tes.train(settings(objective="ce", out=str(tmp_path / "a")))
    import tes.engine.features as features

    def refuse(*arguments, **keywords):
        raise AssertionError("features were computed again")

    monkeypatch.setattr(features, "compute_features", refuse)
    assert tes.train(settings(objective="tes", out=str(tmp_path / "b"))).metrics["test"]


def test_a_loss_that_is_not_finite_stops_with_step_files_and_hint(settings):
    far_too_high = {"optim__name": "sgd", "optim__learning_rate": 1e9, "optim__clip_norm": 1e30, "precision": "fp32"}
    with pytest.raises(TrainingError, match=r"not finite at step \d+ .*_square/.*--lr"):
        tes.train(settings(objective="ce", train="all", optim__num_steps=30, **far_too_high))


def test_accumulated_micro_batches_give_the_gradient_of_the_whole_batch(settings, tmp_path):
    heads = []
    for parts in (1, 2):
        run = tes.train(
            settings(
                objective="ce", train="all", optim__num_steps=2, optim__batch_size=8, optim__accumulate=parts,
                precision="fp32", optim__freeze_norms=True, out=str(tmp_path / str(parts)),
            )
        )  # fmt: skip
        heads.append(load_file(run.path / "model.safetensors")["backbone.layer1.0.conv1.weight"])
    assert torch.allclose(*heads, atol=1e-5)


def test_an_unreadable_image_is_skipped_counted_and_listed(settings, photos, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(photos, copy)
    (copy / "red_square" / "fake.jpg").write_text("not an image")
    run = tes.train(settings(objective="ce", data__source=str(copy)))
    assert run.summary["unreadable"] == [{"path": "red_square/fake.jpg", "reason": "not an image"}]


@pytest.mark.parametrize("train", [{"train": "head"}, {"train": "all", "optim__num_steps": 2, "start": "random"}])
def test_images_that_vanish_after_the_data_was_opened_are_done_without_and_listed(
    settings, photos, tmp_path, train, capsys
):
    copy, folder = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(photos, copy)
    folder.mkdir()
    config = settings(objective="tes", refit="none", data__source=str(copy), **train)
    loaded = Loaded.open(config)
    dataset = loaded.dataset
    gone = {split: dataset.paths[dataset.indices(split)[1]] for split in ("train", "val", "test")}
    for path in gone.values():
        (copy / path).unlink()
    run_job(config, loaded, folder)
    run = tes.Run.open(folder)
    assert {row["path"] for row in run.summary["lost"]} == set(gone.values())
    assert {row["reason"] for row in run.summary["lost"]} == {"no such file or directory"}
    assert run.summary["num_train"] == len(dataset.indices("train")) - 1
    for split in ("val", "test"):
        said = run.predictions(split)
        assert said.paths == [dataset.paths[i] for i in dataset.indices(split) if dataset.paths[i] != gone[split]]
        assert [dataset.classes[label].label for label in said.labels] == [path.split("/")[0] for path in said.paths]
    err = capsys.readouterr().err
    assert all(f"`{path}` could be read before" in err for path in gone.values()) and "3 images were lost" in err
    checks = tes.verify(run, data_source=str(copy))["checks"]
    assert {check["name"]: check["holds"] for check in checks if not check["holds"]} == {}


def test_a_training_whose_images_vanish_stops_with_a_sentence(settings, photos, tmp_path):
    copy, folder = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(photos, copy)
    folder.mkdir()
    config = settings(objective="ce", data__source=str(copy))
    loaded = Loaded.open(config)
    shutil.rmtree(copy)
    with pytest.raises(DataError, match=r"can be read any more|more than the 3 that are tolerated"):
        run_job(config, loaded, folder)


def test_a_class_whose_only_drawn_image_vanishes_stops_the_training(settings, photos, tmp_path):
    copy, folder = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(photos, copy)
    folder.mkdir()
    config = settings(objective="ce", data__source=str(copy), data__shots=1)
    loaded = Loaded.open(config)
    drawn = tes.data.draw(loaded.dataset, config.data, config.seed)
    lost = int(drawn.indices("train")[0])
    (copy / drawn.paths[lost]).unlink()
    with pytest.raises(DataError, match=f"`{drawn.classes[drawn.labels[lost]].label}` can be read any more"):
        run_job(config, loaded, folder)


@pytest.fixture
def uneven(photos, tmp_path):
    """Two classes that look much alike, one ten times as large, and one apart."""
    root = tmp_path / "uneven"
    draw = np.random.default_rng(0)
    for name, count, centre in (("many", 60, 120), ("few", 6, 128), ("other", 20, 220)):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = (centre + draw.normal(0, 25) + draw.normal(0, 8, (32, 32, 3))).clip(0, 255).astype("uint8")
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return {"data__source": str(root), "objective": "ce"}


STEPPED = {"train": "all", "start": "random", "optim__num_steps": 20, "optim__learning_rate": 0.02}


@pytest.mark.parametrize("flags", [{}, pytest.param(STEPPED, marks=pytest.mark.slow)])
def test_class_weights_make_a_small_class_count_whether_a_head_is_solved_or_all_is_stepped(
    settings, uneven, tmp_path, flags
):
    said = []
    for number, weights in enumerate(("none", "balanced", {"few": 1e3})):
        out = str(tmp_path / str(number))
        run = tes.train(settings(**uneven, **flags, optim__class_weights=weights, refit="none", out=out))
        said.append(run.predictions("test").probabilities("vision")[:, 0].mean())  # of `few`
        assert run.settings["optim"]["class_weights"] == weights
    assert said == sorted(said) and len(set(said)) == 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"optim__class_weights": "balance"}, r"`optim.class_weights`: none, balanced, or a positive number"),
        ({"optim__class_weights": {"few": -1}}, "a positive number for each class"),
        ({"optim__class_weights": {"few": True}}, "a positive number for each class"),
        ({"optim__class_weights": {"flew": 2}}, "did you mean `few`"),
        ({"optim__sampling": "balanced"}, "changes nothing with `train: head`"),
        ({"optim__sampling": "balanced", "optim__class_weights": "balanced", "train": "all"}, "the same thing twice"),
    ],
)
def test_weights_and_samplings_that_cannot_be_are_one_sentence(settings, uneven, tmp_path, flags, words):
    with pytest.raises(ConfigError, match=words):
        tes.train(settings(**uneven, **({"train": "head"} | flags)))
    assert not (tmp_path / "run").exists()


def test_balanced_sampling_trains(settings, uneven):
    run = tes.train(settings(**uneven, train="all", optim__num_steps=3, optim__sampling="balanced"))
    assert run.settings["optim"]["sampling"] == "balanced"


def test_a_permuted_text_classifier_is_refused(settings, photos, texts):
    from tes import data, text

    dataset = data.load(settings().data)
    classifier = text.build(dataset.classes, settings().text, centre=True)
    with pytest.raises(TextError, match="Row 0"):
        classifier.aligned_with(dataset.classes[::-1])


@pytest.mark.parametrize(
    ("flags", "error", "words"),
    [
        ({"data__source": "/nowhere/at/all"}, DataError, "nowhere"),
        ({"data__shots": 30}, DataError, "has 9"),
        ({"objective": "ce", "start": "random", "train": "head"}, ConfigError, "undertraining"),
        ({"data__only_classes": ("red_square", "purple")}, DataError, "purple"),
        ({"data__only_classes": ("red_square",)}, DataError, "two classes"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(settings, tmp_path, flags, error, words):
    with pytest.raises(error, match=words):
        tes.train(settings(**flags))
    assert not (tmp_path / "run").exists()


def test_a_class_missing_from_the_text_file_is_named(settings, tmp_path):
    rows = tmp_path / "few.npz"
    np.savez(rows, names=np.array(["red_square", "green_square"]), embeddings=np.eye(2, dtype="float32"))
    with pytest.raises(TextError, match="blue_square"):
        tes.train(settings(text__encoder=f"file:{rows}"))
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_refused_unless_overwritten(settings):
    config = settings(objective="ce")
    first = tes.train(config)
    with pytest.raises(RunError, match="--overwrite"):
        tes.train(config)
    again = tes.train(config, overwrite=True)
    assert again.path == first.path and again.metrics == first.metrics


def test_a_failed_overwrite_puts_the_old_run_back(settings):
    run = tes.train(settings(objective="ce"))
    before = (run.path / "model.safetensors").read_bytes()
    with pytest.raises(DataError):
        tes.train(settings(objective="ce", data__shots=30), overwrite=True)
    assert (run.path / "model.safetensors").read_bytes() == before
    assert [path.name for path in run.path.parent.iterdir()] == [run.path.name]


def test_a_folder_of_other_files_is_never_replaced(settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="not a run"):
        tes.train(settings(objective="ce"), overwrite=True)
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"


def test_an_output_path_below_a_file_is_refused_before_any_work(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be made"):
        tes.train(settings(objective="ce", out=str(tmp_path / "file" / "run")))


def test_the_default_folder_is_the_next_free_number(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = settings(objective="ce").replace({"out": None})
    assert [str(tes.train(config).path) for _ in range(2)] == ["runs/squares-ce-1", "runs/squares-ce-2"]


def test_a_saved_backbone_is_never_imported_on_the_folders_word(settings):
    run = tes.train(settings(objective="ce"))
    config = run.path / "config.yaml"
    config.write_text(config.read_text().replace("name: resnet18", "name: subprocess:check_output"))
    with pytest.raises(RunError, match="not imported on a run folder's word"):
        tes.Classifier.from_run(Path(run.path))


def test_overwrite_replaces_nothing_but_a_run(settings, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("mine: 1")
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match=r"more than a run \(thesis.txt\)"):
        tes.train(settings(objective="ce"), overwrite=True)
    assert (folder / "thesis.txt").read_text() == "mine"


def test_the_folder_one_stands_in_is_not_replaced(settings, tmp_path, monkeypatch):
    tes.train(settings(objective="ce"))
    monkeypatch.chdir(tmp_path / "run")
    with pytest.raises(RunError, match="the folder you are in"):
        tes.train(settings(objective="ce", out="."), overwrite=True)
    assert (tmp_path / "run" / "run.json").is_file()


def test_a_run_folder_among_the_images_is_refused(settings, photos, tmp_path, monkeypatch):
    images = tmp_path / "images"
    shutil.copytree(photos, images)
    monkeypatch.chdir(images)
    with pytest.raises(RunError, match="among the images"):
        tes.train(settings(objective="ce", data__source=".").replace({"out": None}))
    assert sorted(path.name for path in images.iterdir()) == sorted(path.name for path in photos.iterdir())


def test_damaged_features_in_the_cache_are_computed_again(settings, own_cache, tmp_path):
    first = tes.train(settings(objective="ce")).metrics
    for file in (own_cache / "features").rglob("*.npz"):
        file.write_bytes(file.read_bytes()[:300])
    assert tes.train(settings(objective="ce", out=str(tmp_path / "again"))).metrics == first


def test_a_batch_is_never_split_into_single_images(settings):
    flags = {"optim.batch_size": 4, "optim.accumulate": 4, "optim.num_steps": 2}
    assert tes.train(settings(objective="tes", train="all", **flags)).metrics


def test_an_extreme_penalty_is_one_sentence(settings):
    with pytest.raises(TrainingError, match="no finite solution"):
        tes.train(settings(objective="ce", optim__head_penalty=1e300))


def test_a_narrow_network_gets_a_larger_learning_rate(settings, capsys):
    from tes.verbs.train import dry_run

    flags = {"objective": "ce", "train": "all"}
    narrow = dry_run(settings(**flags))  # 16 features: 0.3 / 16 is above the limit
    assert narrow.optim.learning_rate == narrow.optim.head_learning_rate == pytest.approx(1e-3)
    assert "adamw for a conv network of 16 features" in capsys.readouterr().err
    wide = dry_run(settings(**flags, backbone__name="lite0", backbone__kwargs={}, backbone__checkpoint=None))
    assert wide.optim.learning_rate == pytest.approx(0.3 / 1280)
    random = dry_run(settings(**flags, start="random"))
    assert random.optim.learning_rate == pytest.approx(3e-4)  # whatever its width


def test_a_random_head_gets_a_larger_learning_rate_than_one_that_fits_already(settings, tmp_path):
    rates = {}
    for start in ("probe", "random"):
        flags = {"objective": "ce", "train": "all", "start": start, "optim__num_steps": 1, "out": str(tmp_path / start)}
        optim = tes.train(settings(**flags)).settings["optim"]
        rates[start] = optim["learning_rate"], optim["head_learning_rate"]
        assert optim["warmup"] == (0.1 if start == "random" else 0.0)
    assert rates["probe"][0] == rates["probe"][1] < rates["random"][1] == pytest.approx(10 * rates["random"][0])


CLASSICAL = ("bss", "co_tuning", "bi_tuning")


@pytest.mark.parametrize(("name", "start"), [("bss", "probe"), ("co_tuning", "random"), ("bi_tuning", "probe")])
def test_the_classical_objectives_train_and_ship_a_backbone_and_a_head_alone(settings, resnet, name, start):
    run = tes.train(settings(objective=name, start=start, train="all", optim__num_steps=2, optim__batch_size=8))
    assert run.summary["status"] == "complete" and set(run.metrics["test"]) == {"vision"}
    model, before = load_file(run.path / "model.safetensors"), load_file(resnet["backbone.checkpoint"])
    backbone = {f"backbone.{key}" for key in before if not key.startswith("fc.")}
    assert model.keys() == backbone | {"head.weight", "head.bias"}  # no copy, queue or source head
    assert not torch.equal(model["backbone.layer1.0.conv1.weight"], before["layer1.0.conv1.weight"])


@pytest.mark.parametrize("name", CLASSICAL)
def test_the_classical_objectives_are_refused_where_the_head_alone_is_trained(settings, tmp_path, name):
    for train in ("head", "auto"):
        with pytest.raises(ConfigError, match=f"`{name}` trains the backbone; use it with `--train all`"):
            tes.train(settings(objective=name, train=train, device="cpu"))
    assert not (tmp_path / "run").exists()


def test_co_tuning_says_how_it_relates_the_classes_and_is_refused_without_a_source_head(
    settings, resnet, tmp_path, capsys
):
    flags = {"objective": "co_tuning", "train": "all", "optim__num_steps": 1}
    run = tes.train(settings(**flags))
    assert run.summary["objective"] == {"num_held_out": 0}
    assert "p(source class | class): mean source prediction of each class" in capsys.readouterr().err
    weights = load_file(resnet["backbone.checkpoint"])
    torch.save({name: tensor for name, tensor in weights.items() if not name.startswith("fc.")}, tmp_path / "bare.pth")
    with pytest.raises(ConfigError, match="the weights of `resnet18` have none"):
        tes.train(settings(**flags, backbone__checkpoint=str(tmp_path / "bare.pth"), out=str(tmp_path / "bare")))
    assert not (tmp_path / "bare").exists()


def test_bss_refuses_micro_batches_and_bi_tuning_is_the_same_with_them(settings, tmp_path):
    flags = {"train": "all", "optim__num_steps": 3, "optim__batch_size": 8, "precision": "fp32"}
    with pytest.raises(ConfigError, match=r"looks at a batch as a whole; leave `optim.accumulate` at 1"):
        tes.train(settings(objective="bss", optim__accumulate=2, **flags))
    weights = []
    for parts in (1, 2):
        config = settings(objective="bi_tuning", optim__accumulate=parts, **flags, out=str(tmp_path / str(parts)))
        weights.append(load_file(tes.train(config).path / "model.safetensors")["backbone.layer1.0.conv1.weight"])
    assert torch.allclose(*weights, atol=1e-5)


@pytest.mark.slow
def test_the_papers_protocol_looks_at_test_every_five_epochs_and_ships_the_best(photos, resnet, tmp_path, cli):
    sets = [f"--set={key}={json.dumps(value)}" for key, value in resnet.items()]
    code, out, err = cli(
        "train", photos, "--objective", "ce", "--start", "random", "--train", "all", "--epochs", 12, "--protocol",
        "paper", "--out", tmp_path / "r", *sets,
    )  # fmt: skip
    assert code == 0 and "test-selected" in out, err
    run = tes.Run.open(tmp_path / "r")
    logged = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    looked = {
        row["epoch"]: row["heads"]["vision"]["mean_per_class"] for row in logged if row.get("epoch") and "heads" in row
    }
    assert (
        {row["split"] for row in logged} == {"train", "test"}
        and list(looked) == [5, 10, 12]
        and run.metrics["test"]["vision"]["mean_per_class"] == max(looked.values())
    )
    assert run.summary["num_val"] == 0 and run.summary["refit"] == "none" and "val" not in run.metrics
    assert "**Test-selected**" in (run.path / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--protocol", "papers"], "--protocol is val or paper"),
        (["--protocol", "paper", "--refit", "all"], "trains on val already"),
        (["--protocol", "paper", "--against", "ce"], "leaves no val"),
    ],
)
def test_what_does_not_go_with_a_protocol_is_one_sentence(photos, resnet, tmp_path, cli, flags, words):
    sets = [f"--set={key}={json.dumps(value)}" for key, value in resnet.items()]
    code, _, err = cli("train", photos, "--objective", "ce", "--out", tmp_path / "r", *flags, *sets)
    assert code == 2 and words in err and not (tmp_path / "r").exists()


def test_a_dry_run_decides_everything_and_writes_nothing(photos, with_prior, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sets = [f"--set={key}={json.dumps(value)}" for key, value in with_prior.items()]
    code, out, err = cli("train", photos, "--train", "last-2", "--dry-run", *sets)
    assert code == 0 and "last-2: 2 of the backbone's 9 layers" in err and not list(tmp_path.iterdir())
    (tmp_path / "settled.yaml").write_text(out)
    settled = tes.load_config(tmp_path / "settled.yaml")
    assert settled.optim.num_steps and settled.start == "probe+prior" and settled.train == "last-2"
    code, out, err = cli("compare", photos, "--arms", "ce,tes", "--shots", "1,2", "--dry-run", *sets)
    assert code == 0 and out.startswith("30 cells of 1 trial: shots 1, 2; 3 seeds from 0"), err
    assert "tes: starts from probe+prior" in out and [path.name for path in tmp_path.iterdir()] == ["settled.yaml"]
