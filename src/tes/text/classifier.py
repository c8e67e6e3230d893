"""The text classifier: Z (C, D), one unit row per class. Row c IS class c; it carries the class's label.

Z_c = normalize(mean over prompts of normalize(encode(prompt))), then, with centring, minus the mean row and to norm 1:
sentence encoders crowd all names into a narrow cone, and the mean row is the cone's axis.
"""

# C classes, D embedding dimensions

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tes.errors import TextError
from tes.text.encoder import SMALLEST_NORM, open_encoder
from tes.text.prompts import class_prompts

if TYPE_CHECKING:
    from tes.config import TextConfig
    from tes.data.classes_file import ClassInfo


@dataclass(frozen=True, eq=False)
class TextClassifier:
    """A unit row per class, and how it came about.

    Attributes:
        labels: The classes, in the data's order.
        names: Their readable names.
        prompts: The sentences of each; none where the rows come from a file.
        Z: (C, D) float32, rows of norm 1 (a row that centring leaves without a direction is 0).
        centre: The mean row (D,) that was subtracted; None without centring.
        encoder: Which encoder made the rows.
        notes: What the user should know, in sentences.
    """

    labels: tuple[str, ...]
    names: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]
    Z: np.ndarray
    centre: np.ndarray | None
    encoder: str
    notes: tuple[str, ...] = ()

    @property
    def uncentred(self) -> np.ndarray:
        """The rows before centring, (C, D) float64 of norm 1."""
        rows = self.Z.astype(np.float64)
        if self.centre is None:
            return rows
        centre = self.centre.astype(np.float64)
        # A row before centring is centre + n z with norm 1: the positive root of n² + 2 n (z · centre) = 1 - |centre|².
        along = rows @ centre
        lengths = -along + np.sqrt(along**2 + 1 - centre @ centre)
        return centre + lengths[:, None] * rows

    def aligned_with(self, classes: Sequence[ClassInfo]) -> None:
        """Refuse data whose classes are not these, in this order.

        Raises:
            TextError: The first row that is another class.
        """
        labels = [info.label for info in classes]
        if len(labels) != len(self.labels):
            raise TextError(f"The text classifier has {len(self.labels)} rows, the data {len(labels)} classes.")
        for index, (row, label) in enumerate(zip(self.labels, labels, strict=True)):
            if row != label:
                order = "; the order differs" if set(labels) == set(self.labels) else ""
                raise TextError(
                    f"Row {index} of the text classifier is `{row}`, class {index} of the data is `{label}`{order}; "
                    "build it from these classes."
                )


def build(classes: Sequence[ClassInfo], config: TextConfig, centre: bool) -> TextClassifier:
    """Embed the classes' text. The encoder is let go of, and not even loaded if the embeddings are in the cache.

    Args:
        classes: The classes, in the data's order.
        config: Encoder, templates, pooling, mix.
        centre: Subtract the mean row.

    Raises:
        TextError: A class has no row, a template has no place for the name, the model or file cannot be read, or all
            classes have the same text.
        MissingExtraError: `minilm` is not installed.

    Example:
        >>> from tes.config import TextConfig
        >>> from tes.data.classes_file import derive_classes
        >>> text = build(derive_classes(["sea_horse", "tick"]), TextConfig(), centre=False)  # doctest: +SKIP
        >>> text.Z.shape, text.prompts[0]  # doctest: +SKIP
        ((2, 384), ('a photo of a sea horse',))
    """
    prompts = [class_prompts(info, config.templates, config.mix) for info in classes]
    encoder = open_encoder(config)
    rows = encoder.embed_classes(classes, prompts)
    notes = list(encoder.notes)
    if not encoder.can_embed_sentences:
        if config.templates or any(info.prompts or info.descriptions for info in classes):
            notes.append(f"{encoder.spec} holds finished rows: templates, descriptions and prompts are not used.")
        prompts = [[] for _ in classes]
    if len(classes) > 1 and np.ptp(rows, axis=0).max() < SMALLEST_NORM:
        raise TextError(
            f"All {len(classes)} classes have the same text (`{classes[0].name}`, `{classes[1].name}`, …), "
            "so it cannot tell them apart; give names or descriptions (in English, for minilm) with --classes,"
            " or train with --objective ce."
        )
    mean_row = None
    if centre:
        rows, mean_row = _centred(rows)
    return TextClassifier(
        labels=tuple(info.label for info in classes),
        names=tuple(info.name for info in classes),
        prompts=tuple(tuple(sentences) for sentences in prompts),
        Z=rows,
        centre=mean_row,
        encoder=encoder.spec,
        notes=tuple(notes),
    )


def _centred(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows minus their mean, at norm 1 (0 where nothing is left), and the mean."""
    mean_row = rows.mean(axis=0, dtype=np.float64)
    rest = rows - mean_row
    norms = np.linalg.norm(rest, axis=1, keepdims=True)
    unit = np.divide(rest, norms, out=np.zeros_like(rest), where=norms >= SMALLEST_NORM)
    return unit.astype(np.float32), mean_row.astype(np.float32)
