"""The shipped configs: every one runs up to its training, and the authors' recipe is theirs value by value."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from tes import data
from tes.config import load_config
from tes.engine.compute import Compute
from tes.engine.features import FrozenFeatures
from tes.engine.fit import Given, fit
from tes.engine.learner import Learner
from tes.engine.loader import eval_transform, train_batches, train_transform
from tes.engine.optim import build_optimizer, build_schedule
from tes.engine.start import random_head
from tes.errors import ConfigError
from tes.models.backbone import load_backbone
from tes.models.image_settings import ImageSettings
from tes.objectives import objectives
from tes.objectives.base import ObjectiveContext
from tes.search import draw_trials, space

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
AUTHORS = next(path for path in CONFIGS if path.name == "cifar100_resnet50_mocov2.yaml")
TINY = {
    "resnet50": {"channels": [4, 4, 8, 8], "stem_width": 4},
    "vit_base_patch16_224": {"depth": 1, "embed_dim": 12, "num_heads": 3},
}


def commands(path: Path) -> list[list[str]]:
    """Return the commands in a config's header."""
    return [shlex.split(line[1:]) for line in path.read_text().splitlines() if line.startswith("#   tes ")]


@pytest.mark.parametrize(
    ("path", "command"), [(path, command) for path in CONFIGS for command in commands(path)],
    ids=lambda value: value.stem if isinstance(value, Path) else value[2],
)  # fmt: skip
def test_the_command_in_a_configs_header_runs_up_to_the_training(
    path, command, photos, texts, tmp_path, cli, monkeypatch
):
    import timm

    name = load_config(path, {"data.source": "x"}).backbone.name
    network = timm.create_model(name, num_classes=0, **TINY[name])
    save_file({key: tensor.contiguous() for key, tensor in network.state_dict().items()}, tmp_path / "w.safetensors")
    program, verb, task, *rest = command
    assert program == "tes" and task in ("TASK", "CIFAR", "cifar100")
    assert Path(rest[rest.index("--config") + 1]).name == path.name
    rest[rest.index("--config") + 1] = str(path)
    if "--checkpoint" in rest:
        rest[rest.index("--checkpoint") + 1] = str(tmp_path / "w.safetensors")
    else:
        rest += ["--checkpoint", str(tmp_path / "w.safetensors")]
    here = ["--set", f"backbone.kwargs={json.dumps(TINY[name])}", "--text", f"file:{texts}", "--dry-run"]
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(verb, photos, *rest, *here)
    assert code == 0, err
    assert "learning_rate" in out if verb == "train" else "of 24 trials" in out
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_every_family_has_a_search_and_every_config_its_command():
    assert {path.name for path in CONFIGS} >= {AUTHORS.name, "search_resnet.yaml", "search_vit.yaml"}
    assert all(commands(path) for path in CONFIGS)


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if "search:" in path.read_text()], ids=lambda path: path.stem
)
def test_a_search_draws_every_arms_values_from_its_grid(path):
    flags = {"data.source": "x"}
    trials = {}
    for arm in ("ce", "tes"):
        config = load_config(path, flags | {"objective": arm})
        places = space(config, objectives.get(arm))
        assert places.keys() == {key for key in config.search if arm == "tes" or not key.startswith("objective.")}
        trials[arm] = draw_trials(places, 24)
        for key, values in config.search.items():
            drawn = {trial[key] for trial in trials[arm][1:] if key in trial}
            assert drawn <= set(values) and (len(drawn) > len(values) / 2 or arm == "ce")
        assert config.value("optim.learning_rate") in config.search["optim.learning_rate"]
    for ours, theirs in zip(trials["tes"][1:], trials["ce"][1:]):
        assert theirs.items() <= ours.items()
    solved = load_config(path, flags | {"objective": "tes", "train": "head"})
    assert space(solved, objectives.get("tes")).keys() == {"objective.text_target_weight", "objective.temperature"}


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ({"optim.learning_rat": [1]}, "Did you mean `learning_rate`"),
        ({"optim.learning_rate": [0.1, -1]}, "optim.learning_rate"),
        ({"objective.temprature": [0.1]}, "no objective has a setting `objective.temprature`"),
        ({"optim.learning_rate": []}, "search.optim.learning_rate"),
        ({"optim.learning_rate": 0.1}, "search.optim.learning_rate"),
    ],
)
def test_a_search_that_cannot_be_is_one_sentence(search, words):
    with pytest.raises(ConfigError) as caught:
        load_config(flags={"data.source": "x", "objective": "ce", "search": search})
    assert words in str(caught.value)


@pytest.fixture(scope="module")
def recipe():
    return load_config(AUTHORS, {"data.source": "cifar100"})


def test_the_authors_objective_start_and_text(recipe):
    own = recipe.objective
    assert (own.text_target_weight, own.text_loss_weight, own.temperature) == (0.1, 0.3, 0.03)
    assert recipe.start == "random" and recipe.train == "all" and not own.warm_projection
    assert recipe.text.templates == ("a photo of a {}",) and recipe.text.centre is False
    assert recipe.text.encoder == "clip:openai/clip-vit-base-patch32"
    assert recipe.optim.batch_size == 256 and recipe.optim.num_epochs == 100 and recipe.optim.freeze_norms is False


def test_the_authors_optimiser_and_its_course(recipe, resnet, texts):
    backbone = load_backbone(recipe.backbone.model_copy(update=_tiny(resnet)), recipe.image.model_copy(
        update={"size": 32}))  # fmt: skip
    objective = objectives.get("tes")(recipe.objective)
    rows = torch.from_numpy(np.load(texts)["embeddings"][:3])
    objective.setup(ObjectiveContext(backbone.num_features, 3, 0, rows))
    learner = Learner(
        backbone, random_head(backbone.num_features, 3, 0), objective, Compute("cpu", "fp32", "contiguous", 0)
    )
    optimizer = build_optimizer(learner, recipe.optim)
    assert isinstance(optimizer, torch.optim.SGD)
    covered = sum(len(group["params"]) for group in optimizer.param_groups)
    assert covered == sum(parameter.requires_grad for parameter in learner.parameters())
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.00316, rel=1e-15) and group["weight_decay"] == 1e-5
        assert group["momentum"] == 0.9 and group["nesterov"] and group["dampening"] == 0
    num_steps = 100 * math.ceil(50000 / 256)
    schedule = build_schedule(optimizer, num_steps, recipe.optim.warmup)
    for step in (0, 1, 196, num_steps // 2, num_steps - 1):
        expected = 0.00316 * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        assert 0.00316 * schedule.lr_lambdas[0](step) == pytest.approx(expected, rel=1e-12)


def _tiny(resnet):
    return {"name": "resnet18", "kwargs": resnet["backbone.kwargs"], "checkpoint": resnet["backbone.checkpoint"]}


def test_the_authors_augmentation(recipe):
    from torchvision import transforms

    images = ImageSettings(**recipe.image.model_dump())
    assert images.mean == (0.5071, 0.4867, 0.4408) and images.std == (0.2675, 0.2565, 0.2761)
    theirs = transforms.Compose(
        [transforms.RandomCrop(32, padding=4), transforms.Resize(224), transforms.PILToTensor(),
         transforms.RandomHorizontalFlip()]
    )  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 256, size=(32, 32, 3), dtype=np.uint8)
    image, ours = Image.fromarray(pixels), train_transform(images, recipe.augment)
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        expected = theirs(image)
        torch.manual_seed(seed)
        got = ours(image)
        assert got.shape == (3, 224, 224) and torch.equal(got, expected)
        seen.add(got.numpy().tobytes())
    assert len(seen) > 4
    assert torch.equal(eval_transform(images)(image), transforms.PILToTensor()(transforms.Resize(224)(image)))


def test_a_crop_size_is_for_padded_crops_alone():
    with pytest.raises(ConfigError, match="`crop_size` is for the policy padded_crop"):
        load_config(flags={"data.source": "x", "augment.policy": "none", "augment.crop_size": 32})
    config = load_config(flags={"data.source": "x", "augment.crop_size": 96})
    steps = train_transform(ImageSettings(224, 1.0, (0.5,) * 3, (0.5,) * 3, "bilinear"), config.augment).transforms
    assert [type(step).__name__ for step in steps][:3] == ["Resize", "RandomCrop", "Resize"]


def test_one_step_of_the_recipe_has_the_loss_of_the_formula(recipe, resnet, photos, texts):
    # A learning rate that moves nothing: the weights after the step are those that its loss was taken at.
    config = recipe.replace(
        {"data.source": str(photos), "optim.num_epochs": None, "optim.num_steps": 1, "image.size": 32,
         "optim.learning_rate": 1e-30, "optim.head_learning_rate": 1e-30,
         **{f"backbone.{key}": value for key, value in _tiny(resnet).items()}}
    )  # fmt: skip
    dataset = data.load(config.data)
    compute = Compute("cpu", "fp32", "contiguous", 0)
    backbone = load_backbone(config.backbone, config.image)
    raw_CD = torch.from_numpy(np.load(texts)["embeddings"])
    order = [list(np.load(texts)["names"]).index(info.label) for info in dataset.classes]
    z_CD = nn.functional.normalize(raw_CD[order].double(), dim=1)
    given = Given(dataset, FrozenFeatures(backbone, dataset, compute), z_CD.float())
    rows = []
    train = dataset.indices("train")
    learner = fit(config, given, train, log=rows.append).learner
    logged = sum(value for name, value in rows[0].items() if name.endswith("_loss"))

    batch = next(train_batches(dataset, train, backbone.images, config.augment, compute, batch_size=256, num_steps=1,
                               seed=config.seed))  # fmt: skip
    assert len(batch.labels_B) == min(256, len(train))
    mean, std = (
        torch.tensor(part, dtype=torch.float64).view(3, 1, 1) for part in (config.image.mean, config.image.std)
    )
    network = learner.backbone.network.double().train()
    f = network.forward_head(network.forward_features((batch.images_B3HW / 255 - mean) / std), pre_logits=True)
    v = f @ learner.head.weight.double().T + learner.head.bias.double()
    first, norm, _, last = [part.double() for part in learner.objective.text_head.projection]
    hidden = f @ first.weight.T + first.bias
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + norm.eps).sqrt() * norm.weight + norm.bias
    u = hidden.clamp(min=0) @ last.weight.T + last.bias
    t = (u / u.norm(dim=1, keepdim=True)) @ z_CD.T / 0.03
    y = torch.eye(3, dtype=torch.float64)[batch.labels_B]
    q = 0.9 * y + 0.1 * t.exp() / t.exp().sum(1, keepdim=True)
    log_p_v, log_p_t = (x - x.logsumexp(1, keepdim=True) for x in (v, t))
    expected = -(q * log_p_v).sum(1).mean() - 0.3 * (y * log_p_t).sum(1).mean()
    assert logged == pytest.approx(expected.item(), rel=1e-5)
