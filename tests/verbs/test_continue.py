"""`--checkpoint RUN`: training goes on from one's own model, and from nothing else that the folder names."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

import tes
from tes.config import load_config
from tes.errors import ModelError, TesError
from tes.models.backbone import load_backbone


@pytest.fixture(scope="module")
def run(photos, resnet, tmp_path_factory):
    """A run whose backbone has moved, prepared in a way of its own."""
    out = tmp_path_factory.mktemp("runs") / "first"
    moved = {"train": "all", "optim.num_steps": 2, "optim.learning_rate": 0.01, "image.mean": (0.4, 0.5, 0.6)}
    config = load_config(flags={"data.source": str(photos), "objective": "ce", "out": str(out), **resnet, **moved})
    return tes.train(config)


def settings(run, resnet, photos, **more):
    flags = {"data.source": str(photos), **resnet, "backbone.checkpoint": str(run.path), "image.size": None}
    return load_config(flags=flags | more)


def test_training_goes_on_from_the_runs_backbone_and_image_settings(run, resnet, photos, tmp_path):
    backbone = load_backbone(settings(run, resnet, photos).backbone, settings(run, resnet, photos).image)
    trained = load_file(run.path / "model.safetensors")
    for name, tensor in backbone.network.state_dict().items():
        assert torch.equal(tensor, trained[f"backbone.{name}"]), name
    assert backbone.images.mean == (0.4, 0.5, 0.6) and backbone.images.size == 32
    assert torch.equal(backbone.source_head.weight_SF, trained["head.weight"])
    assert backbone.source_head.names is None, "only the user says what source classes are called"
    config = settings(run, resnet, photos, objective="ce", train="head", out=str(tmp_path / "second"))
    again = load_file(tes.train(config).path / "model.safetensors")
    assert torch.equal(again["backbone.conv1.weight"], trained["backbone.conv1.weight"])


def test_an_own_network_goes_on_from_a_run_of_it(photos, tmp_path):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 6, 3, stride=4)

        def forward(self, x):
            return self.conv(x).mean((2, 3))

    flags = {"data.source": str(photos), "objective": "ce", "train": "head", "image.size": 32, "backbone.name": "own"}
    first = Own()
    run = tes.train(load_config(flags=flags | {"out": str(tmp_path / "run")}), network=first)
    config = load_config(flags=flags | {"backbone.checkpoint": str(run.path)})
    backbone = load_backbone(config.backbone, config.image, network=Own())
    assert torch.equal(backbone.network.conv.weight, first.conv.weight)


def test_another_backbone_is_refused_with_the_flags_that_suit(run, resnet, photos):
    config = settings(run, resnet, photos, **{"backbone.name": "lite0", "backbone.kwargs": {}})
    with pytest.raises(
        ModelError, match=r"trained from `resnet18`, not from `lite0`: add --backbone resnet18 --set '[^ ]+=\{\"chan"
    ):
        load_backbone(config.backbone, config.image)


def test_nothing_that_the_folder_names_is_imported(run, resnet, photos, tmp_path, monkeypatch):
    proof = tmp_path / "proof"
    (tmp_path / "planted.py").write_text(f"open({str(proof)!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    copy = shutil.copytree(run.path, tmp_path / "copy")
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("name: resnet18", "name: planted:build"))
    config = settings(run, resnet, photos, **{"backbone.checkpoint": str(copy)})
    with pytest.raises(ModelError, match="trained from `planted:build`, not from `resnet18`"):
        load_backbone(config.backbone, config.image)
    assert not proof.exists()
    (copy / "config.yaml").write_text(text.replace("name: resnet18", "name: a; touch proof"))
    with pytest.raises(ModelError, match="add --backbone 'a; touch proof'"):  # what is to be pasted runs nothing either
        load_backbone(config.backbone, config.image)


@pytest.mark.parametrize("content", [(), ("config.yaml",)])
def test_a_folder_that_is_no_finished_run_is_one_sentence(run, resnet, photos, tmp_path, content):
    folder = tmp_path / "unfinished"
    folder.mkdir()
    for name in content:
        shutil.copy(run.path / name, folder)
    config = settings(run, resnet, photos, **{"backbone.checkpoint": str(folder)})
    with pytest.raises(TesError, match=r"no run of ours|did not finish"):
        load_backbone(config.backbone, config.image)


@pytest.mark.slow
def test_the_real_moco_checkpoint_trains_at_64_px(shared, tmp_path):
    flags = {
        "data.source": str(shared / "data" / "caltech101"),
        "data.only_classes": ("airplanes", "Motorbikes", "sunflower"),
        "data.shots": 8,
        "objective": "ce",
        "train": "all",
        "image.size": 64,
        "optim.num_steps": 5,
        "backbone.name": "resnet18",
        "backbone.kwargs": {"channels": [32, 64, 128, 256], "stem_width": 32},
        "backbone.checkpoint": str(shared / "weights" / "resnet18_half.tinyimagenet.mocov2.pth"),
        "out": str(tmp_path / "run"),
    }
    assert tes.train(load_config(flags=flags)).metrics["test"]["vision"]["mean_per_class"] > 0.6
