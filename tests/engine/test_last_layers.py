"""`train: last-N`: what is frozen stays bit for bit, what is trained learns as if all were trained."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch

from tes.config import BackboneConfig, ImageConfig, OptimConfig
from tes.engine.compute import Compute
from tes.engine.learner import Learner, one_hot
from tes.engine.loader import Batch
from tes.engine.loop import fit
from tes.engine.start import random_head
from tes.models.backbone import Backbone, load_backbone
from tes.models.image_settings import ImageSettings
from tes.models.layers import count_layers, freeze_all_but_last, layer_of
from tes.objectives import objectives

B, C, SIZE = 6, 3, 32
OWN = BackboneConfig(name="examples.mobilenetv1:MobileNetV1", kwargs={"width": 2, "num_source_classes": 5})

NETWORKS = {
    "resnet": lambda: timm.create_model("resnet18", num_classes=0, channels=[4, 8, 8, 16], stem_width=4),
    "vit": lambda: timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, depth=3, embed_dim=12, num_heads=3, img_size=SIZE, proj_drop_rate=0.5
    ),
    "mobilenet": lambda: timm.create_model("mobilenetv3_small_050", num_classes=0),
    "own": lambda: load_backbone(OWN, ImageConfig(size=SIZE)).network,
}
IMAGES = ImageSettings(SIZE, 1.0, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "bilinear")


@pytest.fixture(autouse=True)
def from_the_repositorys_folder(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])


def batches(num_steps: int) -> list[Batch]:
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (num_steps, B, 3, SIZE, SIZE), generator=draw, dtype=torch.uint8)
    return [Batch(torch.arange(B), part, torch.arange(B) % C) for part in images]


def state(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in learner.state_dict().items()}


def learner_of(kind: str, objective: str = "ce") -> Learner:
    torch.manual_seed(0)
    backbone = Backbone(NETWORKS[kind](), kind, IMAGES, {})
    own = objectives.get(objective)
    compute = Compute("cpu", "fp32", "contiguous", 0)
    return Learner(backbone, random_head(backbone.num_features, C, 0), own(own.Config()), compute)


def trained_names(learner: Learner, num_last: int) -> set[str]:
    layers = layer_of(learner.backbone.network)
    first = 1 + max(layers.values()) - num_last
    return {f"backbone.network.{name}" for name, layer in layers.items() if layer >= first}


@pytest.mark.parametrize("kind", NETWORKS)
def test_frozen_weights_and_statistics_stay_bit_for_bit_and_the_last_layers_move(kind):
    learner = learner_of(kind)
    wanted = trained_names(learner, 2)
    freeze_all_but_last(learner.backbone.network, 2)
    before = state(learner)
    config = OptimConfig(learning_rate=0.1, head_learning_rate=0.1, freeze_norms=False, ema=0.5, layer_decay=0.5)
    fit(learner, batches(3), config, 3, path_of=str, on_losses=lambda *row: None, evaluate=lambda step: None,
        evaluate_at={1})  # fmt: skip
    moved = {name for name, tensor in state(learner).items() if not torch.equal(tensor, before[name])}
    parameters = {name for name, _ in learner.named_parameters()}
    assert moved & parameters == wanted | {"head.weight", "head.bias"}
    statistics = {name for name in moved - parameters if not name.endswith("num_batches_tracked")}
    has_norm = {name.rpartition(".")[0] for name in statistics}
    assert all(f"{norm}.weight" in wanted for norm in has_norm) and bool(has_norm) == (kind != "vit")


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_gradients_of_the_trained_layers_are_those_of_training_all(kind):
    whole = learner_of(kind).eval()
    part = copy.deepcopy(whole)
    freeze_all_but_last(part.backbone.network, 1)
    batch = batches(1)[0]
    for learner in (whole, part):
        sum(learner(batch.images_B3HW, one_hot(batch.labels_B, C)).values()).backward()
    expected = dict(whole.named_parameters())
    names = trained_names(whole, 1) | {"head.weight", "head.bias"}
    got = {name: parameter for name, parameter in part.named_parameters() if parameter.grad is not None}
    assert got.keys() == names and sum(parameter.grad.abs().sum() for parameter in got.values()) > 0
    for name, parameter in got.items():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=0, atol=0)


def test_the_frozen_layers_keep_no_activations():
    kept = {}
    for num_last in (1, None):
        learner = learner_of("resnet").eval()
        if num_last is not None:
            freeze_all_but_last(learner.backbone.network, num_last)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1],
                                                      lambda t: t):  # fmt: skip
            learner.backbone(batches(1)[0].images_B3HW)
        kept[num_last] = sum(sizes)
    assert kept[1] < 0.5 * kept[None]


def test_the_slow_copy_keeps_the_frozen_statistics_as_well():
    learner = learner_of("resnet", "bi_tuning")
    freeze_all_but_last(learner.backbone.network, 1)
    learner.train()
    for backbone in (learner.backbone, learner.key_backbone):
        modes = {name: module.training for name, module in backbone.network.named_modules()}
        assert not modes["layer3.1.bn2"] and not modes["bn1"] and modes["layer4.1.bn2"]


def test_a_networks_layers_are_counted():
    assert {kind: count_layers(make()) for kind, make in NETWORKS.items()} == {
        "resnet": 9, "vit": 4, "mobilenet": 14, "own": 3
    }  # fmt: skip
