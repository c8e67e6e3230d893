"""`openclip:ID`: open_clip's own rows, from a folder or a file, without running anything that it brings along."""

from __future__ import annotations

import importlib.util
import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tes.config import TextConfig
from tes.errors import MissingExtraError, TextError
from tes.text.encoder import open_encoder

SENTENCES = ["a photo of a red apple", "pear", "the sea horse: a photo of the sea horse", "long " * 100]
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
VISION = {"image_size": 32, "layers": 1, "width": 24, "patch_size": 16, "head_width": 12}
SETTINGS = {"embed_dim": 10, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True}


def encoder(path):
    return open_encoder(TextConfig(encoder=f"openclip:{path}"))


def describe(folder, **changes):
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": SETTINGS | changes}))


@pytest.fixture(scope="module")
def clips():
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    return {kind: getattr(open_clip, kind)(**SETTINGS).eval() for kind in ("CLIP", "CustomTextCLIP")}


@pytest.fixture
def folder(clips, tmp_path):
    describe(tmp_path)
    save_file(clips["CLIP"].state_dict(), tmp_path / "open_clip_model.safetensors")
    return tmp_path


@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin", "epoch_3.pt"])
def test_rows_equal_open_clips(clips, tmp_path, kind, name):
    import open_clip

    describe(tmp_path)
    tensors = clips[kind].state_dict()
    if name.endswith(".safetensors"):
        save_file(tensors, tmp_path / name)
    else:  # as open_clip's own training leaves it
        torch.save(
            {"epoch": 3, "state_dict": {f"module.{key}": tensor for key, tensor in tensors.items()}}, tmp_path / name
        )
    found = encoder(tmp_path / name if name.startswith("epoch") else tmp_path)
    tokens = open_clip.SimpleTokenizer(context_length=12)(SENTENCES)
    with torch.no_grad():
        expected = clips[kind].encode_text(tokens, normalize=True)
    np.testing.assert_allclose(found.embed(SENTENCES), expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(found.image_projection(), clips[kind].visual.proj.detach().T.numpy())


def test_a_text_tower_that_does_not_fit_its_description_is_refused(folder):
    describe(folder, text_cfg=TEXT | {"layers": 3})
    with pytest.raises(TextError, match=r"tensors are missing: transformer\.resblocks\.2"):
        encoder(folder).embed(SENTENCES)
    describe(folder, text_cfg=TEXT | {"vocab_size": 100})
    with pytest.raises(TextError, match="knows 100 tokens"):
        encoder(folder).embed(SENTENCES)
    describe(folder, text_cfg=TEXT | {"no_such_setting": 1})
    with pytest.raises(TextError, match="no_such_setting"):
        encoder(folder).embed(SENTENCES)


@pytest.mark.parametrize("key", ["hf_model_name", "hf_tokenizer_name"])
def test_a_text_tower_of_elsewhere_is_not_fetched(folder, key):
    describe(folder, text_cfg=TEXT | {key: "someone/model"})
    with pytest.raises(TextError, match=r"needs `someone/model` from the Hub"):
        encoder(folder).embed(SENTENCES)


def test_a_pickle_is_refused_and_not_executed(tmp_path):
    proof = tmp_path / "proof"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {proof}",)

    describe(tmp_path)
    torch.save({"state_dict": {"a": torch.ones(1)}, "extra": Evil()}, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(TextError, match="would run code"):
        encoder(tmp_path).embed(SENTENCES)
    assert not proof.exists()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_cfg": {"embed_dim": 3}}', '{"model_cfg": 3}'])
def test_a_damaged_description_is_one_sentence(folder, content):
    (folder / "open_clip_config.json").write_text(content)
    with pytest.raises(TextError, match="does not describe an open_clip model"):
        encoder(folder).embed(SENTENCES)


def test_what_is_not_there_is_said_with_what_to_do(folder, tmp_path):
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(TextError, match=r"no open_clip_config\.json.*get_model_config"):
        encoder(folder / "open_clip_model.safetensors").embed(SENTENCES)
    with pytest.raises(TextError, match=r"no open_clip_config\.json"):
        encoder(folder).embed(SENTENCES)
    describe(folder)
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(TextError, match=r"none of open_clip_model\.safetensors"):
        encoder(folder).embed(SENTENCES)


def test_other_weights_or_another_description_have_another_fingerprint(folder, clips):
    prints = [encoder(folder).fingerprint]
    describe(folder, quick_gelu=False)
    prints.append(encoder(folder).fingerprint)
    save_file(clips["CustomTextCLIP"].state_dict(), folder / "open_clip_model.safetensors")
    prints.append(encoder(folder).fingerprint)
    assert len(set(prints)) == 3


def test_without_the_library_the_extra_is_named(folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "open_clip" else find(name))
    with pytest.raises(MissingExtraError, match=r"install -c constraints.txt '\.\[openclip\]'"):
        encoder(folder).embed(SENTENCES)
