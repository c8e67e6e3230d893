"""Everything that the user left open is decided here, once, and each decision carries its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tes.config import PRIOR_STARTS, Config, TextConfig
from tes.data.dataset import Dataset
from tes.engine.balance import class_weights
from tes.engine.compute import Compute, resolve_device, resolve_workers
from tes.engine.loader import steps_per_epoch
from tes.errors import ConfigError
from tes.models.backbone import Backbone
from tes.models.layers import batch_norms, count_layers, layer_of
from tes.models.precision import resolve_precision
from tes.objectives.base import Objective
from tes.text.prompts import with_templates
from tes.text.vocabulary import SharedSpace, SourceText

NUM_EPOCHS = 20
# A solved head has large weights, and its first gradients are large too: AdamW's steps do not depend on their size,
# where SGD at 0.01 from the same start diverged within ten steps (LOG.md, 2026-11-24). Transformers get less by custom.
# Networks with batch norms get another one from AdamW and a solved head, see below.
LEARNING_RATE = {
    "adamw": {"conv": 1e-4, "depthwise": 1e-4, "transformer": 3e-5},
    "sgd": {"conv": 1e-3, "depthwise": 1e-3, "transformer": 1e-3},
}
RATE_TIMES_FEATURES, MAX_RATE = 0.3, 1e-3
"""From a solved head, AdamW's rate of a network with batch norms is inverse to its number of features, up to a limit.
Adam moves every weight by about the rate, so that a wide layer's output moves further than a narrow one's (Yang et al.:
Tensor Programs V, 2022). MobileNetV1 x 0.25 gained 3 to 7 points by it on data far from ImageNet, MobileNetV2 2 to 3;
near ImageNet `ce` lost up to one, `tes` none (LOG.md, 2026-11-28)."""
RANDOM_START = {"adamw": (3.0, 10.0), "sgd": (10.0, 1.0)}
"""From a random head: the backbone's rate in units of LEARNING_RATE, and the head's in units of the backbone's. Such a
head has far to go, and an arm that starts from one would else be judged by its undertraining (LOG.md, 2026-11-25)."""
RANDOM_WARMUP = 0.1
"""Without it MobileNetV2 fell to chance from a random head at 4 images a class (LOG.md, 2026-11-28); from a solved head
it changes nothing."""

STEPPED = {
    "augment.mixup": (0,),
    "augment.cutmix": (0,),
    "optim.layer_decay": (None, 1),
    "optim.ema": (None,),
    "optim.sampling": ("uniform",),
    "start_fallback": ("none",),
}
"""Options of a training that takes steps, each with the values that switch it off: refused where a head is solved."""


@dataclass(frozen=True)
class Settled:
    """Settings without a gap, where the run computes, and a line of reason for every decision."""

    config: Config
    compute: Compute
    reasons: list[str]


def check_needs(config: Config, objective_class: type[Objective]) -> None:
    """Refuse what cannot work before anything is loaded.

    Raises:
        ConfigError: The objective, the start and what is trained do not go together.
    """
    if "frozen_teacher" in objective_class.needs:
        raise ConfigError(f"The objective `{config.objective.name}` needs a frozen teacher, and there is none yet.")
    if config.data.shots == 0:
        if config.train not in ("auto", "head"):
            raise ConfigError(
                f"0 shots leave nothing to train on: with `--shots 0` leave `--train {config.train}` out."
            )
        if config.start not in (None, "auto", *PRIOR_STARTS):
            raise ConfigError(f"0 shots need a text prior, and `start: {config.start}` has none; use --start prior.")
        if config.refit in ("trainval", "all"):
            raise ConfigError(
                f"`--shots 0` uses no label, and `refit: {config.refit}` would train on some; leave it out."
            )
    if "two_views" in objective_class.needs and (config.augment.mixup or config.augment.cutmix):
        raise ConfigError(
            f"The objective `{config.objective.name}` compares images by their class, and a mixed image has two; leave"
            " augment.mixup and augment.cutmix out."
        )
    if config.optim.accumulate > 1 and "whole_batch" in objective_class.needs:
        raise ConfigError(
            f"The objective `{config.objective.name}` looks at a batch as a whole; leave `optim.accumulate` at 1 (a"
            " smaller optim.batch_size saves memory as well)."
        )
    if config.start_fallback == "val" and config.start == "random":
        raise ConfigError("`start_fallback: val` would ship a random head; leave it out, or choose another --start.")
    if config.start_fallback == "val" and config.refit in ("trainval", "all"):
        raise ConfigError(
            f"`start_fallback: val` chooses on val between what was trained and its start, and `refit: {config.refit}`"
            " would train on val; give one of them."
        )
    if config.train != "head":
        return
    if wanted := [key for key, off in STEPPED.items() if config.value(key) not in off]:
        raise ConfigError(
            f"`{wanted[0]}` changes nothing with `train: head`, where a head is solved, not stepped; add `--train all`."
        )
    if config.start == "random":
        raise ConfigError(
            "`start: random` with `train: head` would measure undertraining, since a head is solved, not stepped; add"
            " `--train all`."
        )
    if "trainable_backbone" in objective_class.needs:
        raise ConfigError(f"The objective `{config.objective.name}` trains the backbone; use it with `--train all`.")


def settle(
    config: Config,
    dataset: Dataset,
    backbone: Backbone,
    objective_class: type[Objective],
    source_text: Callable[[TextConfig], SourceText | SharedSpace | str],
    num_images: int | None = None,
) -> Settled:
    """Decide device, arithmetic, image settings, what is trained, the start, the refit and the optimiser's budget.

    Args:
        config: As the user left it.
        dataset: With its draw.
        backbone: Loaded.
        objective_class: Of `config.objective`.
        source_text: Returns what a text prior comes from, or why there can be none; asked only where a start wants to
            know.
        num_images: How many are trained on; None: those of the split `train`.

    Raises:
        ConfigError: The user asked for a text prior where there can be none, or for 0 shots without one; or the
            objective needs a source head and the backbone has none.
    """
    if "source_head" in objective_class.needs:
        _check_source_head(config, backbone)
    made = Decisions(config)
    compute = _settle_compute(made, backbone.family)
    for key, why in backbone.origin.items():
        made.decide(f"image.{key}", getattr(backbone.images, key), why)
    _settle_train(made, compute.device, backbone)
    for key, (value, why) in config.objective.decide(made.config.train).items():
        made.decide(f"objective.{key}", value, why)
    _settle_start(made, backbone, objective_class, source_text)
    if "class_text" in objective_class.needs and config.text.centre is None:
        made.decide("text.centre", True, "class names crowd in a narrow cone")
    if "class_text" in objective_class.needs or made.config.start in PRIOR_STARTS:
        _settle_templates(made, dataset)
    _settle_refit(made)
    if made.config.train != "head":
        _settle_steps(made, dataset, backbone, len(dataset.indices("train")) if num_images is None else num_images)
    class_weights(config.optim.class_weights, dataset.classes, dataset.labels)  # refuses names that no class has
    check_needs(made.config, objective_class)
    return Settled(made.config, compute, made.reasons)


class Decisions:
    """What was decided so far, and a line of reason for each.

    Attributes:
        asked: The settings as the user left them.
        reasons: "  KEY = VALUE  (WHY)".
    """

    def __init__(self, asked: Config) -> None:
        self.asked = asked
        self.reasons: list[str] = []
        self._values: dict[str, Any] = {}

    @property
    def config(self) -> Config:
        """The settings with what is decided so far."""
        return self.asked.replace(self._values)

    def decide(self, key: str, value: Any, why: str) -> Any:
        """Take down a decision, and return its value."""
        self._values[key] = value
        shown = value
        if isinstance(value, tuple):
            shown = [round(part, 4) if isinstance(part, float) else part for part in value]
        self.reasons.append(f"  {key} = {shown}  ({why})")
        return value


def _settle_compute(made: Decisions, family: str) -> Compute:
    config = made.asked
    device = made.decide("device", *resolve_device(config.device))
    precision, memory_format, why = resolve_precision(config.precision, config.memory_format, device, family)
    if config.precision == "auto":
        made.decide("precision", precision, why)
    if config.memory_format == "auto":
        made.decide("memory_format", memory_format, why)
    num_workers = made.decide("num_workers", *resolve_workers(config.num_workers, device))
    return Compute(device, precision, memory_format, num_workers)


def _settle_train(made: Decisions, device: str, backbone: Backbone) -> None:
    config = made.asked
    if config.train == "auto" and config.data.shots == 0:
        made.decide("train", "head", "0 shots: nothing moves the backbone")
    elif config.train == "auto" and device == "cpu":
        made.decide("train", "head", "no accelerator")
    elif config.train == "auto":
        made.decide("train", "all", f"on {device}")
    elif config.num_last is not None:
        made.reasons.append(_last_layers(config.num_last, backbone))


def _settle_templates(made: Decisions, dataset: Dataset) -> None:
    config = made.asked.text
    filled, whose = with_templates(config, dataset.templates, dataset.ensemble)
    if whose is not None:
        own = any(info.prompts or info.descriptions for info in dataset.classes) and not config.mix
        made.decide("text.templates", filled.templates, f"{whose}, for classes without sentences" if own else whose)


def _settle_refit(made: Decisions) -> None:
    config = made.config
    if config.refit != "auto":
        return
    if config.data.shots is not None:
        made.decide("refit", "none", "few shots stay few")
    elif config.train == "head":
        made.decide("refit", "trainval", "a head at full data: val has served once it has been scored")
    else:
        made.decide("refit", "none", "it would double the time")


def _settle_steps(made: Decisions, dataset: Dataset, backbone: Backbone, num_images: int) -> None:
    """Decide what a training that takes steps needs."""
    config = made.asked
    if dataset.crop_size is not None and config.augment.policy == "auto" and config.augment.crop_size is None:
        made.decide("augment.crop_size", dataset.crop_size, "the task's own")
    _settle_optimiser(made, backbone, num_images)
    if config.optim.layer_decay not in (None, 1):
        num_layers = config.num_last or count_layers(backbone.network)
        lowest = made.config.optim.learning_rate * config.optim.layer_decay**num_layers
        made.reasons.append(
            f"  optim.layer_decay: {num_layers} layers, the first one at a learning rate of {lowest:.2g}"
        )


def _last_layers(num_last: int, backbone: Backbone) -> str:
    """Return which part of the backbone `last-N` trains, as a line of reason.

    Raises:
        ConfigError: N is the number of layers, or more.
    """
    layers = layer_of(backbone.network)
    num_layers = count_layers(backbone.network)
    if num_last >= num_layers:
        raise ConfigError(
            f"`train: last-{num_last}`: the backbone `{backbone.name}` has {num_layers} layers; take fewer, or `--train"
            " all` for all of them."
        )
    sizes = {name: parameter.numel() for name, parameter in backbone.network.named_parameters() if name in layers}
    trained = sum(size for name, size in sizes.items() if layers[name] >= num_layers - num_last)
    share = trained / sum(sizes.values())
    return f"  last-{num_last}: {num_last} of the backbone's {num_layers} layers, {share:.0%} of its weights"


def _check_source_head(config: Config, backbone: Backbone) -> None:
    head = backbone.source_head
    if head is not None and head.weight_SF.shape[1] == backbone.num_features:
        return
    found = "have none" if head is None else f"have one for {head.weight_SF.shape[1]} features, not for its"
    found += "" if head is None else f" {backbone.num_features}"
    raise ConfigError(
        f"The objective `{config.objective.name}` trains on the classifier that the backbone was pre-trained with, and"
        f" the weights of `{backbone.name}` {found}; take weights that bring one (`backbone.source_head` names its"
        " layer), or another objective."
    )


def _settle_start(
    made: Decisions,
    backbone: Backbone,
    objective_class: type[Objective],
    source_text: Callable[[TextConfig], SourceText | SharedSpace | str],
) -> None:
    config, decide = made.asked, made.decide
    start = config.start or objective_class.default_start
    if start == "auto" or start in PRIOR_STARTS:
        source = source_text(config.text)
        if start == "auto" and isinstance(source, SourceText):
            decide("start", "probe+prior", f"`{backbone.name}` has a classifier of {len(source.names)} named classes")
        elif start == "auto" and isinstance(source, SharedSpace):
            decide("start", "probe+prior", f"`{backbone.name}` and `{config.text.encoder}` are the towers of one CLIP")
        elif start == "auto":
            decide("start", "probe", f"no text prior: {source}")
            if config.data.shots == 0:
                raise ConfigError(f"0 shots need a text prior, and there can be none: {source}.")
        elif isinstance(source, str):
            raise ConfigError(f"`start: {start}` is not possible: {source}; use --start probe.")
        elif isinstance(source, SharedSpace) and start == "probe+lookup":
            raise ConfigError(
                f"`start: {start}` copies the row of the nearest source class, and a CLIP has none; use probe+permuted."
            )
    elif config.start is None:
        decide("start", start, f"the default of `{config.objective.name}`")
        if config.data.shots == 0:
            raise ConfigError("0 shots need a text prior; add --start prior.")


def _settle_optimiser(made: Decisions, backbone: Backbone, num_images: int) -> None:
    optim, decide, family = made.asked.optim, made.decide, backbone.family
    is_random = made.config.start == "random"
    backbone_factor, head_factor = RANDOM_START[optim.name] if is_random else (1.0, 1.0)
    usual = LEARNING_RATE[optim.name][family] * backbone_factor
    why = f"the default of {optim.name} for a {family} network" + (" from a random head" if is_random else "")
    if optim.name == "adamw" and batch_norms(backbone.network) and not is_random:
        usual = min(MAX_RATE, RATE_TIMES_FEATURES / backbone.num_features)
        why += f" of {backbone.num_features} features"
    learning_rate = optim.learning_rate or decide("optim.learning_rate", usual, why)
    if optim.head_learning_rate is None:
        why = f"{head_factor:g} times the backbone's: a random head" if head_factor > 1 else "as the backbone's"
        decide("optim.head_learning_rate", head_factor * learning_rate, why)
    if optim.warmup is None:
        warms_up = is_random and optim.name == "adamw"
        why = "the first steps from a random head are to be small" if warms_up else "the default"
        decide("optim.warmup", RANDOM_WARMUP if warms_up else 0.0, why)
    if optim.num_steps is None:
        num_epochs = optim.num_epochs or NUM_EPOCHS
        per_epoch = steps_per_epoch(num_images, optim.batch_size)
        decide("optim.num_epochs", None, "counted in steps")
        decide(
            "optim.num_steps", max(1, round(num_epochs * per_epoch)), f"{num_epochs:g} epochs of {num_images} images"
        )
    if optim.freeze_norms is None:
        decide("optim.freeze_norms", True, "the default")
