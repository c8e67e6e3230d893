"""The slowly moving copy of the backbone: what it follows, in which mode, and that nobody else has one."""

from __future__ import annotations

import pytest
import torch

from tes.config import BackboneConfig, ImageConfig, OptimConfig
from tes.engine.compute import Compute
from tes.engine.learner import Learner
from tes.engine.loader import Batch
from tes.engine.loop import to_train_mode, train_step
from tes.engine.optim import build_optimizer, build_schedule
from tes.engine.start import random_head
from tes.models.backbone import load_backbone
from tes.objectives import objectives
from tes.objectives.base import ObjectiveContext


@pytest.fixture
def learner(resnet):
    def make(name: str = "bi_tuning", **settings) -> Learner:
        named = {key.removeprefix("backbone."): value for key, value in resnet.items() if key.startswith("backbone.")}
        backbone = load_backbone(BackboneConfig(**named), ImageConfig(size=32))
        objective = objectives.get(name)(objectives.get(name).Config(**settings))
        made = Learner(backbone, random_head(16, 3, 0), objective, Compute("cpu", "fp32", "contiguous", 0))
        objective.setup(ObjectiveContext(16, 3, seed=0))
        return made

    return make


def one_step(learner: Learner, freeze_norms: bool) -> Batch:
    draw = torch.Generator().manual_seed(0)
    images, keys = (torch.randint(256, (6, 3, 32, 32), generator=draw, dtype=torch.uint8) for _ in range(2))
    batch = Batch(torch.arange(6), images, torch.tensor([0, 1, 1, 2, 2, 2]), key_images_B3HW=keys)
    config = OptimConfig(name="sgd", learning_rate=0.1, head_learning_rate=0.1)
    optimizer = build_optimizer(learner, config)
    to_train_mode(learner, freeze_norms)
    train_step(learner, batch, optimizer, build_schedule(optimizer, 10, 0.0), 1, None)
    return batch


def test_the_copy_follows_the_backbone_after_each_step(learner):
    made = learner(momentum=0.75)
    start = {name: p.detach().clone() for name, p in made.backbone.named_parameters()}
    one_step(made, freeze_norms=True)
    for name, copied in made.key_backbone.named_parameters():
        live = dict(made.backbone.named_parameters())[name].detach()
        torch.testing.assert_close(copied, 0.75 * start[name] + 0.25 * live)
        assert copied.grad is None and not copied.requires_grad
    assert any(not torch.equal(start[name], p) for name, p in made.backbone.named_parameters())


@pytest.mark.parametrize("freeze_norms", [True, False])
def test_the_copys_batch_norms_are_in_the_mode_of_the_backbones(learner, freeze_norms):
    made = learner()
    before = made.key_backbone.network.bn1.running_mean.clone()
    one_step(made, freeze_norms)
    norms = list(made.batch_norms())
    assert len(norms) == 2 * 21 and all(norm.training is not freeze_norms for norm in norms)
    assert torch.equal(made.key_backbone.network.bn1.running_mean, before) is freeze_norms


def test_the_keys_are_the_second_view_under_the_copy(learner):
    made = learner()
    keys = one_step(made, freeze_norms=True).key_images_B3HW
    with torch.no_grad():
        expected = learner().eval().backbone(keys)  # as the copy was when it was asked
    hidden = torch.nn.functional.normalize(torch.cat([expected, torch.ones(6, 1)], dim=1))
    queue = made.objective.queue_CKD
    assert made.objective.num_seen_C.tolist() == [1, 2, 3]
    found = torch.cat([queue[label, : label + 1, :17] for label in range(3)])
    torch.testing.assert_close(found, hidden)


def test_no_other_objective_has_a_copy(learner):
    made = learner("ce")
    assert made.key_backbone is None and not any(name.startswith("key_") for name in made.state_dict())
