"""What runs are made from, opened once: the data and the backbone, and what is derived from them on demand."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from tes import data, text
from tes.config import PRIOR_STARTS, Config, TextConfig
from tes.data.dataset import Dataset
from tes.engine.compute import Compute
from tes.engine.features import FrozenFeatures
from tes.engine.prior import CONTROLS, predict_rows
from tes.engine.solve import Prior
from tes.errors import TextError
from tes.models.backbone import Backbone, load_backbone
from tes.text.classifier import TextClassifier
from tes.text.vocabulary import NearestSource, SourceText, embed_source, nearest_source


@dataclass(eq=False)
class Loaded:
    """What runs are made from: opened once, shared by all that follow, never changed by any of them.

    Attributes:
        dataset: Opened, with its official or carved splits; shots are drawn from it per run.
        backbone: Pre-trained.
    """

    dataset: Dataset
    backbone: Backbone
    _texts: dict[TextConfig, TextClassifier] = field(default_factory=dict)
    _sources: dict[TextConfig, SourceText | str] = field(default_factory=dict)
    _nearest: list[NearestSource] | None = None
    _features: dict[Compute, FrozenFeatures] = field(default_factory=dict)

    @staticmethod
    def open(config: Config, network: nn.Module | None = None) -> Loaded:
        """Open the data and load the backbone that `config` names.

        Raises:
            TesError: A sentence about the input or the environment.
        """
        dataset = data.open_dataset(config.data)
        return Loaded(dataset, load_backbone(config.backbone, config.image, network))

    def class_text(self, config: TextConfig) -> TextClassifier:
        """Return the text classifier of the data's classes."""
        config = self._with_templates(config)
        if config not in self._texts:
            built = text.build(self.dataset.classes, config, centre=config.centre is not False)
            built.aligned_with(self.dataset.classes)
            self._texts[config] = built
        return self._texts[config]

    def source_text(self, config: TextConfig) -> SourceText | str:
        """Return the source classes' rows, or, where a text prior is not possible, why."""
        config = self._with_templates(config)
        if config not in self._sources:
            self._sources[config] = _embed_source(self.backbone, config)
        return self._sources[config]

    def nearest(self) -> list[NearestSource] | None:
        """Return the nearest source name per class; None where the backbone's source classes are not known."""
        head = self.backbone.source_head
        if self._nearest is None and head is not None and head.names is not None:
            self._nearest = nearest_source(self.dataset.classes, head.names)
        return self._nearest

    def features(self, compute: Compute) -> FrozenFeatures:
        """Return the data's features under the pre-trained backbone."""
        if compute not in self._features:
            self._features[compute] = FrozenFeatures(self.backbone, self.dataset, compute)
        return self._features[compute]

    def prior(self, config: Config) -> Prior | None:
        """Return the text prior of a settled run; None where its start has none."""
        if config.start not in PRIOR_STARTS:
            return None
        source, head = self.source_text(config.text), self.backbone.source_head
        assert isinstance(source, SourceText) and head is not None, "settle() refuses it"
        control = config.start.removeprefix("probe+")
        rows_CF = predict_rows(
            torch.from_numpy(self.class_text(config.text).uncentred),
            torch.from_numpy(source.rows_SD),
            head.weight_SF,
            config.prior.gamma,
            config.prior.rho,
            control=control if control in CONTROLS else None,
            seed=config.seed,
        )
        return Prior(rows_CF, config.prior.form, config.prior.kappa, config.prior.zero_shot_trust)

    def _with_templates(self, config: TextConfig) -> TextConfig:
        return text.with_templates(config, self.dataset.templates, self.dataset.ensemble)[0]


def _embed_source(backbone: Backbone, config: TextConfig) -> SourceText | str:
    if backbone.source_head is None:
        return f"`{backbone.name}` has no classifier from its pre-training"
    if backbone.source_head.names is None:
        return f"the names of `{backbone.name}`'s source classes are not known (say so with backbone.source_classes)"
    try:
        return embed_source(backbone.source_head.names, config)
    except TextError as problem:
        return f"`{config.encoder}` cannot embed the source classes' names ({problem})"
