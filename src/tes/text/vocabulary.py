"""What the source classes of a pre-trained head are called, as text: what a text prior is carried over by.

Shapes: S source classes, C classes, D dimensions of the text embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tes.config import TextConfig
from tes.data.classes_file import ClassInfo
from tes.data.names import match_key
from tes.errors import MissingExtraError
from tes.text.encoder import open_encoder
from tes.text.prompts import class_prompts

KNOWN_COSINE = 0.85
SAME_PROJECTION = 0.01
"""Relative distance up to which two projections are one: bfloat16 rounds by up to 0.004."""


@dataclass(frozen=True)
class NearestSource:
    """The source class whose name is nearest to a class's, and whether it is near enough to be called known."""

    name: str
    cosine: float
    known: bool


@dataclass(frozen=True, eq=False)
class SourceText:
    """The source names' rows (S, D), unit norm and not centred, by the encoder that embeds the classes."""

    names: tuple[str, ...]
    rows_SD: np.ndarray


@dataclass(frozen=True, eq=False)
class SharedSpace:
    """That the text encoder embeds into the space of a CLIP image tower, and what carries a feature there (D, F)."""

    projection_DF: np.ndarray


def shared_space(projection_DF: np.ndarray, config: TextConfig) -> SharedSpace | None:
    """Return the space that an image tower with this projection shares with the text encoder; None without one.

    They are one CLIP where the encoder's own files hold the same projection: two models that were trained apart do not
    agree on one, and a copy in half precision does up to its rounding.
    """
    own_DF = open_encoder(config).image_projection()
    if own_DF is None or own_DF.shape != projection_DF.shape:
        return None
    distance = np.linalg.norm(own_DF.astype(np.float64) - projection_DF) / np.linalg.norm(projection_DF)
    return SharedSpace(projection_DF) if distance < SAME_PROJECTION else None


def embed_source(names: Sequence[str], config: TextConfig) -> SourceText:
    """Embed the source classes' names as the classes' are, with the same templates.

    Raises:
        TextError: The encoder has no row for some of them.
    """
    infos = [ClassInfo(name, name) for name in names]
    encoder = open_encoder(config)
    rows_SD = encoder.embed_classes(infos, [class_prompts(info, config.templates) for info in infos])
    return SourceText(tuple(names), rows_SD)


def nearest_source(classes: Sequence[ClassInfo], names: Sequence[str]) -> list[NearestSource]:
    """Return, per class, the nearest source name; known from a cosine of 0.85 on.

    Always by `minilm`, whatever the run's encoder, so that the partition into known names and others does not move
    with it; where `minilm` is not installed, equal readable names are known.
    """
    try:
        config = TextConfig(encoder="minilm")
        source_SD = embed_source(names, config).rows_SD.astype(np.float64)
        infos = [ClassInfo(info.name, info.name) for info in classes]
        target_CD = open_encoder(config).embed_classes(infos, [class_prompts(info) for info in infos])
    except MissingExtraError:
        return _equal_names(classes, names)
    mean_D = source_SD.mean(axis=0)
    cosine_CS = _unit(target_CD - mean_D) @ _unit(source_SD - mean_D).T
    best_C = cosine_CS.argmax(axis=1)
    cosines_C = cosine_CS.max(axis=1)
    return [
        NearestSource(names[best], float(cosine), bool(cosine > KNOWN_COSINE))
        for best, cosine in zip(best_C.tolist(), cosines_C.tolist())
    ]


def _equal_names(classes: Sequence[ClassInfo], names: Sequence[str]) -> list[NearestSource]:
    by_key = {match_key(name): name for name in names}
    found = [by_key.get(match_key(info.name)) for info in classes]
    return [NearestSource(name or "", float(name is not None), name is not None) for name in found]


def _unit(rows_ND: np.ndarray) -> np.ndarray:
    return rows_ND / np.maximum(np.linalg.norm(rows_ND, axis=1, keepdims=True), 1e-12)
