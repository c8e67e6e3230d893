"""Everything of a step is on the device: no GPU is at hand, so tensors that only pretend to be on one tell."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.data._utils.pin_memory import pin_memory

import tes
from tes import reopen
from tes.engine.average import WeightAverage
from tes.engine.compute import Compute
from tes.engine.fit import head_problem
from tes.engine.learner import Learner
from tes.engine.loader import Batch
from tes.engine.loop import train_step
from tes.engine.solve import LinearHead
from tes.models.backbone import Backbone, SourceHead
from tes.models.image_settings import ImageSettings
from tes.models.precision import resolve_precision
from tes.objectives import objectives
from tes.objectives.base import ObjectiveContext
from tes.verbs.verify import verify

IMAGES = ImageSettings(32, 1.0, (0.5,) * 3, (0.5,) * 3, "bilinear")
C, F = 3, 8
COMPUTE = Compute("cuda", "bf16", "channels_last", 0)


@pytest.fixture
def pretended(monkeypatch):
    """A mode in which tensors have a device and a shape, but no values, so that a GPU need not be there."""
    was = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)  # autograd's engine would look for the device
    with pytest.warns(UserWarning, match="CUDA is not available"):  # autocast's
        yield FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    torch.__future__.set_overwrite_module_params_on_conversion(was)


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, F, 3, stride=4)
        self.norm = torch.nn.BatchNorm2d(F)

    def forward(self, x):
        return self.norm(self.conv(x)).mean(dim=(2, 3))


def learner_of(name: str) -> Learner:
    source = SourceHead(torch.ones(5, F), torch.zeros(5), None)
    backbone = Backbone(Network(), "own", IMAGES, {}, source)
    objective_class = objectives.get(name)
    config = objective_class.Config()
    config = config.model_copy(update={key: value for key, (value, _) in config.decide("all").items()})
    objective = objective_class(config)
    objective.class_weight_C = torch.ones(C)
    learner = Learner(backbone, LinearHead(torch.zeros(C, F), torch.zeros(C)), objective, COMPUTE)
    weights = learner.weights()
    fixed = (
        (torch.rand(30, F), torch.eye(C).repeat(10, 1)) if "pretrained_features" in objective.needs else (None, None)
    )
    start = None if weights is None else {key: weight.detach().clone() for key, weight in weights.items()}
    objective.setup(ObjectiveContext(F, C, 0, torch.eye(C, 6), source, *fixed, start_weights=start))
    return learner


@pytest.mark.parametrize("name", objectives.names())
def test_a_step_of_every_objective_is_on_the_device(name, pretended):
    learner = learner_of(name)
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    keys = images if "two_views" in learner.objective.needs else None
    batch = Batch(torch.arange(4), images, torch.tensor([0, 1, 2, 0]), key_images_B3HW=keys)
    with pretended:
        COMPUTE.place(learner)
        optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
        average = WeightAverage(learner, 0.9)
        losses = train_step(learner.train(), batch, optimizer, schedule, 1, 1.0)
        average.update()
        heads = learner.objective.heads(learner.output(torch.zeros(4, F, device="cuda")))
    on_device = [*losses.values(), *heads.values()]
    assert on_device and {tensor.device.type for tensor in on_device} == {"cuda"}


def test_the_pretence_finds_a_tensor_that_stayed_behind(pretended):
    learner = learner_of("ce")
    with pretended:
        COMPUTE.place(learner)
        learner.backbone.mean_3HW = torch.zeros(3, 1, 1)
        with pytest.raises(RuntimeError, match="device"):
            learner.backbone(COMPUTE.images(torch.zeros(4, 3, 32, 32, dtype=torch.uint8)))
        with COMPUTE.autocast():
            pass


def test_a_trained_backbone_is_looked_at_where_it_is():
    class Seen(torch.nn.Module):
        def forward(self, x):
            self.device = x.device.type
            return torch.zeros(2, F)

    backbone = Backbone(Seen(), "own", IMAGES, {})
    assert backbone.network.device == "cpu"
    backbone.to("meta").refresh_fingerprint()
    assert backbone.network.device == "meta"


def test_a_batch_is_pinned_as_the_loader_hands_it_on(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    batch = Batch(torch.zeros(2), torch.zeros(2, 3, 4, 4), torch.zeros(2))
    pinned, lost = pin_memory((batch, [(3, "gone")]))
    assert lost == [(3, "gone")] and pinned.target_BC is None
    assert all((tensor == 1).all() for tensor in (pinned.indices_B, pinned.images_B3HW, pinned.labels_B))


@pytest.mark.parametrize(("has_bf16", "precision"), [(True, "bf16"), (False, "fp32")])
def test_where_bf16_is_only_emulated_it_is_not_chosen(monkeypatch, has_bf16, precision):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or has_bf16
    )
    assert resolve_precision("auto", "auto", "cuda", "conv")[0] == precision
    assert resolve_precision("bf16", "auto", "cuda", "conv")[0] == "bf16"  # the user's word


@pytest.mark.parametrize(("device", "solved_on"), [("cpu", "cpu"), ("cuda", "cuda"), ("mps", "cpu")])
def test_a_head_is_solved_where_there_is_float64(device, solved_on):
    import tes

    config = tes.load_config(flags={"data.source": "photos"}).replace({"device": device})
    assert head_problem(config, None).device == solved_on


def test_a_head_that_does_not_fit_an_accelerator_is_solved_on_the_cpu(monkeypatch, capsys):
    from tes.engine.solve import HeadProblem, Standardizer

    features, target = torch.rand(12, F), torch.eye(C).repeat(4, 1)
    expected = HeadProblem(0.3).solve(features, target)
    fit, calls = Standardizer.fit, []

    def too_large_at_first(features_NF):
        calls.append(features_NF)
        if len(calls) == 1:
            raise torch.OutOfMemoryError
        return fit(features_NF)

    monkeypatch.setattr(Standardizer, "fit", too_large_at_first)
    assert torch.equal(HeadProblem(0.3).solve(features, target).head.weight_CF, expected.head.weight_CF)
    assert "solved on the CPU" in capsys.readouterr().err


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_run_in_bf16_is_opened_in_fp32_where_bf16_is_only_emulated(monkeypatch, photos, resnet, tmp_path, has_bf16):
    flags = {
        "data.source": str(photos),
        "objective": "ce",
        "train": "head",
        "precision": "bf16",
        "device": "cpu",
        "refit": "none",
    }
    run = tes.train(tes.load_config(flags=resnet | flags | {"out": str(tmp_path / "run")}), against=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(reopen, "resolve_device", lambda device: ("cpu", "for this test"))
    assert reopen.recorded_compute(run).precision == ("bf16" if has_bf16 else "fp32")
    found = verify(run.path, data_source=str(photos))
    assert found["holds"], "and its predictions follow from its model, up to the rounding of bf16"
    allowed = "up to 0.05 is rounding"
    assert any(allowed in check["detail"] for check in found["checks"])
