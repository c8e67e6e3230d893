"""A run before anything of it is trained: images drawn, gaps decided, texts embedded, and how it is to be scored."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tes import console, data, resume
from tes.config import PRIOR_STARTS, Config, DataConfig
from tes.data.dataset import Dataset
from tes.data.splits import find_units
from tes.engine.features import FrozenFeatures
from tes.engine.fit import Given
from tes.errors import ConfigError
from tes.files import sha256_text
from tes.loaded import Loaded
from tes.objectives import objectives
from tes.objectives.base import Objective
from tes.settle import settle
from tes.text.classifier import TextClassifier
from tes.text.vocabulary import NearestSource

PROTOCOLS = {"val": "val-selected", "paper": "paper"}
"""`--protocol` to what the tables call it."""


@dataclass(frozen=True)
class Protocol:
    """How a run is chosen and scored.

    Attributes:
        name: `val-selected`: whatever is chosen is chosen on val. `paper`: train and val are trained on, and the best
            of the epochs (and trials) on test is kept, as the authors' code does; its figures are test-selected.
        split: `test`, or `val` for designing defaults: test is never opened; at k shots the pool's unused images are
            scored, but for copies of those that were used, and, where nothing was chosen with them, the val images.
        num_trials: Of the search; 1: the defaults.
    """

    name: str = "val-selected"
    split: str = "test"
    num_trials: int = 1

    @property
    def selects_on_test(self) -> bool:
        """Whether val is trained on, and what is chosen is chosen on test."""
        return self.name == "paper"

    def training(self, dataset: Dataset) -> np.ndarray:
        """Return the images that are trained on."""
        val = dataset.indices("val") if self.selects_on_test else []
        return np.sort(np.concatenate([dataset.indices("train"), val]).astype(np.int64))

    def choosing(self, dataset: Dataset) -> np.ndarray:
        """Return the images that epochs and trials are judged by."""
        return dataset.indices("test" if self.selects_on_test else "val")

    def scored(self, dataset: Dataset, config: DataConfig) -> dict[str, np.ndarray]:
        """Return the images that the finished model is scored on, by split; none of them empty."""
        val, test = dataset.indices("val"), dataset.indices("test")
        if self.selects_on_test:
            parts = {"test": test}
        elif self.split == "val":
            parts = {"val": val if config.shots is None else self._unseen(dataset)}
        else:
            parts = {"val": val, "test": test}
        return {name: indices for name, indices in parts.items() if len(indices)}

    def _unseen(self, dataset: Dataset) -> np.ndarray:
        """Return the images of a draw of k shots that nothing was learned from or chosen with, nor their copies."""
        train, val, unused = map(dataset.indices, ("train", "val", "unused"))
        if self.num_trials == 1:
            seen, unseen = train, np.sort(np.concatenate([val, unused]))
        else:
            seen, unseen = np.concatenate([train, val]), unused
        units = find_units(dataset.sha1s, dataset.groups)
        return unseen[~np.isin(units[unseen], units[seen])]


VAL_SELECTED = Protocol()


@dataclass(frozen=True)
class Job:
    """One run, before anything of it is trained: everything is decided, and what it is made from is at hand.

    Attributes:
        asked: The settings as they were given; of a run that goes on, with what was decided for the machine.
        config: The settings without a gap; a trial's differ in what is searched.
        loaded: The data and the backbone.
        given: What a fit builds on, from the run's draw.
        class_text: The text classifier, for objectives and starts that need one.
        sources: The nearest source name per class, for starts with a text prior.
        protocol: How the run is chosen and scored.
        train: The images to train on.
        choosing: The images that epochs and trials are judged by.
    """

    asked: Config
    config: Config
    loaded: Loaded
    given: Given
    class_text: TextClassifier | None
    sources: list[NearestSource] | None
    protocol: Protocol
    train: np.ndarray
    choosing: np.ndarray

    @property
    def arm(self) -> str:
        """What the run is called in a comparison."""
        return self.asked.arm

    @property
    def dataset(self) -> Dataset:
        """The data, with the run's draw."""
        return self.given.dataset

    @property
    def objective_class(self) -> type[Objective]:
        """The class of the objective."""
        return objectives.get(self.config.objective.name)

    @property
    def frozen(self) -> FrozenFeatures | None:
        """The features that hold for the finished model too; None where the backbone is trained."""
        return self.given.features if self.config.train == "head" else None

    def with_settings(self, settings: dict[str, Any]) -> Job:
        """Return the job of a trial."""
        config = self.config.replace(settings)
        return replace(self, config=config, given=replace(self.given, prior=self.loaded.prior(config)))

    def content(self) -> dict[str, str]:
        """Return what settings only name, by hash: a run that goes on must find the same."""
        dataset, class_text = self.dataset, self.class_text
        return {
            "images": sha256_text(dataset.paths, dataset.labels.tolist(), dataset.splits.tolist(), dataset.sha1s),
            "weights": self.loaded.backbone.fingerprint,
            "texts": "" if class_text is None else sha256_text(class_text.Z.tobytes().hex()),
            "protocol": self.protocol.name,
        }


def prepare(
    config: Config,
    loaded: Loaded,
    protocol: Protocol = VAL_SELECTED,
    *,
    store: MutableMapping[str, Any] | None = None,
    begun_in: Path | None = None,
) -> Job:
    """Draw the images, decide what is open, embed the texts, and say all of it; nothing is trained or written.

    Args:
        config: As the user left it; gaps are decided here.
        loaded: The data and the backbone that it names.
        protocol: How the run is chosen and scored.
        store: What arms share, see `Given`.
        begun_in: The folder with the beginning of this very run, if it goes on.

    Raises:
        TesError: What would stop the training.
    """
    objective_class = objectives.get(config.objective.name)
    dataset = data.draw(loaded.dataset, config.data, config.seed)
    _describe(dataset)
    train = protocol.training(dataset)
    if begun_in is not None:
        config = resume.as_begun(config, begun_in)
    settled = settle(config, dataset, loaded.backbone, objective_class, loaded.source_text, len(train))
    asked, config = config, settled.config
    if begun_in is not None:
        resume.refuse_other(config, begun_in)
    choosing = protocol.choosing(dataset)
    if config.start_fallback == "val" and not len(choosing):
        raise ConfigError("`start_fallback: val` needs validation images, and this draw leaves none; leave it out.")
    has_prior = config.start in PRIOR_STARTS
    class_text = None
    if "class_text" in objective_class.needs or has_prior:
        class_text = loaded.class_text(config.text)
        _note_all(class_text.notes)
        for line in loaded.text_warnings(config.text):
            console.warn(line)
    _note_all(loaded.backbone.notes)
    if settled.reasons:
        _note_all(["decided for you:", *settled.reasons])
    rows_CD = torch.from_numpy(class_text.Z) if class_text is not None else None
    given = Given(
        dataset,
        loaded.features(settled.compute),
        rows_CD,
        loaded.prior(config),
        {} if store is None else store,
        loaded.memory,
    )
    return Job(
        asked=asked,
        config=config,
        loaded=loaded,
        given=given,
        class_text=class_text,
        sources=loaded.nearest() if has_prior else None,
        protocol=protocol,
        train=train,
        choosing=choosing,
    )


def _describe(dataset: Dataset) -> None:
    """Say what the data set holds, how its class names are read, and what was left out."""
    counts = ", ".join(f"{len(dataset.indices(split))} {split}" for split in ("train", "val", "test"))
    console.note(f"{dataset.name}: {dataset.num_classes} classes; {counts} images")
    renamed = [f"{info.label} → {info.name}" for info in dataset.classes if info.label != info.name]
    if renamed:
        console.note(f"class names are read as: {', '.join(renamed[:4])}{', …' if len(renamed) > 4 else ''}")
    _note_all(dataset.notes)


def _note_all(lines: Iterable[str]) -> None:
    for line in lines:
        console.note(line)
