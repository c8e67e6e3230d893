"""What every head said about every image of a split, saved once; each metric is computed from this and nothing else.

Shapes: n images, C classes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tes.errors import RunError, one_line
from tes.files import NPZ_DAMAGE, write_atomic

_LOGITS = "logits_"


HEADS = ("vision", "text")
"""The classifiers that a network can have; `both` is the mean of their probabilities."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """The logits of a split's images.

    Attributes:
        paths: One path per image, relative to the data, with `/`.
        labels: (n,) int64, the index of each image's class.
        logits: Head to (n, C) float32; `vision`, `text` or both of them.

    Raises:
        RunError: The parts do not fit together, or a logit is not finite.
    """

    paths: list[str]
    labels: np.ndarray
    logits: dict[str, np.ndarray]

    def __post_init__(self) -> None:
        labels = np.asarray(self.labels)
        logits = {head: np.asarray(values) for head, values in self.logits.items()}
        if problem := _problem(list(self.paths), labels, logits):
            raise RunError(f"The predictions do not fit together: {problem}.")
        object.__setattr__(self, "paths", list(self.paths))
        object.__setattr__(self, "labels", labels.astype(np.int64, copy=False))
        object.__setattr__(
            self, "logits", {head: values.astype(np.float32, copy=False) for head, values in logits.items()}
        )

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_classes(self) -> int:
        """C, the number of columns of each head's logits."""
        return next(iter(self.logits.values())).shape[1]

    def heads(self) -> list[str]:
        """Return the heads that can be scored: `vision`, `text`, and `both` (their average) where both exist."""
        own = sorted(self.logits, key=HEADS.index)
        return [*own, "both"] if len(own) == 2 else own

    def log_probabilities(self, head: str) -> np.ndarray:
        """Return log p(class | image), (n, C) float64, each row's exponentials summing to 1.

        `both` is the log of the mean of the two heads' probabilities. Nothing underflows: an improbable class has a
        large negative value, never -inf.

        Raises:
            RunError: There is no such head.
        """
        if head not in self.heads():
            raise RunError(f"There are no predictions of a head `{head}`; there are: {', '.join(self.heads())}.")
        if head == "both":
            return np.logaddexp(self.log_probabilities("vision"), self.log_probabilities("text")) - np.log(2)
        logits_NC = self.logits[head].astype(np.float64)
        logits_NC -= logits_NC.max(axis=1, keepdims=True)
        return logits_NC - np.log(np.exp(logits_NC).sum(axis=1, keepdims=True))

    def probabilities(self, head: str) -> np.ndarray:
        """Return p(class | image), (n, C) float64, rows summing to 1; `both` is the mean of vision's and text's."""
        return np.exp(self.log_probabilities(head))

    def save(self, path: Path | str) -> None:
        """Write an `.npz` with the keys `paths`, `labels` and `logits_<head>`. Equal predictions give equal bytes."""
        content = io.BytesIO()
        logits = {_LOGITS + head: values for head, values in self.logits.items()}
        np.savez(content, paths=np.array(self.paths, dtype=np.str_), labels=self.labels, **logits)
        write_atomic(Path(path), content.getvalue())

    @staticmethod
    def load(path: Path | str) -> Predictions:
        """Read what `save` wrote. Nothing is unpickled.

        Raises:
            RunError: The file is absent, damaged, or no file of predictions.
        """
        try:
            with Path(path).open("rb") as file:
                saved = np.load(file, allow_pickle=False)
                arrays = dict(saved) if isinstance(saved, np.lib.npyio.NpzFile) else {}
        except FileNotFoundError:
            raise RunError(f"There is no file of predictions `{path}`.") from None
        except NPZ_DAMAGE as problem:
            raise RunError(
                f"The predictions in `{path}` cannot be read; the file is damaged: {one_line(problem).rstrip('.')}."
            ) from None
        missing = [key for key in ("paths", "labels") if key not in arrays]
        if missing:
            raise RunError(f"`{path}` is no file of predictions: it has no `{missing[0]}`.")
        paths, labels = arrays["paths"], arrays["labels"]
        if paths.ndim != 1 or paths.dtype.kind != "U":
            raise RunError(f"`{path}` is no file of predictions: its `paths` are not a list of texts.")
        logits = {key.removeprefix(_LOGITS): values for key, values in arrays.items() if key.startswith(_LOGITS)}
        try:
            return Predictions(paths.tolist(), labels, logits)
        except RunError as problem:
            raise RunError(f"`{path}` is damaged: {problem}") from None


def in_common(several: Sequence[Predictions]) -> list[Predictions]:
    """Return the same predictions of the images that all of them have, in the first one's order.

    An image that could no longer be read is in the earlier ones alone.
    """
    shared = set(several[0].paths).intersection(*(said.paths for said in several[1:]))
    wanted = [path for path in several[0].paths if path in shared]
    result = []
    for said in several:
        row_of = {path: row for row, path in enumerate(said.paths)}
        rows = [row_of[path] for path in wanted]
        logits = {head: values[rows] for head, values in said.logits.items()}
        result.append(Predictions(wanted, said.labels[rows], logits))
    return result


def _problem(paths: list[str], labels: np.ndarray, logits: dict[str, np.ndarray]) -> str | None:
    """Say what keeps the parts from being predictions, or return None."""
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        return f"`labels` should be whole numbers, (n,), but are {labels.dtype} {labels.shape}"
    if len(paths) != len(labels):
        return f"there are {len(paths)} paths and {len(labels)} labels"
    if not logits:
        return "there are no logits"
    shapes = {head: values.shape for head, values in logits.items()}
    for head, values in logits.items():
        if head not in HEADS:
            return f"`{head}` is not a head; heads are {' and '.join(f'`{name}`' for name in HEADS)}"
        if values.ndim != 2 or values.dtype.kind != "f":
            return f"the logits of `{head}` should be fractions, (n, C), but are {values.dtype} {values.shape}"
        if len(values) != len(paths):
            return f"there are {len(paths)} paths, but `{head}` has {len(values)} rows of logits"
        if values.shape[1] == 0:
            return f"the logits of `{head}` have no classes"
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is reported below
            is_bad = ~np.isfinite(values.astype(np.float32)).all(axis=1)
        if is_bad.any():
            return f"the logits of `{head}` for `{paths[int(is_bad.argmax())]}` are not finite"
    if len({shape[1] for shape in shapes.values()}) > 1:
        return f"the heads have different numbers of classes, {', '.join(f'{h} {s[1]}' for h, s in shapes.items())}"
    num_classes = next(iter(shapes.values()))[1]
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        first = int(outside.argmax())
        return f"the label {labels[first]} of `{paths[first]}` is outside 0..{num_classes - 1}"
    return None
