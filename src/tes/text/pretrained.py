"""A text network in a folder as transformers saves it: found, fingerprinted, run over sentences, let go of.

The folder is the user's, a package's, or a snapshot of the Hub. Weights are safetensors; no code from it is ever run.
"""

# B sentences of a batch, L tokens, D embedding dimensions

from __future__ import annotations

import contextlib
import json
import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tes.console import note, progress
from tes.errors import TesError, TextError, one_line
from tes.files import sha256_file, sha256_text, user_path
from tes.hub import require_hub
from tes.text.encoder import TextEncoder

if TYPE_CHECKING:
    import torch

BATCH_SIZE = 64
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
FILES = ("*.json", "*.txt", "*.model", "model.safetensors", "model-*.safetensors")
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model")
"""A tokeniser's files, of which there must be one: transformers makes an empty tokeniser where there is none."""


@dataclass(frozen=True)
class Kept:
    """How a library keeps a model in a folder: who, the file that describes it, what to fetch, what it must have.

    `wanted` and `ignored` are patterns of files on the Hub; of `weights`, and of `vocabularies`, one must be there,
    where any are named.
    """

    library: str
    description: str
    wanted: tuple[str, ...]
    ignored: tuple[str, ...] = ("*/*",)  # repositories keep other formats of the same weights in folders below
    weights: tuple[str, ...] = ()
    vocabularies: tuple[str, ...] = ()

    def is_whole(self, folder: Path) -> bool:
        """Whether a folder has all that a model needs."""
        return (folder / self.description).is_file() and self.has_weights(folder) and self.has_vocabulary(folder)

    def has_weights(self, folder: Path) -> bool:
        return not self.weights or any((folder / name).is_file() for name in self.weights)

    def has_vocabulary(self, folder: Path) -> bool:
        return not self.vocabularies or any(any(folder.glob(name)) for name in self.vocabularies)


TRANSFORMERS = Kept("transformers", "config.json", FILES, weights=WEIGHTS, vocabularies=VOCABULARIES)
SENTENCE_TRANSFORMERS = Kept(
    "sentence-transformers",
    "modules.json",
    (*FILES, "[0-9]_*/*.json", "[0-9]_*/*.txt", "[0-9]_*/model.safetensors"),
    ignored=("onnx/*", "openvino/*"),
)
OPEN_CLIP = Kept(
    "open_clip",
    "open_clip_config.json",
    ("open_clip_config.json", "open_clip_model.safetensors"),
    weights=("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
)


class PretrainedEncoder(TextEncoder):
    """Base of the encoders that are a transformers network in a folder."""

    max_tokens = 512
    pooling: str | None = None  # where the encoder leaves a choice

    @property
    @abstractmethod
    def folder(self) -> Path:
        """The folder with config.json, the tokeniser's files and the weights."""

    @abstractmethod
    def load_network(self) -> torch.nn.Module:
        """Return the network in float32, every tensor of it from the folder."""

    @abstractmethod
    def pool(self, output: Any, mask_BL: torch.Tensor) -> torch.Tensor:
        """Return the sentences' embeddings (B, D) from the network's output and the attention mask (B, L)."""

    @cached_property
    def fingerprint(self) -> str:
        """The content of all files that the embeddings depend on, and the settings they are made with."""
        paths = sorted({path for pattern in FILES for path in self.folder.glob(pattern) if path.is_file()})
        content = [part for path in paths for part in (path.name, sha256_file(path))]
        return sha256_text(type(self).__name__, self.pooling, self.max_tokens, *content)

    def encode(self, sentences: Sequence[str]) -> np.ndarray:
        """Return an embedding per sentence, (N, D) float32. Sentences too long for the network are cut.

        Raises:
            TextError: The folder's model or tokeniser cannot be loaded.
        """
        import torch

        # Tokenising must neither warn about, nor break, the data loader's worker processes that are forked later.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        # The generator is put back: a run must not depend on whether the embeddings came from the cache.
        with torch.random.fork_rng(devices=[]), torch.inference_mode(), quiet():
            network = self.load_network().eval()
            tokenizer, limit = self._load_tokenizer(network)
            with explained(self.folder, "its tokeniser"):
                tokens = tokenizer(list(sentences), truncation=True, max_length=limit)
            lengths = [len(ids) for ids in tokens["input_ids"]]
            if num_long := sum(length >= limit for length in lengths):
                note(f"{num_long} of {len(lengths)} sentences reach the {limit} tokens that {self.spec} can read: cut.")
            # Sentences of like length share a batch, so that little of it is padding.
            order = sorted(range(len(lengths)), key=lengths.__getitem__)
            parts = []
            with progress(len(order), f"text embeddings ({self.spec})", unit="sentences") as shown:
                for start in range(0, len(order), BATCH_SIZE):
                    chosen = order[start : start + BATCH_SIZE]
                    batch = tokenizer.pad(
                        {key: [values[index] for index in chosen] for key, values in tokens.items()},
                        return_tensors="pt",
                    )
                    parts.append(self.pool(network(**batch), batch["attention_mask"]).numpy())
                    shown.advance(len(chosen))
        return np.concatenate(parts)[np.argsort(order)]

    def _load_tokenizer(self, network: torch.nn.Module) -> tuple[Any, int]:
        from transformers import AutoTokenizer

        with explained(self.folder, "its tokeniser"):
            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        if tokenizer.vocab_files_names and not TRANSFORMERS.has_vocabulary(self.folder):
            raise TextError(
                f"`{self.folder}` has no tokeniser (none of {', '.join(VOCABULARIES)}); put the model's own beside its"
                " weights, for example with AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)."
            )
        if tokenizer.pad_token is None:
            raise TextError(f"The tokeniser in `{self.folder}` has no padding token; use a BERT- or CLIP-type encoder.")
        limits = [self.max_tokens, tokenizer.model_max_length]
        if positions := getattr(network.config, "max_position_embeddings", None):
            # RoBERTa's position table has two rows that no token can use.
            limits.append(positions - 2 if "roberta" in network.config.model_type else positions)
        return tokenizer, min(limits)


def load(network_class: Any, folder: Path, unused: tuple[str, ...] = (), **arguments: Any) -> torch.nn.Module:
    """Load a transformers network from a folder of safetensors, in float32.

    Args:
        network_class: The class, or a transformers `Auto…`, to load.
        folder: Where it lies.
        unused: Prefixes of tensors that are not needed and may be absent.
        arguments: Passed on to `from_pretrained`.

    Raises:
        TextError: A file is damaged, of another architecture, or lacks tensors; the message names some.
    """
    import torch

    with explained(folder, "its network"):
        network, loaded = network_class.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **arguments,
        )
    absent = {*loaded["missing_keys"], *(name for name, *_ in loaded["mismatched_keys"])}
    if absent := sorted(name for name in absent if not name.startswith(unused)):
        raise TextError(
            f"The weights in `{folder}` lack {len(absent)} tensors of the network in its config.json, or have them in "
            f"another shape, for example `{absent[0]}`; take weights and config.json from the same model."
        )
    return network


@contextlib.contextmanager
def explained(folder: Path, what: str) -> Iterator[None]:
    """Turn what transformers raises while it reads a folder into one sentence."""
    try:
        yield
    except TesError:
        raise
    except Exception as e:  # of any kind, tokenizers' own are plain `Exception`s
        lines = str(e).strip().splitlines() or [type(e).__name__]
        raise TextError(f"`{folder}` holds no text encoder that can be read: {what} fails with: {lines[0]}") from e


def model_folder(kind: str, identifier: str, kept: Kept = TRANSFORMERS) -> Path:
    """Return the folder of a model: the user's own, the local Hub cache's, or fetched from the Hub.

    Args:
        kind: The encoder's name in `text.encoder`, for messages.
        identifier: A folder here, or a name on the Hub.
        kept: How the folder is laid out.

    Raises:
        TextError: There is neither, the Hub cannot be read, or the folder lacks its description or safetensors.
    """
    if not identifier:
        raise TextError(f"`text.encoder: {kind}` needs a model: `{kind}:FOLDER`, or `{kind}:NAME` of the Hub.")
    folder = user_path(identifier)
    if not folder.is_dir():
        if folder.exists():
            raise TextError(f"`{identifier}` is a file; `{kind}:` takes the folder that holds {kept.description}.")
        if identifier.startswith((".", "~", "/")) or folder.is_absolute():
            raise TextError(f"There is no folder `{identifier}` for the text encoder `{kind}`; check the path.")
        folder = _hub_snapshot(kind, identifier, kept)
    if not (folder / kept.description).is_file():
        raise TextError(
            f"`{folder}` has no {kept.description}, so it is no model that {kept.library} saved; check the path."
        )
    if not kept.has_weights(folder):
        if kept is TRANSFORMERS:
            raise TextError(_without_safetensors(kind, identifier))
        raise TextError(f"`{folder}` has none of {', '.join(kept.weights)}; put the model's weights there.")
    return folder


def model_settings(folder: Path) -> dict[str, Any]:
    """Return the content of a model folder's config.json."""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise TextError(f"`{folder / 'config.json'}` cannot be read as JSON: {problem}.") from None
    if not isinstance(settings, dict):
        raise TextError(f"`{folder / 'config.json'}` is no description of a model.")
    return settings


def _hub_snapshot(kind: str, name: str, kept: Kept) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    def snapshot(local_files_only: bool) -> Path:
        wanted, ignored = list(kept.wanted), list(kept.ignored)
        return Path(
            snapshot_download(name, allow_patterns=wanted, ignore_patterns=ignored, local_files_only=local_files_only)
        )

    usable = None
    with contextlib.suppress(LocalEntryNotFoundError, HFValidationError):
        folder = snapshot(local_files_only=True)
        if kept.is_whole(folder):
            return folder
        if (folder / kept.description).is_file() and kept.has_weights(folder):
            usable = folder  # some tokenisers have no files
    offline_choice = (
        f"use `--text minilm`, a model in a local folder (`--text {kind}:FOLDER`) "
        "or embeddings made elsewhere (`--text file:PATH`)"
    )
    try:
        require_hub(name, offline_choice, TextError)
    except TextError:
        if usable is None:
            raise
        return usable
    try:
        return snapshot(local_files_only=False)
    except Exception as problem:
        # Network, disk or Hub, as whichever library is underneath calls it: what was fetched so far is kept.
        reason = one_line(problem)
        raise TextError(
            f"Fetching `{name}` from the Hub broke off ({reason}): run it again, or {offline_choice}."
        ) from problem


def _without_safetensors(kind: str, identifier: str) -> str:
    folder = identifier if user_path(identifier).is_dir() else identifier.rpartition("/")[2]
    parts = ("AutoModel", "AutoTokenizer")
    named = ", ".join(parts)
    convert = "; ".join(f"{part}.from_pretrained('{identifier}').save_pretrained('{folder}')" for part in parts)
    return (
        f"`{identifier}` has no model.safetensors, and other formats can run code when they are opened; if you trust "
        f'it, convert it once with: python -c "from transformers import {named}; {convert}", and take'
        f" `{kind}:{folder}`."
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bars and remarks about unused tensors off the screen."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
