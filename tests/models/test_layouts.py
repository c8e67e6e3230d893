"""Checkpoints as people hold them: each layout is recognised, gives the source network's features, and is strict."""

from __future__ import annotations

import argparse
import json
import os

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from tes.config import BackboneConfig, ImageConfig
from tes.errors import ModelError
from tes.models.backbone import is_clip_tower, load_backbone

RESNET = {"name": "resnet18", "kwargs": {"channels": [4, 8, 8, 16], "stem_width": 4}}
VIT = {
    "name": "vit_tiny_patch16_224",
    "kwargs": {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8},
}
CLIP_VIT = {"name": "vit_base_patch32_clip_224", "kwargs": VIT["kwargs"]}
CLIP_RESNET = {"name": "resnet50_clip", "kwargs": {"width_factor": 0.125}}
CLIP_MEAN, IMAGENET_MEAN = 0.48145466, 0.485


def source(spec, **more):
    """A network with weights of its own, as its authors would have trained it, and without a classifier."""
    torch.manual_seed(0)
    network = timm.create_model(spec["name"], num_classes=0, **spec["kwargs"], **more).eval()
    for module in network.modules():
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):  # or all of them would be the identity
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    return network


def under(prefix, network):
    return {prefix + name: tensor.clone() for name, tensor in network.state_dict().items()}


def other(prefix, network):
    return {prefix + name: torch.rand_like(tensor.float()) for name, tensor in network.state_dict().items()}


def moco(network):
    queue = {"module.queue": torch.ones(2, 3), "module.encoder_q.fc.0.weight": torch.ones(3, 16)}
    state = other("module.encoder_k.", network) | under("module.encoder_q.", network) | queue
    return {"epoch": 1, "arch": "resnet18", "state_dict": state, "optimizer": {"param_groups": [{"lr": 0.1}]}}


def moco_v1(network):
    content = moco(network)
    content["state_dict"]["module.encoder_q.fc.weight"] = content["state_dict"].pop("module.encoder_q.fc.0.weight")
    return content


def moco_v3(network):
    head = "head" if hasattr(network, "blocks") else "fc"
    extra = {f"module.base_encoder.{head}.0.weight": torch.ones(3, 3), "module.predictor.0.weight": torch.ones(2, 2)}
    state = other("module.momentum_encoder.", network) | under("module.base_encoder.", network) | extra
    return {"epoch": 1, "state_dict": state}


def moco_v3_momentum(network):
    return {"state_dict": under("module.momentum_encoder.", network)}


def dino(network):
    heads = {"head.mlp.0.weight": torch.ones(2, 2), "head.last_layer.weight_g": torch.ones(2, 1)}
    student = other("module.backbone.", network) | {f"module.{name}": tensor for name, tensor in heads.items()}
    return {
        "student": student,
        "teacher": under("backbone.", network) | heads,
        "epoch": 9,
        "args": argparse.Namespace(arch="any"),
    }


def swav(network):
    heads = {"projection_head.0.weight": torch.ones(2, 2), "prototypes.weight": torch.ones(3, 2)}
    return {"state_dict": under("module.", network) | {f"module.{name}": tensor for name, tensor in heads.items()}}


def mae(network):
    decoder = {"mask_token": torch.ones(1, 1, 8), "decoder_embed.weight": torch.ones(8, 24)}
    decoder |= {"decoder_pos_embed": torch.ones(1, 17, 8), "decoder_blocks.0.norm1.weight": torch.ones(8)}
    told = {"args": argparse.Namespace(lr=1e-4), "best": np.float64(83.1), "epoch": np.int64(9)}
    return {"model": under("", network) | decoder, "optimizer": {}} | told


def encoder_alone(network):
    return {"model": under("", network)}


LAYOUTS = {
    "moco_v1": (moco_v1, RESNET, "encoder_q.fc.weight", IMAGENET_MEAN),
    "moco_v2": (moco, RESNET, "encoder_q.fc.0.weight", IMAGENET_MEAN),
    "moco_v3_resnet": (moco_v3, RESNET, "base_encoder.fc.0.weight", IMAGENET_MEAN),
    "moco_v3_vit": (moco_v3, VIT, "momentum_encoder.*", IMAGENET_MEAN),
    "moco_v3_momentum": (moco_v3_momentum, VIT, "MoCo v3", IMAGENET_MEAN),
    "dino_resnet": (dino, RESNET, "head.* (2 tensors)", IMAGENET_MEAN),
    "dino_vit": (dino, VIT, "`teacher` is the one that is taken", IMAGENET_MEAN),
    "swav": (swav, RESNET, "projection_head.0.weight, prototypes.weight", IMAGENET_MEAN),
    "mae": (mae, VIT, "decoder_embed.weight", IMAGENET_MEAN),
    "encoder_alone": (encoder_alone, VIT, "a ViT without a head", IMAGENET_MEAN),
}


def save(content, path):
    if path.suffix != ".safetensors":
        torch.save(content, path)
        return path
    while nested := next((content[key] for key in ("teacher", "state_dict", "model") if key in content), None):
        content = nested
    save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    return path


def load(spec, path, size=32, **more):
    return load_backbone(BackboneConfig(**spec, checkpoint=str(path), **more), ImageConfig(size=size)).eval()


def both(backbone, reference, size=32):
    """Return the backbone's features of some images and what the source network says of the same, normalised."""
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (backbone.images.mean, backbone.images.std))
    with torch.no_grad():
        return backbone(images), reference((images / 255 - mean) / std)


FILES = [(layout, ".pth") for layout in LAYOUTS] + [
    (layout, ".safetensors") for layout in ("moco_v2", "dino_vit", "mae")
]


@pytest.mark.parametrize(("layout", "suffix"), FILES)
def test_every_layout_gives_the_source_networks_features_and_names_what_is_set_aside(tmp_path, layout, suffix):
    build, spec, aside, mean = LAYOUTS[layout]
    network = source(spec)
    backbone = load(spec, save(build(network), tmp_path / f"of_no_telling_name{suffix}"))
    found, expected = both(backbone, network)
    assert torch.allclose(found, expected, atol=1e-5) and found.std() > 1e-2
    notes = " ".join(backbone.notes)
    assert aside in notes or (suffix == ".safetensors" and "is taken" in aside)
    assert backbone.source_head is None, "what such a checkpoint ends with classifies nothing"
    assert backbone.images.mean[0] == pytest.approx(mean)


@pytest.mark.parametrize("layout", ["moco_v2", "moco_v3_vit", "dino_resnet", "swav", "mae"])
@pytest.mark.parametrize("harm", ["missing", "wrong shape"])
def test_a_tensor_that_is_missing_or_of_another_shape_is_named(tmp_path, layout, harm):
    build, spec, _, _ = LAYOUTS[layout]
    content = build(source(spec))
    path = save(content, tmp_path / "w.pth")
    state = content
    while nested := next((state[key] for key in ("teacher", "state_dict", "model") if key in state), None):
        state = nested
    ending = "layer3.0.conv2.weight" if spec is RESNET else "blocks.1.mlp.fc2.weight"
    name = next(key for key in state if key.endswith(ending) and not key.startswith("module.encoder_k"))
    name = next((key for key in state if key.endswith(ending) and "base_encoder" in key), name)
    state[name], words = (state[name][:1], "another shape") if harm == "wrong shape" else (None, "missing")
    save({**content}, path)
    with pytest.raises(ModelError, match=rf"1 (tensors are|have) {words}: {ending}"):
        load(spec, path)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model_ema": state, "model": other("", source(RESNET)), "epoch": 3},
        lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
        lambda state: {"model_state_dict": state},
    ],
    ids=["ema before the last weights", "module", "compiled", "model_state_dict"],
)
def test_plain_weights_are_found_in_any_wrapping_and_keep_their_classifier(tmp_path, wrap):
    network = source(RESNET)
    head = {"fc.weight": torch.rand(7, 16), "fc.bias": torch.rand(7)}
    backbone = load(RESNET, save(wrap(network.state_dict() | head), tmp_path / "w.pth"))
    found, expected = both(backbone, network)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(backbone.source_head.weight_SF, head["fc.weight"])


def test_torchvisions_vit_is_renamed_and_its_resnet_needs_no_renaming(tmp_path):
    import torchvision

    torch.manual_seed(0)
    network = torchvision.models.VisionTransformer(32, 8, 2, 2, 24, 96, num_classes=5).eval()
    nn.init.normal_(network.heads.head.weight)
    backbone = load(VIT, save(network.state_dict(), tmp_path / "w.pth"))
    found, logits = both(backbone, network)
    head = backbone.source_head
    assert torch.allclose(found @ head.weight_SF.T + head.bias_S, logits, atol=1e-5)
    assert backbone.images.mean[0] == IMAGENET_MEAN and "torchvision" in backbone.origin["mean"]
    with torch.device("meta"):
        theirs, timms = torchvision.models.resnet18().state_dict(), timm.create_model("resnet18").state_dict()
    assert theirs.keys() == timms.keys()


@pytest.fixture(scope="module")
def clips():
    """Small CLIPs of open_clip, image towers of both kinds, with their text towers."""
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    vit = {"image_size": 32, "layers": 2, "width": 24, "patch_size": 8, "head_width": 12}
    resnet = {"image_size": 224, "layers": [3, 4, 6, 3], "width": 8, "head_width": 64}
    return {
        "vit": open_clip.CLIP(12, vit, text).eval(),
        "quick": open_clip.CLIP(12, vit, text, quick_gelu=True).eval(),
        "resnet": open_clip.CLIP(12, resnet, text).eval(),
    }


@pytest.mark.parametrize(("kind", "suffix"), [("vit", ".pt"), ("quick", ".safetensors"), ("resnet", ".safetensors")])
def test_clips_image_towers_project_to_what_open_clip_computes(tmp_path, clips, kind, suffix):
    clip = clips[kind]
    spec = CLIP_RESNET if kind == "resnet" else CLIP_VIT
    if kind == "quick":
        spec = spec | {"name": "vit_base_patch32_clip_quickgelu_224"}
    size = 224 if kind == "resnet" else 32
    backbone = load(spec, save(clip.state_dict(), tmp_path / f"w{suffix}"), size)
    found, embeddings = both(backbone, clip.encode_image, size)
    # A ModifiedResNet's projection has a bias, which shifts all images alike.
    bias = clip.visual.attnpool.c_proj.bias if kind == "resnet" else 0
    assert torch.allclose(found @ backbone.projection_DF.T + bias, embeddings, atol=1e-5)
    assert backbone.images.mean[0] == CLIP_MEAN and backbone.source_head is None
    assert any("visual.proj" in note or "c_proj" in note for note in backbone.notes)


def test_a_clip_tower_whose_pooled_feature_is_another_has_no_projection(tmp_path, clips):
    path = save(clips["vit"].state_dict(), tmp_path / "w.pt")
    averaged = CLIP_VIT | {"kwargs": CLIP_VIT["kwargs"] | {"global_pool": "avg", "fc_norm": False}}
    assert load(averaged, path).projection_DF is None
    path = save(clips["resnet"].state_dict(), tmp_path / "r.pt")
    assert load(CLIP_RESNET | {"name": "resnet50_clip_gap"}, path, 64).projection_DF is None


def test_an_architecture_without_a_place_for_a_part_of_the_network_is_refused(tmp_path):
    path = save(mae(source(VIT)), tmp_path / "w.pth")
    with pytest.raises(
        ModelError, match=r"like MAE, and `vit_tiny_patch16_224` has no place for 12 tensors.*blocks\.1\."
    ):
        load(VIT | {"kwargs": VIT["kwargs"] | {"depth": 1}}, path)


def test_a_network_whose_own_part_is_called_backbone_is_taken_as_it_is(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = nn.Conv2d(3, 5, 3), nn.Linear(5, 2)

        def forward(self, x):
            return self.backbone(x).mean((2, 3))

    network, other_one = Own(), Own()
    config = BackboneConfig(name="mine", checkpoint=str(save(network.state_dict(), tmp_path / "w.pth")))
    backbone = load_backbone(config, ImageConfig(size=32), network=other_one)
    found, expected = both(backbone.eval(), network)
    assert torch.allclose(found, expected, atol=1e-5) and backbone.source_head.weight_SF.shape == (2, 5)


def test_clip_weights_in_a_network_with_another_activation_are_refused_where_that_is_known(tmp_path, clips):
    path = save(clips["quick"].state_dict(), tmp_path / "w.pt")
    assert any("do not say whether they need QuickGELU" in note for note in load(CLIP_VIT, path).notes)
    settings = {"model_cfg": {"quick_gelu": True}, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"trained with QuickGELU.*name `vit_base_patch32_clip_quickgelu_224`"):
        load(CLIP_VIT, path)
    right = load(CLIP_VIT | {"name": "vit_base_patch32_clip_quickgelu_224"}, path)
    assert right.images.mean == (0.1, 0.2, 0.3) and "open_clip_config.json" in right.origin["mean"]
    (tmp_path / "open_clip_config.json").unlink()
    save(clips["quick"].state_dict() | {"input_resolution": torch.tensor(32)}, path)
    with pytest.raises(ModelError, match="OpenAI's own"):
        load(CLIP_VIT, path)


def test_clip_as_transformers_saves_it_is_read_too(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    small = {"num_hidden_layers": 2, "num_attention_heads": 2}
    vision = small | {"hidden_size": 24, "intermediate_size": 96, "image_size": 32, "patch_size": 8}
    text = small | {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 64}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
    clip.save_pretrained(tmp_path)
    spec = CLIP_VIT | {"name": "vit_base_patch32_clip_quickgelu_224"}
    backbone = load(spec, tmp_path / "model.safetensors")
    found, embeddings = both(backbone, lambda x: clip.visual_projection(clip.vision_model(x).pooler_output))
    assert torch.allclose(found @ backbone.projection_DF.T, embeddings, atol=1e-5)
    with pytest.raises(ModelError, match=r"`config\.json` beside them"):
        load(CLIP_VIT, tmp_path / "model.safetensors")


def test_position_embeddings_are_resized_as_timm_does_and_the_note_says_so(tmp_path):
    from timm.layers import resample_abs_pos_embed

    network = source(VIT)
    path = save(mae(network), tmp_path / "w.pth")
    large = VIT | {"kwargs": VIT["kwargs"] | {"img_size": 48}}
    backbone = load_backbone(BackboneConfig(**large, checkpoint=str(path)), ImageConfig())
    assert backbone.images.size == 48
    expected = resample_abs_pos_embed(network.pos_embed, new_size=[6, 6])
    assert torch.allclose(backbone.network.pos_embed, expected, atol=1e-6)
    assert "position embeddings are resized from 17 to 37 places" in backbone.notes


def test_an_averaged_mae_names_the_setting_with_which_nothing_is_left_untrained(tmp_path):
    network = source(VIT, global_pool="avg", fc_norm=False)
    path = save(mae(network), tmp_path / "w.pth")
    averaged = VIT["kwargs"] | {"global_pool": "avg"}
    with pytest.raises(ModelError, match=r"fc_norm\.weight.*backbone\.kwargs\.fc_norm=false"):
        load(VIT | {"kwargs": averaged}, path)
    backbone = load(VIT | {"kwargs": averaged | {"fc_norm": False}}, path)
    found, expected = both(backbone, network)
    assert torch.allclose(found, expected, atol=1e-5)


def test_weights_named_by_their_tag_are_prepared_as_timm_knows_them(tmp_path):
    path = save(encoder_alone(source(VIT)), tmp_path / "w.pth")
    assert "assumed" in load(VIT, path).origin["mean"]
    tagged = load(VIT | {"name": "vit_tiny_patch16_224.augreg_in21k"}, path)
    assert tagged.images.mean == (0.5, 0.5, 0.5) and "assumed" not in tagged.origin["mean"]


def test_a_torchscript_archive_is_refused_with_the_way_to_convert_it(tmp_path):
    path = tmp_path / "ViT-B-32.pt"
    with pytest.warns(FutureWarning):  # as OpenAI made theirs
        torch.jit.script(nn.Linear(2, 2)).save(path)
    with pytest.raises(ModelError, match=r"TorchScript archive.*python -c .*save_file\(.*ViT-B-32\.safetensors"):
        load(CLIP_VIT, path)


@pytest.mark.parametrize("key", ["state_dict", "teacher", "model"])
def test_a_pickle_in_any_container_is_refused_and_not_executed(tmp_path, key):
    proof = tmp_path / "proof"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {proof}",)

    content = {key: under("module.encoder_q.", source(RESNET)), "optimizer": Evil()}
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ModelError, match="would run code"):
        load(RESNET, tmp_path / "w.pth")
    assert not proof.exists()


def test_names_of_classes_for_weights_that_classify_nothing_are_refused(tmp_path):
    path = save(moco_v1(source(RESNET)), tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"MoCo v1/v2 and classify none"):
        load(RESNET, path, source_classes="cifar10")


@pytest.mark.parametrize(
    ("tag", "is_tower"),
    [
        ("vit_base_patch32_clip_quickgelu_224.openai", True),
        ("resnet50_clip.openai", True),
        ("vit_base_patch32_clip_224.laion2b", True),
        ("vit_base_patch32_clip_224.laion2b_ft_in12k_in1k", False),
        ("vit_base_patch16_224.augreg_in21k", False),
    ],
)
def test_hub_weights_of_a_clip_tower_are_told_from_those_with_a_classifier(tag, is_tower):
    assert is_clip_tower(timm.get_pretrained_cfg(tag).to_dict()) is is_tower


def test_the_real_moco_checkpoint_loads_as_it_is(shared):
    spec = {"name": "resnet18", "kwargs": {"channels": [32, 64, 128, 256], "stem_width": 32}}
    backbone = load(spec, shared / "weights" / "resnet18_half.tinyimagenet.mocov2.pth", 64)
    assert backbone.num_features == 256 and backbone.source_head is None
    assert "MoCo v1/v2" in backbone.notes[0] and "encoder_q.fc" in backbone.notes[1]
