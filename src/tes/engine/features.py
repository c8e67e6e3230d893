"""Pooled features of images that do not change: computed once, kept on disk, found again by content.

A feature's key is what it depends on: the image's bytes (SHA-1), the backbone's weights, how the image was prepared,
and the arithmetic. Shapes: N images, F features.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tes import console
from tes.data.dataset import Dataset
from tes.engine.compute import Compute
from tes.engine.loader import eval_batches
from tes.files import NPZ_DAMAGE, cache_dir, replacing, sha256_text
from tes.models.backbone import Backbone

SHARD = 2048
"""Images between two writes to disk: what an interruption can cost."""


def frozen_features(backbone: Backbone, dataset: Dataset, indices: np.ndarray, compute: Compute) -> Tensor:
    """Return features (N, F), float32 on the CPU, of the images `indices` under a backbone that is not trained."""
    store = _Store(backbone, compute)
    known = store.read({dataset.sha1s[index] for index in indices})
    missing = list({dataset.sha1s[index]: index for index in indices if dataset.sha1s[index] not in known}.values())
    if known and missing:
        console.note(f"features: {len(indices) - len(missing)} of {len(indices)} found in the cache")
    for start in range(0, len(missing), SHARD):
        part = np.array(missing[start : start + SHARD])
        label = f"features ({start + len(part)}/{len(missing)})" if len(missing) > SHARD else "features"
        rows = compute_features(backbone, dataset, part, compute, label)
        keys = [dataset.sha1s[index] for index in part]
        store.write(keys, rows.numpy())
        known.update(zip(keys, rows.numpy()))
    if not len(indices):
        return torch.zeros(0, backbone.num_features)
    return torch.from_numpy(np.stack([known[dataset.sha1s[index]] for index in indices]))


def compute_features(
    backbone: Backbone, dataset: Dataset, indices: np.ndarray, compute: Compute, label: str = "features"
) -> Tensor:
    """Run the backbone over the images as at test time; return features (N, F), float32 on the CPU."""
    compute.place(backbone).eval()
    rows = []
    with torch.inference_mode(), console.progress(len(indices), label) as progress:
        for batch in eval_batches(dataset, indices, backbone.images, compute):
            with compute.autocast():
                features_BF = backbone(compute.images(batch.images_B3HW))
            rows.append(features_BF.float().cpu())
            progress.advance(len(features_BF))
    return torch.cat(rows).clone() if rows else torch.zeros(0, backbone.num_features)


class _Store:
    """The features of one backbone under one preparation and arithmetic: a folder of .npz files, each written whole."""

    def __init__(self, backbone: Backbone, compute: Compute) -> None:
        preparation = json.dumps(backbone.images.to_dict(), sort_keys=True)
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
