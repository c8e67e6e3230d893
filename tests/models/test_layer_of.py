"""Which layer a parameter belongs to: as timm says, or by the order of a network's parts."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from tes.errors import ModelError
from tes.models.layers import layer_of

BLOCKS = [f"layer{stage}.{block}." for stage in (1, 2, 3, 4) for block in (0, 1)]


def tiny_resnet() -> nn.Module:
    return timm.create_model("resnet18", num_classes=0, channels=[4, 8, 8, 16], stem_width=4)


@pytest.mark.parametrize(
    ("wrap", "prefix"), [(lambda network: network, ""), (lambda network: nn.Sequential(network), "0.")]
)
def test_a_timm_network_is_a_stem_and_its_blocks_even_within_a_wrapper(wrap, prefix):
    network = wrap(tiny_resnet())
    layers = layer_of(network)
    assert layers.keys() == dict(network.named_parameters()).keys()
    for name, layer in layers.items():
        name = name.removeprefix(prefix)
        expected = next((1 + place for place, block in enumerate(BLOCKS) if name.startswith(block)), 0)
        assert layer == expected, name


def test_the_norm_behind_a_transformers_blocks_is_in_the_last_layer():
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=3, embed_dim=12, num_heads=3, img_size=32)
    layers = layer_of(network)
    assert layers["cls_token"] == layers["pos_embed"] == layers["patch_embed.proj.weight"] == 0
    assert [layers[f"blocks.{block}.attn.qkv.weight"] for block in range(3)] == [1, 2, 3]
    assert layers["norm.weight"] == 3


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(2))
        self.stem = nn.Linear(2, 2)
        self.activation = nn.ReLU()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.fc = nn.Linear(2, 5).requires_grad_(False)


def test_the_parts_of_ones_own_network_are_its_layers_and_what_is_frozen_has_none():
    own = Own()
    expected = {"token": 0, "stem.weight": 0, "stem.bias": 0} | {
        f"body.{k}.{what}": 1 for k in (0, 1) for what in ("weight", "bias")
    }
    assert layer_of(own) == expected
    own.stem.requires_grad_(False)
    own.token.requires_grad_(False)
    assert set(layer_of(own).values()) == {0} and len(layer_of(own)) == 4


def test_a_group_matcher_that_fails_is_one_sentence():
    own = Own()
    own.group_matcher = lambda coarse: {"stem": "("}
    with pytest.raises(ModelError, match="does not say which layer"):
        layer_of(own)
