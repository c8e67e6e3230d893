"""`file:PATH`: rows that were embedded elsewhere, found by the class's name.

`.npz` with `names` (N,) and `embeddings` (N, D), or `.safetensors` with a tensor `embeddings` and, in its metadata,
`names` as a JSON list. Nothing in the file is ever unpickled.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tes.data.names import match_key
from tes.errors import ConfigError, TextError, listing
from tes.files import NPZ_DAMAGE, sha256_file, user_path
from tes.text.encoder import TextEncoder, unit_rows

if TYPE_CHECKING:
    from tes.config import TextConfig
    from tes.data.classes_file import ClassInfo


class FileEncoder(TextEncoder):
    """Rows of a file. They may be float16 and of any length; rows that name no class are ignored and counted."""

    can_embed_sentences = False

    def __init__(self, identifier: str, config: TextConfig) -> None:
        super().__init__(identifier, config)
        if config.pooling is not None:
            raise ConfigError("`text.pooling` is for `bert:ID`; a file's rows are pooled already, leave it out.")
        self.path = user_path(identifier)
        self.spec = f"file:{identifier}"
        if not self.path.is_file():
            raise TextError(f"There is no file `{identifier}` to read text embeddings from; write `file:PATH`.")
        self.fingerprint = f"file {sha256_file(self.path)}"

    def encode(self, sentences: Sequence[str]) -> np.ndarray:
        """Refuse: a file has no network.

        Raises:
            TextError: Always.
        """
        raise TextError(f"`{self.spec}` holds rows for names and cannot embed sentences; use `--text minilm` for that.")

    def embed_classes(self, classes: Sequence[ClassInfo], prompts: Sequence[Sequence[str]]) -> np.ndarray:
        """Return the unit row of each class, (C, D) float32; the prompts mean nothing here.

        A row belongs to a class by the exact label, else by the exact readable name, else by the name with case and
        punctuation left aside.

        Raises:
            TextError: The file cannot be read, or a class has no row, or several that differ.
        """
        names, embeddings_ND = self._read()
        found = _rows_of_classes(classes, names)
        used = {row for rows in found for row in rows}
        if missing := [info.label for info, rows in zip(classes, found, strict=True) if not rows]:
            spare = [name for row, name in enumerate(names) if row not in used]
            unused = f"; its rows that no class has: {listing(spare)}" if spare else ""
            raise TextError(
                f"`{self.path}` has no row for {len(missing)} of {len(classes)} classes: {listing(missing)}{unused}; "
                "rename the rows, name the classes with --classes, or leave them out with --only-classes."
            )
        for info, rows in zip(classes, found, strict=True):
            if len(rows) > 1 and (embeddings_ND[rows] != embeddings_ND[rows[0]]).any():
                raise TextError(
                    f"`{self.path}` has {len(rows)} different rows for the class `{info.label}` "
                    f"({listing([names[row] for row in rows])}); keep one."
                )
        if ignored := len(names) - len(used):
            self.notes.append(f"{ignored} of {len(names)} rows of `{self.path.name}` name no class here: ignored.")
        return unit_rows(embeddings_ND[[rows[0] for rows in found]], [f"class `{info.label}`" for info in classes])

    def _read(self) -> tuple[list[str], np.ndarray]:
        readers = {".npz": _read_npz, ".safetensors": _read_safetensors}
        if self.path.suffix not in readers:
            raise TextError(f"`{self.path}` is neither .npz nor .safetensors; save `names` and `embeddings` as one.")
        names, embeddings_ND = readers[self.path.suffix](self.path)
        if embeddings_ND.dtype.kind != "f" or embeddings_ND.ndim != 2 or 0 in embeddings_ND.shape:
            raise TextError(
                f"`embeddings` in `{self.path}` must be numbers with a point, one row per name, "
                f"not {embeddings_ND.dtype} of shape {embeddings_ND.shape}."
            )
        if len(names) != len(embeddings_ND):
            raise TextError(f"`{self.path}` has {len(names)} names for {len(embeddings_ND)} rows; each row needs one.")
        return names, embeddings_ND


def _rows_of_classes(classes: Sequence[ClassInfo], names: Sequence[str]) -> list[list[int]]:
    """Return, per class, the rows that the closest way of matching finds."""
    exact: dict[str, list[int]] = defaultdict(list)
    loose: dict[str, list[int]] = defaultdict(list)
    for row, name in enumerate(names):
        exact[name].append(row)
        loose[match_key(name)].append(row)
    return [
        exact.get(info.label)
        or exact.get(info.name)
        or loose.get(match_key(info.label))
        or loose.get(match_key(info.name))
        or []
        for info in classes
    ]


def _read_npz(path: Path) -> tuple[list[str], np.ndarray]:
    try:
        stored = np.load(path, allow_pickle=False)
        if not isinstance(stored, np.lib.npyio.NpzFile):
            raise TextError(f"`{path}` is one bare array; save it with np.savez(path, names=…, embeddings=…).")
        with stored:
            if absent := [key for key in ("names", "embeddings") if key not in stored.files]:
                raise TextError(f"`{path}` has no array `{absent[0]}`; it has: {listing(stored.files) or 'nothing'}.")
            names, embeddings_ND = stored["names"], stored["embeddings"]
        if names.dtype.kind == "S":
            names = np.char.decode(names, "utf-8")
    except TextError:
        raise
    except NPZ_DAMAGE as problem:
        if "pickle" in str(problem):
            raise TextError(
                f"`{path}` holds pickled objects, which could run code and are never opened; save `names` with "
                "np.array(names, dtype=str) and `embeddings` as float32."
            ) from None
        raise TextError(f"`{path}` cannot be read as .npz: {problem}.") from None
    if names.ndim != 1 or names.dtype.kind != "U":
        raise TextError(f"`names` in `{path}` must be a list of words, not {names.dtype} of shape {names.shape}.")
    return names.tolist(), embeddings_ND


def _read_safetensors(path: Path) -> tuple[list[str], np.ndarray]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as stored:
            if "embeddings" not in stored.keys():  # noqa: SIM118 (no mapping)
                raise TextError(f"`{path}` has no tensor `embeddings`; it has: {listing(list(stored.keys()))}.")
            names = json.loads((stored.metadata() or {}).get("names", "null"))
            embeddings_ND = stored.get_tensor("embeddings")
    except TextError:
        raise
    except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as problem:
        raise TextError(f"`{path}` cannot be read: {problem}; save float32 or float16.") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TextError(f"`{path}` must carry `names`, a JSON list of words, in its metadata.")
    return names, embeddings_ND
