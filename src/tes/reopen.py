"""A finished run, opened again with what it was made from: its images and splits, its start, its trained network.

A run folder may be a stranger's: no path, source, checkpoint or module that it names is opened, fetched or imported on
its word. The caller repeats them, and what is found there is held against what the folder recorded: images by SHA-1,
the backbone by its fingerprint.
"""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from tes import console
from tes.config import BackboneConfig, ImageConfig, ObjectiveConfig, OptimConfig, Settings
from tes.data.classes_file import ClassInfo
from tes.data.dataset import Dataset
from tes.data.scan import scan
from tes.data.source import Sample, Source, open_source
from tes.engine.balance import class_weights
from tes.engine.compute import Compute, resolve_device, resolve_workers
from tes.engine.features import FrozenFeatures
from tes.engine.learner import Learner, one_hot
from tes.engine.solve import HeadProblem, LinearHead
from tes.engine.start import random_head
from tes.errors import ModelError, RunError, listing, one_line
from tes.files import read_json
from tes.models.backbone import Backbone, build_network, load_backbone, own_network
from tes.models.checkpoint import load_strictly, read_weights, run_weights
from tes.models.image_settings import ImageSettings
from tes.models.layers import freeze_all_but_last
from tes.models.precision import emulates_bf16
from tes.objectives.base import ModelOutput, Objective
from tes.objectives.text_head import TextHead
from tes.predictions import HEADS
from tes.run import Run, SplitRow
from tes.text.classifier import TextClassifier

Section = TypeVar("Section", bound=Settings)


@dataclass(eq=False)
class Reopened:
    """A run and what it was made from.

    Attributes:
        run: Its folder.
        learner: The trained network with every head that is saved, in eval mode.
        pretrained: The backbone as training began. Where the head alone was trained this is the learner's own.
        dataset: The images of splits.csv under their recorded paths, labels and splits.
    """

    run: Run
    learner: Learner
    pretrained: Backbone
    dataset: Dataset

    @property
    def moved(self) -> bool:
        """Whether the backbone was trained."""
        return self.pretrained is not self.learner.backbone

    @property
    def train_indices(self) -> np.ndarray:
        """The images that the shipped weights were trained on, a refit included."""
        return np.flatnonzero(np.isin(self.dataset.splits, trained_splits(self.run)))

    @cached_property
    def start_features(self) -> FrozenFeatures:
        """Features of the images under the pre-trained backbone."""
        return FrozenFeatures(self.pretrained, self.dataset, self.learner.compute)

    @cached_property
    def features(self) -> FrozenFeatures:
        """Features of the images under the trained backbone."""
        if not self.moved:
            return self.start_features
        return FrozenFeatures(self.learner.backbone, self.dataset, self.learner.compute)

    def solve_probe(
        self, features: FrozenFeatures, penalty: float, weights: str | Mapping[str, float] = "none"
    ) -> LinearHead:
        """Return the head solved on features of the training images, one-hot labels, no prior (engine/solve.py)."""
        labels_N = self.dataset.labels[self.train_indices]
        target_NC = one_hot(torch.from_numpy(labels_N), self.dataset.num_classes)
        problem = HeadProblem(penalty, class_weight_C=class_weights(weights, self.dataset.classes, labels_N))
        return problem.solve(features(self.train_indices), target_NC).head

    @cached_property
    def start_head(self) -> LinearHead:
        """The vision head that training began with.

        A cell of a comparison with a solved head does not keep it; from a probe it is solved again.

        Raises:
            RunError: It is damaged, or the cell's start needs a text prior.
        """
        path = self.run.file("start_head.safetensors")
        like = self.learner.linear_head()
        if path.is_file():
            tensors = read_weights(path)
            try:
                return _checked_head(tensors["weight"], tensors["bias"], like.weight_CF.shape, f"`{path}`")
            except KeyError as missing:
                raise RunError(f"`{path}` has no {missing}.") from None
        start = self.run.summary.get("start")
        if start == "random":
            return random_head(like.weight_CF.shape[1], len(like.bias_C), int(self.run.settings.get("seed", 0)))
        if start == "probe":
            console.note("this run keeps no start head: it is solved again on the training images")
            optim = section(self.run, "optim", OptimConfig)
            return self.solve_probe(self.start_features, optim.head_penalty, optim.class_weights)
        raise RunError(
            f"`{self.run.path}` keeps no start head (cells of a comparison do not), and `start: {start}` cannot be"
            " solved again without its text; train the arm by itself with `tes train`."
        )

    @cached_property
    def text(self) -> TextClassifier | None:
        """The text classifier that the run's text head holds; None where it has no text head."""
        head = text_head(self.learner)
        if head is None:
            return None
        centre = read_weights(self.run.file("text_head.safetensors")).get("centre")
        rows = self.run.classes
        return TextClassifier(
            labels=tuple(str(row["class"]) for row in rows),
            names=tuple(str(row["name"]) for row in rows),
            prompts=tuple(tuple(map(str, row.get("prompts") or ())) for row in rows),
            Z=head.class_text_CD.cpu().numpy(),
            centre=None if centre is None else centre.numpy(),
            encoder=str((self.run.summary.get("text") or {}).get("encoder")),
        )


def reopen(
    run: Run,
    *,
    data_source: str | None,
    data_root: str | None = None,
    backbone: str | None = None,
    checkpoint: str | None = None,
    network: nn.Module | None = None,
) -> Reopened:
    """Open a run with its images, its pre-trained backbone and its trained network.

    Args:
        run: Finished.
        data_source: Where the images are.
        data_root: Where tasks' data sets are, if they are a task's.
        backbone: The backbone's name, repeated, where it is an own module or has its weights from the Hub.
        checkpoint: Where the pre-trained weights are, if they came from a file.
        network: An own module itself, pre-trained, in place of `backbone`. It is not changed.

    Raises:
        RunError, DataError, ModelError: Something was not repeated, the folder is damaged, images are missing or
            changed, or the backbone is not the one that the run started from.
    """
    compute = recorded_compute(run)
    trained = copy.deepcopy(network) if network is not None else None
    learner = load_learner(run, backbone=backbone, network=trained, compute=compute)
    dataset = reopen_data(run, data_source, data_root)
    if run.summary.get("train") == "head":
        # What was never trained is in the folder itself: no checkpoint, and no network, is needed.
        _require_fingerprint(run, learner.backbone, f"The backbone in `{run.path}`", "the file is damaged")
        return Reopened(run, learner, learner.backbone, dataset)
    recorded = section(run, "backbone", BackboneConfig)
    if ":" in recorded.name and network is None:
        recorded = recorded.model_copy(update={"name": _repeated(recorded.name, backbone)})
    if recorded.checkpoint is not None and checkpoint is None and network is None:
        raise RunError(
            f"`{run.path}` started from the weights in `{recorded.checkpoint}`, which are not opened on a run folder's"
            f" word; if you trust it, repeat it: --checkpoint {shlex.quote(recorded.checkpoint)}."
        )
    if recorded.checkpoint is None and recorded.name not in ("lite0", backbone) and ":" not in recorded.name:
        raise RunError(
            f"`{run.path}` started from the Hub's weights of `{recorded.name}`, which are not fetched on a run folder's"
            f" word; if you want them, repeat it: --backbone {shlex.quote(recorded.name)}."
        )
    # The names of the source classes are not needed, and reading them would open another file.
    recorded = recorded.model_copy(update={"source_classes": None, "checkpoint": checkpoint})
    images = ImageConfig(**ImageSettings.from_dict(read_json(run.path / "preprocess.json", RunError)).to_dict())
    try:
        pretrained = load_backbone(recorded, images, copy.deepcopy(network))
    except ModelError as problem:
        raise ModelError(f"The backbone that `{run.path}` started from cannot be loaded: {problem}") from problem
    what = f"the checkpoint `{recorded.checkpoint}`" if recorded.checkpoint else f"`{recorded.name}`"
    _require_fingerprint(run, pretrained, what[0].upper() + what[1:], "name the right file with --checkpoint")
    _freeze_as_in_training(run, learner.backbone)
    return Reopened(run, learner, pretrained, dataset)


def reopen_data(run: Run, data_source: str | None, data_root: str | None = None) -> Dataset:
    """Return the images of a run's splits.csv, found by their content, with the labels and splits that it recorded.

    Those that the run itself has lost are left out.

    Raises:
        RunError: splits.csv is damaged, or nobody has said where the images are.
        DataError: An image is missing or has changed.
    """
    needed = {"train", "val", "test", *trained_splits(run)}
    without = {entry.get("path") for entry in run.summary.get("lost", ())}  # they became unreadable during the training
    rows = [row for row in run.images if row.split in needed and row.path not in without]
    if data_source is None:
        recorded = (run.settings.get("data") or {}).get("source")
        raise RunError(
            f"The images of `{run.path}` were in `{recorded}`, which is not opened on a run folder's word; say where"
            f" they are: {data_flags(run)}."
        )
    # A part of a task will do, as long as the run's own images are in it.
    source = open_source(data_source, data_root, partial=True)
    where, lost = _find(source, rows)
    if lost:
        are = "is" if len(lost) == 1 else "are"
        raise RunError(
            f"Of the {len(rows)} images of `{run.path}`, {len(lost)} {are} not in `{data_source}` as they were:"
            f" {listing(lost)}; bring them back, or name another --data."
        )
    place = {str(row["class"]): index for index, row in enumerate(run.classes)}
    if unknown := sorted({row.label for row in rows} - place.keys()):
        raise RunError(f"`{run.path}` has images of classes that its classes.json lacks: {listing(unknown)}.")
    return Dataset(
        name=str(run.summary.get("data")),
        classes=saved_classes(run),
        paths=[row.path for row in rows],
        labels=np.array([place[row.label] for row in rows], dtype=np.int64),
        splits=np.array([row.split for row in rows], dtype="<U6"),
        groups=[row.group or None for row in rows],
        sha1s=[row.sha1 for row in rows],
        source=_Recorded(source, where),
        metric=run.primary_metric,
    )


def data_flags(run: Run) -> str:
    """Return the flags that name a run's images, as it recorded them."""
    recorded = run.settings.get("data") or {}
    flags = {"--data": recorded.get("source"), "--data-root": recorded.get("root")}
    return " ".join(f"{flag} {shlex.quote(str(value))}" for flag, value in flags.items() if value)


def saved_classes(run: Run) -> list[ClassInfo]:
    """Return a run's classes with the prompts that stood for them."""
    return [
        ClassInfo(
            label=str(row["class"]),
            name=str(row["name"]),
            prompts=tuple(row.get("prompts") or ()),
            coarse=row.get("coarse"),
        )
        for row in run.classes
    ]


def saved_rows(run: Run) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the vision head's rows (C, F) and, where there is a text head, Z (C, D), from the folder alone.

    Raises:
        RunError: A file is damaged.
    """
    try:
        weight_CF = run_weights(run)["head.weight"]
        path = run.file("text_head.safetensors")
        rows_CD = read_weights(path)["Z"] if path.is_file() else None
    except KeyError as missing:
        raise RunError(f"The model of `{run.path}` has no {missing}.") from None
    for rows in (weight_CF, rows_CD):
        if rows is not None and not (rows.ndim == 2 and len(rows) == len(run.classes) and rows.isfinite().all()):
            raise RunError(f"The model of `{run.path}` does not have a finite row for each of its classes.")
    return weight_CF.float().numpy(), None if rows_CD is None else rows_CD.float().numpy()


def trained_splits(run: Run) -> tuple[str, ...]:
    """Return the splits that the shipped weights were trained on."""
    more = {"trainval": ("val",), "all": ("val", "test", "unused")}.get(str(run.summary.get("refit")), ())
    return ("train", *(("val",) if run.summary.get("protocol") == "paper" else more))


def section(run: Run, name: str, model: type[Section]) -> Section:
    """Return a part of a run's settings.

    Raises:
        RunError: It is damaged.
    """
    try:
        return model.model_validate(run.settings.get(name))
    except ValidationError as problem:
        what = problem.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        where = "does not name a backbone that can be built" if name == "backbone" else f"has a wrong `{name}`"
        raise RunError(f"`{run.path / 'config.yaml'}` {where}: {what}.") from None


def text_head(learner: Learner) -> TextHead | None:
    """Return a learner's text head, where it has one."""
    return getattr(learner.objective, "text_head", None)


class _Recorded(Source):
    """The images of a source under the paths that a run recorded."""

    def __init__(self, source: Source, where: Mapping[str, Sample]) -> None:
        self.name, self.root = source.name, source.root
        self.source, self.where = source, where
        self.samples = list(where.values())

    def read(self, sample: Sample) -> bytes:
        return self.source.read(self.where[sample.path])

    def locate(self, sample: Sample) -> Path | None:
        return self.source.locate(self.where[sample.path])


def _find(source: Source, rows: list[SplitRow]) -> tuple[dict[str, Sample], list[str]]:
    """Return where each recorded image is now, by its recorded path, and those that are nowhere, each with why."""
    by_path = {sample.path: sample for sample in source.samples}
    content = _content(source, [by_path[path] for path in dict.fromkeys(row.path for row in rows) if path in by_path])
    at = {sample.path: sha1 for sample, sha1 in content}
    by_sha1 = {sha1: sample for sample, sha1 in content}
    if any(row.sha1 not in by_sha1 for row in rows):  # moved or renamed: look at all the others
        by_sha1 |= {
            sha1: sample for sample, sha1 in _content(source, [s for s in by_path.values() if s.path not in at])
        }
    where, lost = {}, []
    for row in rows:
        path, sha1 = row.path, row.sha1
        if sha1 in by_sha1:
            where[path] = by_path[path] if at.get(path) == sha1 else by_sha1[sha1]
        else:
            lost.append(f"{path} ({'changed since' if path in by_path else 'missing'})")
    return where, lost


def _content(source: Source, samples: Iterable[Sample]) -> list[tuple[Sample, str]]:
    samples = list(samples)
    return [(sample, sha1) for sample, sha1 in zip(samples, scan(source, samples).sha1s) if sha1 is not None]


def _require_fingerprint(run: Run, backbone: Backbone, what: str, mend: str) -> None:
    recorded = (run.summary.get("backbone") or {}).get("fingerprint")
    if backbone.fingerprint != recorded:
        raise ModelError(
            f"{what} is not the backbone that `{run.path}` started from: the weights, or the code that builds the"
            f" network, have changed (fingerprint {backbone.fingerprint[:12]}, recorded {str(recorded)[:12]}); {mend}."
        )


def _freeze_as_in_training(run: Run, backbone: Backbone) -> None:
    found = re.fullmatch("last-([1-9][0-9]{0,3})", str(run.summary.get("train")))
    if found is not None:
        freeze_all_but_last(backbone.network, int(found[1]))


def _repeated(name: str, backbone: str | None) -> str:
    if backbone is None:
        raise RunError(
            f"The run's backbone is the own module `{name}`, which is not imported on a run folder's word; if"
            f" you trust it, repeat it: --backbone {shlex.quote(name)}."
        )
    return backbone


def _checked_head(weight_CF: Tensor, bias_C: Tensor, shape: tuple[int, ...], what: str) -> LinearHead:
    if tuple(weight_CF.shape) != tuple(shape) or bias_C.shape != (shape[0],):
        raise RunError(
            f"The head in {what} is {tuple(weight_CF.shape)} + {tuple(bias_C.shape)}, but the run has {shape[0]}"
            f" classes and the backbone {shape[1]} features."
        )
    if not (weight_CF.isfinite().all() and bias_C.isfinite().all()):
        raise RunError(f"The head in {what} is not finite; the file is damaged.")
    return LinearHead(weight_CF, bias_C)


def recorded_compute(run: Run) -> Compute:
    """Return the arithmetic that the run was trained in where this machine has its device, else plain fp32.

    bf16 only where the device has instructions for it.
    """
    device, _ = resolve_device("auto")
    num_workers, _ = resolve_workers(None, device)
    recorded = run.settings
    if recorded.get("device") != device:
        return Compute(device, "fp32", "contiguous", num_workers)
    precision = "bf16" if recorded.get("precision") == "bf16" and not emulates_bf16(device) else "fp32"
    layout = "channels_last" if recorded.get("memory_format") == "channels_last" else "contiguous"
    return Compute(device, precision, layout, num_workers)


def load_learner(run: Run, *, backbone: str | None, network: nn.Module | None, compute: Compute) -> Learner:
    """Rebuild a run's network with its trained weights and, where it has one, its text head.

    Raises:
        RunError: The folder is damaged, or its backbone is an own module that was not repeated.
    """
    recorded = section(run, "backbone", BackboneConfig)
    name, kwargs = recorded.name, recorded.kwargs
    images = ImageSettings.from_dict(read_json(run.path / "preprocess.json", RunError))
    weights = run_weights(run)
    if network is None:
        if ":" in name:
            network = own_network(BackboneConfig(name=_repeated(name, backbone), kwargs=kwargs))
        else:
            network = build_network(name, kwargs)
    prefix = "backbone."
    own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    load_strictly(network, own, f"The model of `{run.path}`")
    model = Backbone(network, backbone or name, images, {})
    num_classes = len(run.classes)
    try:
        shape = (num_classes, model.num_features)
        head = _checked_head(weights["head.weight"], weights["head.bias"], shape, f"`{run.path}`")
    except KeyError as missing:
        raise RunError(f"The model of `{run.path}` has no {missing}.") from None
    learner = Learner(model, head, _saved_heads(run, model.num_features, num_classes), compute)
    return compute.place(learner).eval()


class _SavedHeads(Objective):
    """The heads of a finished run: nothing to train, so no objective is looked up on a run folder's word."""

    def __init__(self, text_head: TextHead | None, default_head: str) -> None:
        super().__init__(ObjectiveConfig(name="saved"))
        self.text_head = text_head
        self.default_head = default_head

    def heads(self, out: ModelOutput) -> dict[str, Tensor]:
        # Where the text head is shipped, the vision head is only what training started from.
        vision = {} if self.default_head == "text" else super().heads(out)
        text = {} if self.text_head is None else {"text": self.text_head(out.features_BF)}
        return vision | text


def _saved_heads(run: Run, num_features: int, num_classes: int) -> _SavedHeads:
    path = run.file("text_head.safetensors")
    default_head = run.summary.get("default_head", "vision")
    if default_head not in HEADS:
        raise RunError(f"`{run.path / 'run.json'}` ships the head `{default_head}`; it can be `vision` or `text`.")
    if not path.is_file():
        if default_head == "text":
            raise RunError(f"`{run.path}` ships its text head, but there is no `{path}`.")
        return _SavedHeads(None, default_head)
    tensors = read_weights(path)
    try:
        head = TextHead.from_tensors(tensors, num_features)
    except (KeyError, RuntimeError, ValueError, IndexError) as problem:
        raise RunError(f"`{path}` does not hold a text head: {one_line(problem, 200)}.") from None
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise RunError(f"`{path}` is not finite; the file is damaged.")
    if len(head.class_text_CD) != num_classes:
        raise RunError(f"`{path}` has {len(head.class_text_CD)} text rows; the run has {num_classes} classes.")
    return _SavedHeads(head, default_head)
