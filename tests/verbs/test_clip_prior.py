"""A CLIP's own text tower serves as the text prior: from one checkpoint, carried to the feature by its projection."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tes
from tes.config import load_config
from tes.errors import ConfigError
from tes.loaded import Loaded
from tes.text.encoder import open_encoder

VIT = {"embed_dim": 24, "depth": 1, "num_heads": 2, "img_size": 32, "patch_size": 16}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small CLIP in open_clip's layout, in a folder with its description."""
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("clip")
    vision = {"image_size": 32, "layers": 1, "width": 24, "patch_size": 16, "head_width": 12}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    settings = {"embed_dim": 10, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    network = open_clip.CLIP(**settings).eval()
    save_file(network.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    return network, folder


@pytest.fixture
def settings(clip, photos, tmp_path):
    _, folder = clip
    base = {
        "data.source": str(photos),
        "backbone.name": "vit_base_patch32_clip_224",
        "backbone.kwargs": VIT,
        "backbone.checkpoint": str(folder / "open_clip_model.safetensors"),
        "text.encoder": f"openclip:{folder}",
        "out": str(tmp_path / "run"),
    }
    return lambda **flags: load_config(flags=base | {key.replace("__", "."): value for key, value in flags.items()})


def test_each_row_of_the_prior_scores_images_as_the_clip_does(clip, settings):
    network, _ = clip
    config = settings(objective="ce", start="prior", train="head")
    loaded = Loaded.open(config)
    rows_CF = loaded.prior(config).rows_CF
    text = loaded.class_text(config.text)
    with torch.no_grad():
        features_NF = loaded.backbone.eval()(torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)).double()
        similarity_NC = features_NF @ network.visual.proj.double() @ torch.from_numpy(text.uncentred).double().T
    # A softmax does not see what all classes share; each row's length is trust's to learn.
    expected_NC = similarity_NC - similarity_NC.mean(dim=1, keepdim=True)
    found_NC = features_NF @ rows_CF.T
    ratio_NC = expected_NC / found_NC
    assert torch.allclose(ratio_NC, ratio_NC[:1].expand_as(ratio_NC), rtol=1e-4)
    assert torch.allclose(rows_CF.norm(dim=1), torch.ones(3, dtype=torch.float64))


def test_auto_is_the_prior_where_the_towers_are_one_clip_and_says_so(settings, capsys):
    run = tes.train(settings(objective="tes", data__shots=1))
    assert run.summary["start"] == "probe+prior" and "source" not in run.classes[0]
    assert all(np.isfinite(row["trust"]) for row in run.classes)
    assert "are the towers of one CLIP" in capsys.readouterr().err


def test_zero_shots_ship_the_text_tower_as_a_linear_head(settings):
    run = tes.train(settings(objective="tes", data__shots=0))
    assert load_file(run.path / "model.safetensors")["head.weight"].shape == (3, 24)


def test_a_copy_in_half_precision_is_the_same_clip_and_another_clip_is_not(clip, settings, tmp_path):
    network, folder = clip
    half = tmp_path / "half.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in network.state_dict().items()}, half)
    (tmp_path / "open_clip_config.json").write_text((folder / "open_clip_config.json").read_text())
    config = settings(objective="ce", start="prior", text__encoder=f"openclip:{half}")
    assert not isinstance(Loaded.open(config).source_text(config.text), str)
    other = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in network.state_dict().items()}
    save_file(other, half)
    with pytest.raises(ConfigError, match="is not known to be its text tower"):
        tes.train(settings(objective="ce", start="prior", text__encoder=f"openclip:{half}"))


def test_another_text_encoder_gives_no_prior_and_the_reason(settings, texts, capsys):
    run = tes.train(settings(objective="tes", text__encoder=f"file:{texts}"))
    assert run.summary["start"] == "probe"
    assert "is the image tower of a CLIP, and `file:" in capsys.readouterr().err


def test_there_is_no_source_row_to_look_up(settings):
    with pytest.raises(ConfigError, match="a CLIP has none"):
        tes.train(settings(objective="ce", start="probe+lookup"))


def test_a_comparison_holds_permuted_names_against_it_and_no_lookup(cli, settings, tmp_path):
    config = settings(objective="ce")
    (tmp_path / "c.yaml").write_text(config.replace({"out": None}).to_yaml())
    code, _, err = cli(
        "compare", config.data.source, "--config", tmp_path / "c.yaml", "--arms", "ce,tes", "--shots", "1",
        "--seeds", "1", "--train", "head", "--out", tmp_path / "comparison",
    )  # fmt: skip
    assert code == 0, err
    cells = {path.name for path in (tmp_path / "comparison" / "cells" / "1-s0").iterdir()}
    assert {"ce+probe+prior", "ce+probe+permuted"} <= cells and "ce+probe+lookup" not in cells


def test_the_text_verb_scores_the_names_without_naming_source_classes(cli, settings, tmp_path):
    config = settings(objective="ce")
    code, out, err = cli(
        "text", config.data.source, "--json", "--text", config.text.encoder, "--backbone", config.backbone.name,
        "--checkpoint", config.backbone.checkpoint, "--set", f"backbone.kwargs={json.dumps(VIT)}",
    )  # fmt: skip
    assert code == 0, err
    zero_shot = json.loads(out)["zero_shot"]
    assert zero_shot["num_known_names"] is None and zero_shot["nearest"] == [] and 0 <= zero_shot["mean_per_class"] <= 1


def test_the_clip_folder_of_transformers_serves_both_towers(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    small = {"num_hidden_layers": 1, "num_attention_heads": 2}
    vision = small | {"hidden_size": 24, "intermediate_size": 96, "image_size": 32, "patch_size": 16}
    text = small | {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 64}
    network = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    network.save_pretrained(tmp_path)
    encoder = open_encoder(load_config(flags={"data.source": "x", "text.encoder": f"clip:{tmp_path}"}).text)
    np.testing.assert_array_equal(encoder.image_projection(), network.visual_projection.weight.detach().numpy())
