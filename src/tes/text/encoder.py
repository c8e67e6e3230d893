"""What turns sentences, or classes, into rows: the base of all text encoders, and their names.

A new encoder is one file: a subclass of `TextEncoder`, and a line in `encoders` (another package's: an entry point).
"""

# N sentences, C classes, D embedding dimensions

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tes.console import warn
from tes.errors import ConfigError, TextError
from tes.files import NPZ_DAMAGE, cache_dir, sha256_text, write_atomic
from tes.registry import Registry

if TYPE_CHECKING:
    from tes.config import TextConfig
    from tes.data.classes_file import ClassInfo

SMALLEST_NORM = 1e-6  # a shorter vector has no direction worth the name

encoders = Registry(
    "text encoder",
    {
        "minilm": "tes.text.minilm:MiniLMEncoder",
        "bert": "tes.text.bert:BertEncoder",
        "clip": "tes.text.clip:ClipEncoder",
        "st": "tes.text.sentence:SentenceEncoder",
        "openclip": "tes.text.open_clip:OpenClipEncoder",
        "file": "tes.text.file:FileEncoder",
    },
    "tes.encoders",
)


class TextEncoder(ABC):
    """Embeds sentences. Opening one is cheap: a network is loaded only when sentences are not in the cache.

    Args:
        identifier: What follows the colon in `text.encoder`; "" if there is none.
        config: The text settings, for those that concern the encoder (`pooling`).

    Attributes:
        spec: The encoder as the user wrote it, and what else decides its rows.
        fingerprint: Equal fingerprints mean equal embeddings; known without loading a network.
        can_embed_sentences: False where rows are looked up by class, so that prompts mean nothing.
        notes: What the user should know, in sentences.
    """

    spec: str
    fingerprint: str
    can_embed_sentences: bool = True

    def __init__(self, identifier: str, config: TextConfig) -> None:
        self.notes: list[str] = []

    @abstractmethod
    def encode(self, sentences: Sequence[str]) -> np.ndarray:
        """Return an embedding per sentence, (N, D) float32, of any length; a network is let go of on return."""

    def image_projection(self) -> np.ndarray | None:
        """Return what carries the pooled feature of the image tower that this text tower was trained with to the space
        of the embeddings, (D, F features); None where there is no such tower.
        """
        return None

    def embed(self, sentences: Sequence[str]) -> np.ndarray:
        """Return a unit row per sentence, (N, D) float32, from the cache where these sentences were embedded before."""
        distinct = sorted(set(sentences))
        path = cache_dir() / "text" / f"{sha256_text(self.fingerprint, *distinct)}.npz"
        rows = _read_cache(path, len(distinct))
        if rows is None:
            rows = unit_rows(self.encode(distinct), [f"the sentence `{sentence}`" for sentence in distinct])
            _write_cache(path, rows)
        place = {sentence: index for index, sentence in enumerate(distinct)}
        return rows[[place[sentence] for sentence in sentences]]

    def embed_classes(self, classes: Sequence[ClassInfo], prompts: Sequence[Sequence[str]]) -> np.ndarray:
        """Return a unit row per class, (C, D) float32: the direction of the mean of its prompts' unit rows."""
        rows = self.embed([sentence for sentences in prompts for sentence in sentences])
        ends = np.cumsum([len(sentences) for sentences in prompts])
        means = [part.mean(axis=0, dtype=np.float64) for part in np.split(rows, ends[:-1])]
        return unit_rows(np.stack(means), [f"the prompts of class `{info.label}`" for info in classes])


def open_encoder(config: TextConfig) -> TextEncoder:
    """Return the encoder that `text.encoder` names: "minilm", or, for example, "bert:ID" or "file:PATH".

    Raises:
        ConfigError: There is no such encoder.
        TextError: Its model or file is not there.
    """
    name, _, identifier = config.encoder.partition(":")
    if name not in encoders.names() and name.endswith((".npz", ".safetensors")):
        raise ConfigError(f"`text.encoder` is a file: write `file:{config.encoder}`.")
    return encoders.get(name)(identifier, config)


def unit_rows(rows: np.ndarray, what: Sequence[str]) -> np.ndarray:
    """Return the rows (N, D) at norm 1 in float32; `what` says of each what it embeds, for the message.

    Raises:
        TextError: A row is zero or not finite.
    """
    exact = np.asarray(rows, dtype=np.float64)
    norms = np.linalg.norm(exact, axis=1, keepdims=True)
    for wrong in np.flatnonzero(~np.isfinite(norms[:, 0])):
        raise TextError(f"The text embedding of {what[wrong]} has values that are not finite; embed it again.")
    for wrong in np.flatnonzero(norms[:, 0] < SMALLEST_NORM):
        raise TextError(f"The text embedding of {what[wrong]} is zero, so it has no direction; embed it again.")
    return (exact / norms).astype(np.float32)


def _read_cache(path: Path, num_rows: int) -> np.ndarray | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            rows = stored["embeddings"]
    except NPZ_DAMAGE:
        return None  # absent, or damaged: the sentences are embedded again
    usable = rows.ndim == 2 and len(rows) == num_rows and rows.dtype == np.float32 and np.isfinite(rows).all()
    return rows if usable else None


def _write_cache(path: Path, rows: np.ndarray) -> None:
    content = io.BytesIO()
    np.savez(content, embeddings=rows)
    try:
        write_atomic(path, content.getvalue())
    except OSError as problem:
        warn(f"text embeddings could not be kept in `{path.parent}` ({problem.strerror}); they are computed each time")
