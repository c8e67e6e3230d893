"""The writing half of the run folder (the reading half is run.py): one function per group of files."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tes.config import Config
from tes.data.dataset import Dataset
from tes.data.scan import reading_threads
from tes.engine.fit import Fitted
from tes.engine.solve import LinearHead
from tes.errors import DataError, RunError
from tes.files import csv_text, replacing, sha256_file, write_atomic, write_json
from tes.metrics import evaluate_split, write_per_class_csv
from tes.models.image_settings import ImageSettings
from tes.predictions import Predictions
from tes.run import FORMAT
from tes.text.classifier import TextClassifier
from tes.text.vocabulary import NearestSource

MAX_THUMBNAILS = 200
THUMBNAIL_SIDE = 96
PACKAGES = ("tes-vision", "torch", "torchvision", "timm", "transformers", "safetensors", "numpy", "pillow", "pydantic")

RESTS_ON = ("*.safetensors", "predictions/*.npz", "config.yaml", "classes.json", "preprocess.json", "splits.csv")
"""The files that `tes verify` finds unchanged or not."""


class Shared:
    """What all cells of a comparison have in common, kept once, by content, in the comparison's folder `shared/`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names: dict[Any, str] = {}

    def keep(self, name: str, key: Any, write: Callable[[Path], None]) -> str:
        """Return the name under which a file is kept, after writing it if no file of this content is there.

        Args:
            name: As in a run folder, `text_head.safetensors`.
            key: Equal keys mean equal content: saves writing it again only to find it there.
            write: Writes the file.
        """
        if (name, key) not in self._names:
            stem, _, suffix = name.partition(".")
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".", dir=self.folder) as scratch:
                written = Path(scratch) / name
                write(written)
                stored = f"{stem}-{sha256_file(written)}.{suffix}"
                written.replace(self.folder / stored)
            self._names[name, key] = stored
        return self._names[name, key]


def write_inputs(folder: Path, config: Config, images: ImageSettings) -> None:
    """Write what the run is about to be: settings, machine, how images are prepared."""
    write_atomic(folder / "config.yaml", config.to_yaml())
    write_json(folder / "env.json", environment(config.device))
    write_json(folder / "preprocess.json", images.to_dict())


def write_splits(path: Path, dataset: Dataset) -> None:
    """Write which image is in which split."""
    labels = [dataset.classes[index].label for index in dataset.labels]
    rows = zip(dataset.paths, labels, dataset.splits, dataset.groups, dataset.sha1s)
    write_atomic(path, csv_text(("path", "label", "split", "group", "sha1"), rows))


def write_classes(
    folder: Path,
    dataset: Dataset,
    text: TextClassifier | None,
    sources: Sequence[NearestSource] | None = None,
    trust_C: Tensor | None = None,
) -> None:
    """Write what the classes are called, what stands for them, and, of a text prior, its source and the trust in it."""
    rows = []
    for index, info in enumerate(dataset.classes):
        row: dict[str, Any] = {"class": info.label, "name": info.name}
        row["prompts"] = list(text.prompts[index]) if text is not None else []
        if info.coarse is not None:
            row["coarse"] = info.coarse
        if sources is not None:
            source = sources[index]
            row["source"] = {"name": source.name, "cosine": round(source.cosine, 4), "known": source.known}
        if trust_C is not None:
            row["trust"] = round(trust_C[index].item(), 6)
        rows.append(row)
    write_json(folder / "classes.json", {"format": FORMAT, "classes": rows})


def write_predictions(folder: Path, split: str, predictions: Predictions, dataset: Dataset) -> dict[str, Any]:
    """Save a split's predictions and its per-class table; return the metrics of every head."""
    (folder / "predictions").mkdir(exist_ok=True)
    predictions.save(folder / "predictions" / f"{split}.npz")
    head = predictions.heads()[0]
    write_per_class_csv(folder / f"per_class_{split}.csv", predictions, dataset.classes, head)
    return evaluate_split(predictions, coarse_names(dataset))


def write_out_of_fold(folder: Path, predictions: Predictions) -> None:
    """Save what models that had not seen a training image say about it."""
    (folder / "predictions").mkdir(exist_ok=True)
    predictions.save(folder / "predictions" / "train.npz")


def coarse_names(dataset: Dataset) -> list[str] | None:
    """Return every class's coarse class, or None where some class has none."""
    names = [info.coarse for info in dataset.classes]
    return None if any(name is None for name in names) else names


def write_model(folder: Path, fitted: Fitted, text: TextClassifier | None, shared: Shared | None) -> dict[str, str]:
    """Save the shipped model, the head it started from and, where there is one, the text head.

    No time stamp and no path goes into the files: equal training gives equal bytes.

    Args:
        folder: The run's.
        fitted: What was trained.
        text: Its text classifier.
        shared: For a cell with a solved head: backbone and text head are kept there, the cell holds its head alone.

    Returns:
        File of the run to its name in `shared/`.
    """
    learner = fitted.learner
    head = learner.linear_head()
    head_tensors = {"head.weight": head.weight_CF, "head.bias": head.bias_C}
    network = learner.backbone.network
    text_head = getattr(learner.objective, "text_head", None)
    text_tensors = None
    if text_head is not None and text is not None:
        text_tensors = text_head.tensors(None if text.centre is None else torch.from_numpy(text.centre))
    if shared is None:
        model = {f"backbone.{name}": tensor for name, tensor in network.state_dict().items()}
        _save_tensors(folder / "model.safetensors", model | head_tensors)
        write_head(folder / "start_head.safetensors", fitted.start.head)
        if text_tensors is not None:
            _save_tensors(folder / "text_head.safetensors", text_tensors)
        return {}
    _save_tensors(folder / "head.safetensors", head_tensors)
    backbone = {f"backbone.{name}": tensor for name, tensor in network.state_dict().items()}
    kept = {
        "backbone.safetensors": shared.keep(
            "backbone.safetensors", learner.backbone.fingerprint, lambda path: _save_tensors(path, backbone)
        )
    }
    if text_tensors is not None:
        kept["text_head.safetensors"] = shared.keep(
            "text_head.safetensors", _fingerprint(text_tensors), lambda path: _save_tensors(path, text_tensors)
        )
    return kept


def _fingerprint(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write run.json, the last file of a run, with the SHA-256 of those that its figures rest on."""
    files = sorted(path for pattern in RESTS_ON for path in folder.glob(pattern))
    hashes = {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}
    write_json(folder / "run.json", summary | {"files": hashes})


def write_head(path: Path, head: LinearHead) -> None:
    """Save a linear head on the pooled feature."""
    _save_tensors(path, {"weight": head.weight_CF, "bias": head.bias_C})


def environment(device: str | None = None) -> dict[str, Any]:
    """Return versions, hardware, the state of the code and the command that was given; of `device`, or the best one."""
    is_gpu = torch.cuda.is_available() if device is None else device == "cuda"
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git": git_state(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": torch.cuda.get_device_name() if is_gpu else _processor(),
        "cuda": torch.version.cuda if is_gpu else None,
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "packages": versions,
    }


@functools.cache
def git_state() -> dict[str, Any] | None:
    """Return the commit that this code is at and whether it was changed since; None where it is not a clone's."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # installed into somebody's repository, it is not its
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    with replacing(path) as temporary:
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        except SafetensorError as problem:  # how it reports a full disk
            raise RunError(f"`{path}` cannot be written: {problem}.") from None


def write_thumbnails(folder: Path, dataset: Dataset, wanted: Sequence[str], with_test: bool = True) -> None:
    """Keep small copies of up to 200 images for reports that lack the data: the wanted ones, then some of each class.

    The folder appears when all are written, in place of an older one.

    Args:
        folder: Where they go, `<sha1>.jpg`.
        dataset: Reads the images.
        wanted: Paths, the most wanted first.
        with_test: Whether images of the test split may be among them.
    """
    order = {"test": 0, "val": 1, "train": 2, "unused": 3}
    usable = np.ones(len(dataset.labels), dtype=bool) if with_test else dataset.splits != "test"
    by_class = [
        sorted(
            np.flatnonzero((dataset.labels == label) & usable),
            key=lambda index: (order[str(dataset.splits[index])], index),
        )
        for label in range(dataset.num_classes)
    ]
    spread = [members[k] for k in range(max(map(len, by_class))) for members in by_class if k < len(members)]
    index_of = {path: index for index, path in enumerate(dataset.paths)}
    first = [index_of[path] for path in wanted if usable[index_of[path]]]
    chosen = list(dict.fromkeys([*first, *spread]))[:MAX_THUMBNAILS]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        written = Path(scratch) / folder.name
        written.mkdir()

        def write(index: int) -> None:
            with contextlib.suppress(DataError):  # gone since it was trained on: no reason to lose the training
                image = dataset.read_image(index, max_side_hint=2 * THUMBNAIL_SIDE)
                image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
                image.save(written / f"{dataset.sha1s[index]}.jpg", quality=80)

        with reading_threads() as threads:
            list(threads.map(write, map(int, chosen)))
        shutil.rmtree(folder, ignore_errors=True)
        written.replace(folder)
