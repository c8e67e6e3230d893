"""Every setting of a run: typed, frozen, checked as a whole before anything is loaded.

A value comes from, in rising order: the default below, the objective's default for it, the objective's preset, the YAML
file, a flag, `--set a.b=c`.
`None` means "decide for me": the job resolves it, prints it with its reason and saves the resolved copy in the run.
"""

from __future__ import annotations

import functools
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, field_validator, model_validator

from tes.errors import ConfigError, did_you_mean, one_line

Fraction = Annotated[float, Field(gt=0, le=1)]
Triple = tuple[float, float, float]
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""What PyYAML raises on text that it cannot read: ValueError for dates and numbers such as 2020-13-45."""


@dataclass(frozen=True)
class Range:
    """Where a search draws a setting from: evenly between the ends, or, with `log`, evenly in its logarithm."""

    low: float
    high: float
    log: bool = False


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class DataConfig(Settings):
    """Which images, which of them are trained on, and what the classes are called."""

    source: str = Field(
        description="a folder of class folders, a CSV with the columns path,label[,split][,group], a task's name, or"
        " hf:NAME of the Hugging Face Hub"
    )
    root: str | None = Field(
        None, description="where tasks' data sets are, in their official layouts; None: $TES_DATA, else data"
    )
    classes: str | None = Field(None, description="JSON, YAML or CSV with names, descriptions or prompts per class")
    only_classes: tuple[str, ...] | None = Field(None, description="keep these classes alone")
    min_images: Annotated[int, Field(ge=1)] = Field(1, description="leave out classes with fewer images, all splits")
    shots: Annotated[int, Field(ge=0)] | None = Field(
        None, description="training images per class; None: all; 0: none, a zero-shot model from the text prior"
    )
    fraction: Fraction | None = Field(None, description="share of each class's training images to use")
    split_seed: int = Field(0, description="fixes the test and val images that are carved from train")
    max_unreadable: Annotated[int, Field(ge=0)] | None = Field(
        None, description="more unreadable images than this stop the run; None: the larger of 3 and 1 %"
    )
    partial: bool = Field(False, description="accept a subset of a task's official list")

    @field_validator("only_classes", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        """Read `cat` as one class, and `[1, 2]` as YAML writes labels that are numbers."""
        names = [value] if isinstance(value, str | int) else value
        if not isinstance(names, list):
            return names
        return [str(name) if isinstance(name, int) and not isinstance(name, bool) else name for name in names]

    @model_validator(mode="after")
    def _one_subset(self) -> DataConfig:
        if self.shots is not None and self.fraction is not None:
            raise ValueError("`shots` and `fraction` both choose a subset; give one of them")
        return self


class BackboneConfig(Settings):
    """The pre-trained network whose pooled feature the head reads."""

    name: str = Field("lite0", description="lite0, a timm name, or package.module:factory")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the network's constructor")
    checkpoint: str | None = Field(
        None, description="local weights (.safetensors, .pth) or a run folder; None: the Hub's for a timm name"
    )
    source_head: str | None = Field(None, description="name of the linear layer that classified the source classes")
    source_classes: str | None = Field(None, description="imagenet1k, cifar10, or a text file with one name a line")

    @model_validator(mode="after")
    def _no_loading_by_keyword(self) -> BackboneConfig:
        # timm would read files, or fetch and unpickle, on the word of these: weights come through `checkpoint` alone.
        reserved = {
            "pretrained",
            "checkpoint_path",
            "pretrained_cfg",
            "pretrained_cfg_overlay",
            "num_classes",
            "cache_dir",
        }
        if wrong := sorted(reserved & self.kwargs.keys()):
            raise ValueError(f"`{wrong[0]}` is not for `kwargs`; weights are named by `backbone.checkpoint`")
        return self


class TextConfig(Settings):
    """How class names become the rows of the text classifier."""

    encoder: str = Field(
        "minilm",
        description="minilm, bert:ID, clip:ID, st:ID, openclip:ID (ID: Hub name or local folder), file:PATH",
    )
    templates: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        None,
        description="prompts with {} for the name, averaged; ensemble: the task's many (CLIP's); None: the task's own"
        " one, else `a photo of a {}`",
    )
    centre: bool | None = Field(None, description="subtract the mean row; None: yes")
    pooling: Literal["mean", "cls"] | None = Field(None, description="of a bert encoder's tokens; None: mean")
    mix: bool = Field(
        False, description="average descriptions and templates, where otherwise descriptions replace them"
    )

    @field_validator("templates", mode="before")
    @classmethod
    def _one_is_a_list_too(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class PriorConfig(Settings):
    """The text prior: rows for the classes predicted from their names by way of the source head (engine/prior.py)."""

    form: Literal["joint", "per_class"] = Field(
        "per_class", description="one trust for all classes, or one per class around a common one"
    )
    kappa: Annotated[float, Field(gt=0)] = Field(0.2, description="κ: what trust costs")
    gamma: Annotated[float, Field(gt=0)] = Field(5.0, description="γ: how fast a source name's say falls off")
    rho: Annotated[float, Field(gt=0)] = Field(0.03, description="ρ: the ridge of the regression from text to rows")
    zero_shot_trust: Annotated[float, Field(gt=0)] = Field(1.0, description="the trust α where there is no image")


class ObjectiveConfig(Settings):
    """Base of the objectives' own settings.

    `defaults` are its defaults for settings that are not its own, by dotted key; `presets` maps a preset's name to the
    values it gives; `search` names the settings of its own that are worth a search, and where; `stepped` those that
    change nothing where a head is solved.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    search: ClassVar[Mapping[str, Range]] = {}
    stepped: ClassVar[frozenset[str]] = frozenset()

    name: str
    preset: str | None = Field(None, description="a named set of values, for example the authors' own")

    def decide(self, train: str) -> dict[str, tuple[Any, str]]:
        """Return own settings that are None, each with a value and the reason; asked once `train` is decided."""
        return {}

    def check(self, start: str | None, train: str) -> None:
        """Refuse a start or a `train` that these settings cannot work with.

        Asked with what the user chose, before anything is loaded, and again when `auto` and None have been decided.

        Raises:
            ValueError: One sentence.
        """


def _is_weight(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 < value < float("inf")


class OptimConfig(Settings):
    """The optimiser and its budget. With `train: head`, solved and not stepped, `head_penalty` and
    `class_weights` alone matter."""

    name: Literal["adamw", "sgd"] = Field("adamw", description="AdamW, or SGD with Nesterov momentum")
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="of the backbone; None: by optimiser, kind of network, start and images, as `tes train` says",
    )
    head_learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="of the vision head and the objective's own parameters; None: as the backbone's; ten times that"
        " from a random head with AdamW",
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="of sgd")
    weight_decay: Annotated[float, Field(ge=0)] = Field(1e-4, description="on weights, not on biases and norms")
    decay_all: bool = Field(False, description="weight decay on biases and norms too, as in the authors' code")
    head_penalty: Annotated[float, Field(gt=0)] = Field(
        0.3, description="penalty/N on the squared norm of a solved head"
    )
    batch_size: Annotated[int, Field(ge=2)] = 32
    accumulate: Annotated[int, Field(ge=1)] = Field(1, description="micro-batches that one batch is split into")
    num_steps: Annotated[int, Field(ge=1)] | None = Field(None, description="the budget; None: from num_epochs")
    num_epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="the budget in passes; None: 20")
    warmup: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None,
        description="share of the steps with a rising learning rate; None: 0.1 from a random head with AdamW, else 0",
    )
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(
        None, description="largest norm of the gradient; None: no limit"
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="each layer's learning rate in units of the next one's, from the head down; None or 1: off"
    )
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="decay of a moving average of all weights, which is what is scored and shipped, for example 0.999"
        " (less at first, see average.py); None: off",
    )
    class_weights: str | dict[str, float] = Field(
        "none",
        description="of the images' losses: none, balanced (a class's weight is inverse to its size), or weights by"
        " class name, as in {cat: 2.5}; only their ratios matter",
    )
    sampling: Literal["uniform", "balanced"] = Field(
        "uniform", description="balanced: every class comes as often in an epoch, images of small ones more than once"
    )
    freeze_norms: bool | None = Field(None, description="keep batch norms at their pre-trained statistics; None: yes")

    @field_validator("class_weights", mode="plain")
    @classmethod
    def _weights(cls, value: Any) -> str | dict[str, float]:
        if value in ("none", "balanced"):
            return value
        if isinstance(value, Mapping) and value and all(map(_is_weight, value.values())):
            names = [str(name) for name in value if not isinstance(name, bool)]  # `no: 2` in YAML
            if len(set(names)) == len(value):
                return dict(zip(names, map(float, value.values())))
        raise ValueError(
            f"none, balanced, or a positive number for each class by name, as in {{cat: 2.5}} (got {value!r})"
        )

    @model_validator(mode="after")
    def _consistent(self) -> OptimConfig:
        if self.class_weights != "none" and self.sampling == "balanced":
            raise ValueError("`class_weights` and `sampling: balanced` make up for the same thing twice; use one")
        if self.num_steps is not None and self.num_epochs is not None:
            raise ValueError("`num_steps` and `num_epochs` both set the budget; give one of them")
        if self.batch_size % self.accumulate:
            raise ValueError(f"`accumulate` {self.accumulate} does not divide `batch_size` {self.batch_size}")
        return self


class ImageConfig(Settings):
    """How an image becomes a tensor. None: as the weights were trained."""

    size: Annotated[int, Field(ge=8, le=2048)] | None = Field(None, description="side in pixels")
    crop_fraction: Annotated[float, Field(ge=0.1, le=1)] | None = Field(
        None, description="central share of the image that is kept at test time"
    )
    fit: Literal["crop", "squash"] | None = Field(
        None, description="of images that are not square, at test time: crop keeps the middle, squash all, distorted"
    )
    mean: Triple | None = Field(None, description="of red, green, blue, in 0..1")
    std: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None = (
        None
    )
    interpolation: Literal["bilinear", "bicubic"] | None = None


MIN_ALPHA = 0.01


class AugmentConfig(Settings):
    """What happens to a training image, at random."""

    policy: Literal["auto", "none", "resized_crop", "padded_crop"] = Field(
        "auto", description="auto: padded_crop up to 64 px, or with a crop_size; else resized_crop"
    )
    crop_size: Annotated[int, Field(ge=8, le=2048)] | None = Field(
        None,
        description="side at which a padded_crop is cut, by an eighth of it padded, before it is brought to the image's"
        " size (CIFAR: 32); None: at the image's size",
    )
    min_scale: Fraction = Field(0.25, description="smallest share of the image's area that a resized_crop keeps")
    flip: bool = Field(True, description="mirror half of the images; switch it off where left and right differ")
    mixup: Annotated[float, Field(ge=0, le=100)] = Field(
        0.0, description="α of mixup: train on averages of two images, λ from Beta(α, α), for example 0.2; 0: off"
    )
    cutmix: Annotated[float, Field(ge=0, le=100)] = Field(
        0.0, description="α of cutmix: paste a part of another image, for example 1; with mixup: one of them a batch"
    )

    @model_validator(mode="after")
    def _cuts_at_all(self) -> AugmentConfig:
        if self.crop_size is not None and self.policy not in ("auto", "padded_crop"):
            raise ValueError(f"`crop_size` is for the policy padded_crop; `{self.policy}` does not use it")
        return self

    @field_validator("mixup", "cutmix")
    @classmethod
    def _mixes_at_all(cls, alpha: float) -> float:
        if 0 < alpha < MIN_ALPHA:
            raise ValueError(f"an α below {MIN_ALPHA} mixes next to nothing; 0 switches it off")
        return alpha


class CheckpointConfig(Settings):
    """How often the state of a training that takes steps is saved, so that `--resume` can go on from it."""

    every_minutes: Annotated[float, Field(gt=0)] | None = Field(
        5.0,
        description="what a crash may cost; an epoch's end saves as well, where that takes little of the time; None:"
        " save only when interrupted",
    )


PRIOR_STARTS = ("prior", "probe+prior", "probe+lookup", "probe+permuted")
"""The starts that use the text prior; the last two are controls that a comparison holds against it."""


class Config(Settings):
    """One run, whole."""

    data: DataConfig
    objective: SerializeAsAny[ObjectiveConfig]
    backbone: BackboneConfig = BackboneConfig()
    text: TextConfig = TextConfig()
    start: Literal["auto", "random", "probe", "prior", "probe+prior", "probe+lookup", "probe+permuted"] | None = Field(
        None,
        description="what the vision head starts from: auto is probe+prior where a text prior is possible, else probe;"
        " None: auto for tes, probe for every other objective",
    )
    prior: PriorConfig = PriorConfig()
    train: str = Field(
        "auto",
        description="head; all; last-N: the last N layers of the backbone and the head; auto: all on an accelerator,"
        " else head",
    )
    start_fallback: Literal["none", "val"] = Field(
        "none", description="val: ship the head that steps started from where they do not beat it on val"
    )
    optim: OptimConfig = OptimConfig()
    image: ImageConfig = ImageConfig()
    augment: AugmentConfig = AugmentConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    search: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(
        default_factory=dict,
        description="setting to the values that a search of several trials draws from, in place of the default ranges",
    )
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    refit: Literal["auto", "none", "trainval", "all"] = Field(
        "auto", description="train once more, on val (and test) too"
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    num_workers: Annotated[int, Field(ge=0)] | None = Field(
        None, description="processes that read images; None: 0 on CPU"
    )
    out: str | None = Field(None, description="the run folder; None: runs/<data>-<arm>-<n>")

    @field_validator("train")
    @classmethod
    def _names_a_part(cls, train: str) -> str:
        if train == "last-0":
            raise ValueError("last-0 trains no layer of the backbone; write `head`")
        if train not in ("auto", "head", "all") and not re.fullmatch("last-[1-9][0-9]{0,3}", train):
            raise ValueError(f"is auto, head, all or last-N, for example last-2 (got {train!r})")
        return train

    @model_validator(mode="after")
    def _suits_the_objective(self) -> Config:
        self.objective.check(self.start, self.train)
        return self

    @property
    def num_last(self) -> int | None:
        """N of `train: last-N`; else None."""
        return int(self.train.removeprefix("last-")) if self.train.startswith("last-") else None

    @property
    def arm(self) -> str:
        """The run's arm as a comparison writes it: `NAME[@PRESET][+START]`."""
        preset = f"@{self.objective.preset}" if self.objective.preset else ""
        return self.objective.name + preset + (f"+{self.start}" if self.start else "")

    def value(self, key: str) -> Any:
        """Return the setting with this dotted key."""
        return functools.reduce(getattr, key.split("."), self)

    def replace(self, values: Mapping[str, Any]) -> Config:
        """Return a copy in which the dotted keys of `values` are set."""
        tree = self.model_dump()
        for key, value in values.items():
            _assign(tree, key, value)
        return _validate(tree)

    def to_yaml(self) -> str:
        """Return the settings as YAML that `load_config` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def arm_flags(arm: str) -> dict[str, str | None]:
    """Return the flags that an arm, `NAME[@PRESET][+START]`, stands for."""
    objective, _, start = arm.partition("+")
    return {"objective": objective, "start": start or None}


def load_config(
    file: str | Path | None = None, flags: Mapping[str, Any] | None = None, assignments: Iterable[str] = ()
) -> Config:
    """Read, merge and check all settings.

    Args:
        file: A YAML file with the keys of `Config`.
        flags: Dotted key to value; None values are left out (the flag was not given).
        assignments: "a.b=c" as given to `--set`; the value is read as YAML.

    Raises:
        ConfigError: All mistakes at once, each with its key.
    """
    tree: dict[str, Any] = _read_yaml(Path(file)) if file is not None else {}
    for key, value in (flags or {}).items():
        if value is not None:
            _assign(tree, key, value)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"`--set {assignment}` has no `=`; write it as `--set optim.batch_size=64`.")
        try:
            _assign(tree, key.strip(), yaml.safe_load(text))
        except NOT_YAML as problem:
            raise ConfigError(f"The value in `--set {assignment}` is not valid YAML: {one_line(problem)}.") from None
    config = _validate(_with_preset(tree))
    _check_search(config)
    return config


def _check_search(config: Config) -> None:
    """Hold every value of `search` against its setting.

    Raises:
        ConfigError: There is no such setting, or it cannot have such a value.
    """
    from tes.objectives import objectives

    for key, values in config.search.items():
        room, _, name = key.partition(".")
        if room == "objective" and name not in type(config.objective).model_fields:
            # Of another objective: a file serves all arms of a comparison.
            if not any(name in objectives.get(other).Config.model_fields for other in objectives.names()):
                raise ConfigError(f"`search`: no objective has a setting `{key}`.")
            continue
        for value in values:
            try:
                config.replace({key: value})
            except ConfigError as problem:
                raise ConfigError(f"`search`: {problem}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no config file `{path}`.") from None
    except (OSError, *NOT_YAML) as problem:
        raise ConfigError(f"The config file `{path}` cannot be read: {one_line(problem)}.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"The config file `{path}` must hold keys and values, for example `seed: 1`.")
    return tree


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        below = tree.setdefault(parent, {})
        if parent == "objective" and isinstance(below, str):
            below = tree[parent] = _split_objective(below)
        if not isinstance(below, dict):
            raise ConfigError(f"`{key}`: `{parent}` is a single value and has no keys below it.")
        tree = below
    if key == "objective" and isinstance(value, str) and isinstance(tree.get("objective"), dict):
        named = _split_objective(value)
        # Another objective than the file's has other settings; the same one keeps those that the file gave it.
        value = tree["objective"] | named if tree["objective"].get("name") == named["name"] else named
    tree[last] = value


def _split_objective(text: str) -> dict[str, Any]:
    name, at, preset = text.partition("@")
    return {"name": name} | ({"preset": preset} if at else {})


def _with_preset(tree: dict[str, Any]) -> dict[str, Any]:
    """Fill in what the objective's preset and its own defaults give and nobody has set by hand."""
    objective = tree.get("objective", "tes")
    tree["objective"] = _split_objective(objective) if isinstance(objective, str) else objective
    if not isinstance(tree["objective"], dict):
        raise ConfigError("`objective` must be a name such as `tes`, or keys such as `name: tes`.")
    tree["objective"].setdefault("name", "tes")
    name, preset = tree["objective"]["name"], tree["objective"].get("preset")
    try:
        settings = _objective_settings(name)
    except ConfigError:
        return tree  # _validate() says so, with all other mistakes
    if preset is not None and (not isinstance(preset, str) or preset not in settings.presets):
        presets = settings.presets
        known = f"It has: {', '.join(presets)}." if presets else "It has none."
        raise ConfigError(
            f"`objective`: `{name}` has no preset `{preset}`.{did_you_mean(str(preset), presets)} {known}"
        )
    for key, value in (dict(settings.defaults) | dict(settings.presets[preset] if preset else {})).items():
        branch = tree
        *parents, last = key.split(".")
        for parent in parents:
            branch = branch.setdefault(parent, {}) if isinstance(branch, dict) else {}
        if isinstance(branch, dict):  # else the user gave a single value, which _validate() refuses
            branch.setdefault(last, value)
    return tree


def _objective_settings(name: Any) -> type[ObjectiveConfig]:
    # Looked up at call time: the choices are a registry that other packages add to, and importing one imports torch.
    from tes.objectives import objectives

    return objectives.get(str(name)).Config


def _validate(tree: dict[str, Any]) -> Config:
    """Check everything, collecting the mistakes of the objective's own settings and of all others."""
    problems: list[str] = []
    objective: ObjectiveConfig | None = None
    try:
        settings = _objective_settings(tree["objective"]["name"])
        objective = settings.model_validate(tree["objective"])
    except ConfigError as problem:
        problems.append(f"`objective`: {problem}")
    except ValidationError as problem:
        problems += _explain(problem, settings, prefix=("objective",))
    # A stand-in keeps the other settings checkable where the objective is wrong.
    rest = tree | {"objective": objective or ObjectiveConfig(name="none")}
    try:
        config = Config.model_validate(rest)
    except ValidationError as problem:
        problems += _explain(problem, Config)
    if problems:
        raise ConfigError(
            problems[0] if len(problems) == 1 else "\n  ".join(["Several settings are wrong:", *problems])
        )
    return config


def _explain(problem: ValidationError, model: type[Settings], prefix: tuple[str, ...] = ()) -> list[str]:
    lines = []
    for error in problem.errors(include_url=False):
        key = ".".join(str(part) for part in (*prefix, *error["loc"]))
        message = error["msg"].removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            fields = _fields_at(model, error["loc"][:-1])
            hint = did_you_mean(str(error["loc"][-1]), fields)
            message = f"unknown key.{hint or ' Known here: ' + ', '.join(fields) + '.'}"
        elif error["type"] == "missing":
            message = "is missing" if key != "data.source" else "say which images to train on: a folder or a CSV"
        elif error["type"] != "value_error":
            message = f"{message[0].lower()}{message[1:]} (got {error['input']!r})"
        lines.append(f"`{key}`: {message}" if key else message)
    return lines


def _fields_at(model: Any, location: tuple[Any, ...]) -> list[str]:
    for part in location:
        annotation = model.model_fields[part].annotation
        if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
            annotation = next(option for option in typing.get_args(annotation) if option is not type(None))
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
