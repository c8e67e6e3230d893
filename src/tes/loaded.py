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
from tes.engine.memory import ImageMemory
from tes.engine.prior import CONTROLS, carry_rows, predict_rows
from tes.engine.solve import Prior
from tes.errors import TextError
from tes.models.backbone import Backbone, load_backbone
from tes.text.classifier import TextClassifier
from tes.text.vocabulary import (
    NearestSource,
    SharedSpace,
    SourceText,
    embed_source,
    nearest_source,
    shared_space,
)


@dataclass(eq=False)
class Loaded:
    """What runs are made from: opened once, shared by all that follow, never changed by any of them.

    Attributes:
        dataset: Opened, with its official or carved splits; shots are drawn from it per run.
        backbone: Pre-trained.
        memory: Images that are read already.
    """

    dataset: Dataset
    backbone: Backbone
    memory: ImageMemory = field(default_factory=ImageMemory)
    _texts: dict[TextConfig, TextClassifier] = field(default_factory=dict)
    _warnings: dict[TextConfig, list[str]] = field(default_factory=dict)
    _sources: dict[TextConfig, SourceText | SharedSpace | str] = field(default_factory=dict)
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

    def text_warnings(self, config: TextConfig) -> list[str]:
        """Return what stands in the way of the text classifier, see `text.warnings`."""
        config = self._with_templates(config)
        if config not in self._warnings:
            self._warnings[config] = text.warnings(self.class_text(config), self.dataset.classes)
        return self._warnings[config]

    def source_text(self, config: TextConfig) -> SourceText | SharedSpace | str:
        """Return what a text prior comes from, the source classes' rows or a CLIP's space; or why there can be none."""
        config = self._with_templates(config).model_copy(update={"centre": None})  # source rows are not centred
        if config not in self._sources:
            self._sources[config] = _source_text(self.backbone, config)
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
        name = config.start.removeprefix("probe+")
        control = name if name in CONTROLS else None
        target_CD = torch.from_numpy(self.class_text(config.text).uncentred)
        if isinstance(source, SharedSpace):
            rows_CF = carry_rows(target_CD, torch.from_numpy(source.projection_DF), control, config.seed)
        else:
            assert isinstance(source, SourceText) and head is not None, "settle() refuses it"
            rows_CF = predict_rows(
                target_CD,
                torch.from_numpy(source.rows_SD),
                head.weight_SF,
                config.prior.gamma,
                config.prior.rho,
                control=control,
                seed=config.seed,
            )
        return Prior(rows_CF, config.prior.form, config.prior.kappa, config.prior.zero_shot_trust)

    def _with_templates(self, config: TextConfig) -> TextConfig:
        return text.with_templates(config, self.dataset.templates, self.dataset.ensemble)[0]


def _source_text(backbone: Backbone, config: TextConfig) -> SourceText | SharedSpace | str:
    if backbone.projection_DF is not None:
        return shared_space(backbone.projection_DF.numpy(), config) or (
            f"`{backbone.name}` is the image tower of a CLIP, and `{config.encoder}` is not known to be its text tower"
            " (take both from one model: --text openclip:… or clip:…)"
        )
    if backbone.source_head is None:
        return f"`{backbone.name}` has no classifier from its pre-training"
    if backbone.source_head.names is None:
        return f"the names of `{backbone.name}`'s source classes are not known (say so with backbone.source_classes)"
    try:
        return embed_source(backbone.source_head.names, config)
    except TextError as problem:
        return f"`{config.encoder}` cannot embed the source classes' names ({problem})"
