"""Pooled features of images that do not change: computed once, kept on disk, found again by content.

A feature's key is what it depends on: the image's bytes (SHA-1), the backbone's weights, how the image was prepared,
and the arithmetic. Shapes: N images, F features.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from tes import console
from tes.data.dataset import Dataset, LostImageError
from tes.engine.compute import Compute
from tes.engine.loader import eval_batches
from tes.engine.memory import ImageMemory
from tes.files import NPZ_DAMAGE, cache_dir, replacing, sha256_text
from tes.models.backbone import Backbone

T = TypeVar("T")
SHARD = 2048
"""Images between two writes to disk: what an interruption can cost."""


class FrozenFeatures:
    """Pooled features of a data set under a backbone that is not trained: each image is run once, whatever asks for it.

    Rows stay in memory, so that the many fits of a comparison do not read the disk again; a draw of shots or a split
    moves no row.
    """

    def __init__(self, backbone: Backbone, dataset: Dataset, compute: Compute) -> None:
        self.backbone, self.dataset, self.compute = backbone, dataset, compute
        self._store = _Store(backbone, compute)
        self._rows_NF = torch.zeros(len(dataset.paths), backbone.num_features)
        self._is_known_N = np.zeros(len(dataset.paths), dtype=bool)

    def __call__(self, indices: np.ndarray) -> Tensor:
        """Return features (n, F), float32 on the CPU, of the images `indices`.

        Raises:
            LostImageError: One of them can no longer be read; see `readable`.
        """
        readable = self.readable(indices)
        if len(readable) < len(indices):
            index = next(iter(set(indices.tolist()) - set(readable.tolist())))
            raise LostImageError(self.dataset.paths[index], self.dataset.name, self.dataset.lost[index])
        return self._rows_NF[torch.from_numpy(indices)]

    def readable(self, indices: np.ndarray) -> np.ndarray:
        """Return those of `indices` that have features: all but images that can no longer be read."""
        # Copies of one image are read once; where that one is lost, the next round reads another.
        while len(missing := self.dataset.present(indices[~self._is_known_N[indices]])):
            self._fetch(missing)
        return indices[self._is_known_N[indices]]

    def _fetch(self, indices: np.ndarray) -> None:
        sha1s = self.dataset.sha1s
        known = self._store.read({sha1s[index] for index in indices})
        missing = list({sha1s[index]: index for index in indices if sha1s[index] not in known}.values())
        if known and missing:
            console.note(f"features: {len(indices) - len(missing)} of {len(indices)} found in the cache")
        wanted = np.array(missing, dtype=np.int64)
        computed = _features(self.backbone, self.dataset, wanted, self.compute) if missing else ()
        for part in _gathered(computed, SHARD):
            rows = {sha1s[index]: row for index, row in part}
            self._store.write(list(rows), np.stack(list(rows.values())))
            known |= rows
        for index in indices.tolist():
            if sha1s[index] in known:
                self._rows_NF[index] = torch.from_numpy(known[sha1s[index]])
                self._is_known_N[index] = True


def compute_features(
    backbone: Backbone, dataset: Dataset, indices: np.ndarray, compute: Compute, memory: ImageMemory | None = None
) -> Tensor:
    """Run the backbone over the images as at test time; return features (N, F), float32 on the CPU.

    The row of an image that can no longer be read is NaN; `dataset.present` tells which. `memory` is for images that
    others will ask for as well.
    """
    rows_NF = torch.full((len(indices), backbone.num_features), torch.nan)
    row_of = {int(index): row for row, index in enumerate(indices)}
    for index, row_F in _features(backbone, dataset, indices, compute, memory):
        rows_NF[row_of[index]] = torch.from_numpy(row_F)
    return rows_NF


def _features(
    backbone: Backbone, dataset: Dataset, indices: np.ndarray, compute: Compute, memory: ImageMemory | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (index, feature (F,)) of every image that can be read, as they are computed."""
    compute.place(backbone).eval()
    with console.progress(len(indices), "features") as progress:
        for batch in eval_batches(dataset, indices, backbone.images, compute, memory):
            with torch.inference_mode(), compute.autocast():
                features_BF = backbone(compute.images(batch.images_B3HW))
            yield from zip(batch.indices_B.tolist(), features_BF.float().cpu().numpy())
            progress.advance(len(features_BF))


def _gathered(items: Iterable[T], number: int) -> Iterator[list[T]]:
    """Yield lists of `number` items; the last one may be shorter."""
    iterator = iter(items)
    while part := list(itertools.islice(iterator, number)):
        yield part


class _Store:
    """The features of one backbone under one preparation and arithmetic: a folder of .npz files, each written whole."""

    def __init__(self, backbone: Backbone, compute: Compute) -> None:
        images = backbone.images.to_dict()
        if images["fit"] == "crop":  # as everything was prepared before there was a choice
            del images["fit"]
        preparation = json.dumps(images, sort_keys=True)
        key = sha256_text(backbone.fingerprint, preparation, compute.device, compute.precision, compute.memory_format)
        self.num_features = backbone.num_features
        self.folder: Path = cache_dir() / "features" / key

    def read(self, wanted: set[str]) -> dict[str, np.ndarray]:
        """Return the rows of `wanted` that are kept here; a damaged file counts as absent."""
        found: dict[str, np.ndarray] = {}
        for path in sorted(self.folder.glob("*.npz")):
            try:
                with np.load(path, allow_pickle=False) as content:
                    names, rows = content["sha1"], content["features"]
                if rows.shape != (len(names), self.num_features) or not np.isfinite(rows).all():
                    raise ValueError("wrong shape or values")
            except NPZ_DAMAGE as problem:
                console.warn(f"the cached features in {path} are damaged and are computed again ({problem})")
                path.unlink(missing_ok=True)
                continue
            found.update((name, row) for name, row in zip(names.tolist(), rows) if name in wanted)
        return found

    def write(self, names: list[str], rows: np.ndarray) -> None:
        """Keep rows (n, F) under the images' SHA-1; a cache that cannot be written costs time, not the run."""
        path = self.folder / f"{sha256_text(*names)[:16]}.npz"
        try:
            with replacing(path) as temporary, temporary.open("wb") as out:
                np.savez(out, sha1=np.array(names), features=rows)
        except OSError as problem:
            console.warn(f"features cannot be cached in {self.folder}: {problem}")
