"""Backbones: a pre-trained network as one function from uint8 images to pooled features.

Three ways to name one: `lite0` (weights from a package), any timm name (weights from the Hub or a local checkpoint),
or the user's own module (an instance in Python, `package.module:factory` on the command line).
Shapes: B batch, H height, W width, F features.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tes.config import BackboneConfig, ImageConfig
from tes.errors import ModelError, did_you_mean, listing, one_line
from tes.files import sha256_text, user_path
from tes.models import bundled, image_settings
from tes.models.checkpoint import Checkpoint, load_strictly, open_checkpoint
from tes.models.clip import check_activation, refuse_other_activation, usable_projection
from tes.models.image_settings import ImageSettings

HEAD_NAMES = ("fc", "classifier", "head")


@dataclass(frozen=True)
class SourceHead:
    """The classifier (S, F) that the backbone was pre-trained with, and what its classes are called, where known."""

    weight_SF: Tensor
    bias_S: Tensor
    names: tuple[str, ...] | None


class Backbone(nn.Module):
    """A network, how its images are prepared, and the classifier that it was pre-trained with.

    Attributes:
        network: The module whose weights are trained and saved.
        name: As the user wrote it.
        images: Size, crop, mean, std and interpolation.
        origin: For each of these, where it came from.
        num_features: F.
        family: `depthwise`, `conv` or `transformer`, which decides precision and memory format.
        fingerprint: SHA-256 of the architecture and of every weight as loaded.
        source_head: The pre-training classifier, where the weights have one.
        projection_DF: Of a CLIP image tower: what carries its pooled feature to the space that it shares with text.
        notes: What was left aside while loading, for the user to read.
    """

    def __init__(
        self,
        network: nn.Module,
        name: str,
        images: ImageSettings,
        origin: Mapping[str, str],
        source_head: SourceHead | None = None,
        notes: list[str] | None = None,
        projection_DF: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.name, self.images, self.origin = name, images, dict(origin)
        self.source_head, self.notes, self.projection_DF = source_head, list(notes or []), projection_DF
        self._timm_like = hasattr(network, "forward_features") and hasattr(network, "forward_head")
        self.register_buffer("mean_3HW", 255 * torch.tensor(images.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std_3HW", 255 * torch.tensor(images.std).view(3, 1, 1), persistent=False)
        self.family = family_of(network)
        self.num_features = self.refresh_fingerprint()

    def refresh_fingerprint(self) -> int:
        """Take the fingerprint anew, after the weights have changed; return F."""
        features_2F = self._probe()
        # Of one's own module neither weights nor layers show an edited `forward`; what it makes of an image does.
        # Two digits, since the last ones depend on the number of threads.
        answer = [f"{value:.2g}" for value in features_2F[0, :16].cpu().double().tolist()]
        self.fingerprint = sha256_text(fingerprint(self.network), *answer)
        return features_2F.shape[1]

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Return pooled features (B, F) of RGB images (B, 3, H, W): uint8, or mixed ones of the same range."""
        x_B3HW = (images_B3HW.to(self.mean_3HW.dtype) - self.mean_3HW) / self.std_3HW
        if self._timm_like:
            return self.network.forward_head(self.network.forward_features(x_B3HW), pre_logits=True)
        return self.network(x_B3HW)

    def _probe(self) -> Tensor:
        """Run two fixed images through, so that a network that cannot take them says so before any work is done."""
        size = self.images.size
        was_training = self.network.training
        self.eval()
        pattern = torch.arange(2 * 3 * size * size).mul(2654435761).remainder(251)
        try:
            with torch.no_grad():
                features = self(pattern.to(self.mean_3HW.device, torch.uint8).view(2, 3, size, size))
        except Exception as problem:  # whatever an unknown network raises, the user needs one sentence
            reason = one_line(problem, 200).rstrip(".")
            raise ModelError(
                f"The backbone `{self.name}` cannot take images of {size} px: {reason}."
                f" Choose another --size, or build it for this one (many ViTs: --set backbone.kwargs.img_size={size})."
            ) from problem
        self.network.train(was_training)
        if not torch.is_tensor(features) or features.ndim != 2:
            got = tuple(features.shape) if torch.is_tensor(features) else type(features).__name__
            raise ModelError(f"The backbone `{self.name}` must return pooled features (B, F), but returned {got}.")
        if not torch.isfinite(features).all():
            raise ModelError(f"The features of the backbone `{self.name}` are not finite; its weights are damaged.")
        return features


def load_backbone(config: BackboneConfig, images: ImageConfig, network: nn.Module | None = None) -> Backbone:
    """Build a backbone and load its weights, all of them.

    Args:
        config: Which network and which weights.
        images: Image settings that the user set by hand.
        network: The user's own module, in place of one built from `config.name`.

    Raises:
        ModelError: Unknown name, weights that do not fit, or a network that cannot take the images.
        MissingExtraError: `lite0` without its package.
    """
    if network is not None or ":" in config.name:
        return _own_module(config, images, network)
    if config.name == "lite0":
        return _lite0(config, images)
    return _timm_model(config, images)


def build_network(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Build the network of `lite0` or of a timm name, without a classifier and with random weights.

    Only timm's own registered names are built: this is safe on the word of a stranger's run folder.

    Raises:
        ModelError: timm has no such name, or refuses a keyword.
    """
    import timm

    architecture = bundled.ARCHITECTURE if name == "lite0" else name
    if architecture.startswith(("hf-hub:", "hf_hub:", "local-dir:")) or not timm.is_model(architecture):
        known = [*timm.list_models(), "lite0"]
        raise ModelError(
            f"There is no backbone `{name}`.{did_you_mean(name, known)}"
            " `tes list backbones` shows all; your own module is written as `package.module:factory`."
        )
    try:
        allowed = BackboneConfig(name=name, kwargs=dict(kwargs)).kwargs
        return timm.create_model(architecture, pretrained=False, num_classes=0, **allowed)
    except Exception as problem:  # hundreds of networks, each with errors of its own for keywords that do not suit it
        raise ModelError(f"timm cannot build `{name}` with {dict(kwargs)}: {_reason(problem)}.") from problem


def family_of(network: nn.Module) -> str:
    """Tell families apart that differ in which precision and memory format is fast on them."""
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    if any(isinstance(module, (nn.LayerNorm, nn.MultiheadAttention)) for module in network.modules()) and not any(
        module.groups > 1 for module in convolutions
    ):
        return "transformer"
    return "depthwise" if any(module.groups > 1 for module in convolutions) else "conv"


def fingerprint(network: nn.Module) -> str:
    """Return a SHA-256 over the architecture (as printed) and the bytes of every tensor."""
    digest = hashlib.sha256(repr(network).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _lite0(config: BackboneConfig, images: ImageConfig) -> Backbone:
    network = build_network("lite0", config.kwargs)
    if config.checkpoint is not None and not user_path(config.checkpoint).is_dir():
        raise ModelError("`lite0` brings its own weights; with --checkpoint name the network, `tf_efficientnet_lite0`.")
    if config.checkpoint is not None:
        return _from_checkpoint(
            config, images, network, config.source_head or "head", [("lite0's own", bundled.IMAGES)]
        )
    weights = bundled.lite0_weights()
    head, rest = _split_head(weights, "classifier", config.model_copy(update={"source_classes": "imagenet1k"}))
    load_strictly(network, rest, "The file of `lite0`")
    settings, origin = image_settings.resolve(images, [("lite0's own weights", bundled.IMAGES)])
    return Backbone(network, config.name, settings, origin, head)


def _timm_model(config: BackboneConfig, images: ImageConfig) -> Backbone:
    import timm.data

    network = build_network(config.name, config.kwargs)
    values = image_settings.from_timm(timm.data.resolve_model_data_config(network))
    classifier = config.source_head or network.pretrained_cfg.get("classifier") or "fc"
    classifier = classifier if isinstance(classifier, str) else classifier[0]
    if config.checkpoint is not None:
        is_tagged = "." in config.name  # `vit_base_patch16_224.dino`: the user says whose weights they are
        where = f"timm's configuration of `{config.name}`" + ("" if is_tagged else ", *assumed*")
        return _from_checkpoint(config, images, network, classifier, [(where, values)], trust_last=is_tagged)
    refuse_other_activation(network, config.name)
    what = f"The Hub's checkpoint of `{config.name}`"
    head, rest = _split_head(_hub_weights(config, network), classifier, config)
    projection_DF = None
    if head is not None and head.names is None:
        names = hub_names(network.pretrained_cfg, len(head.weight_SF))
        if names is None and is_clip_tower(network.pretrained_cfg):
            head, projection_DF = None, usable_projection(network, head.weight_SF)
        else:
            head = SourceHead(head.weight_SF, head.bias_S, names)
    unused = load_strictly(network, rest, what)
    settings, origin = image_settings.resolve(images, [*_built_for(config), ("timm's configuration", values)])
    return Backbone(network, config.name, settings, origin, head, _no_place(what, unused), projection_DF)


def _from_checkpoint(
    config: BackboneConfig,
    images: ImageConfig,
    network: nn.Module,
    classifier: str,
    known: list[tuple[str, Mapping[str, Any]]],
    trust_last: bool = False,
) -> Backbone:
    """Load a named network's weights from a local file or run folder.

    Args:
        config: With a checkpoint.
        images: Image settings that the user set by hand.
        network: With random weights; filled.
        classifier: What the linear layer that classified the source classes is called.
        known: Image settings of the network, whatever its weights.
        trust_last: Whether `known` goes before what the file's layout implies.
    """
    assert config.checkpoint is not None
    path, what = user_path(config.checkpoint), f"The checkpoint `{config.checkpoint}`"
    checkpoint = open_checkpoint(path, network, what, config.name)
    notes = [*checkpoint.notes, *check_activation(path, network, checkpoint, config.name)]
    head, rest = _head_of(checkpoint, "head" if path.is_dir() else classifier, config)
    unused = load_strictly(network, rest, what)
    if unused and checkpoint.layout.is_whole:
        raise ModelError(
            f"{what} is laid out like {checkpoint.layout.name}, and `{config.name}` has no place for {len(unused)}"
            f" tensors of its network: {listing(unused, 3)}; name the architecture that they are of."
        )
    notes += _no_place(what, unused)
    implied = [checkpoint.layout.implied]
    last = [*known, *implied] if trust_last else [*implied, *known]
    settings, origin = image_settings.resolve(
        images, [*_built_for(config), *image_settings.beside_weights(path), *last]
    )
    projection_DF = usable_projection(network, checkpoint.projection_DF)
    return Backbone(network, config.name, settings, origin, head, notes, projection_DF)


def _built_for(config: BackboneConfig) -> list[tuple[str, Mapping[str, Any]]]:
    size = config.kwargs.get("img_size")
    return [("the size that the network is built for", {"size": size})] if isinstance(size, int) else []


def _head_of(
    checkpoint: Checkpoint, classifier: str, config: BackboneConfig
) -> tuple[SourceHead | None, dict[str, Tensor]]:
    if checkpoint.has_classifier:
        return _split_head(checkpoint.tensors, classifier, config)
    if config.source_classes is not None:
        raise ModelError(
            "`backbone.source_classes` names classes, but the weights are laid out like"
            f" {checkpoint.layout.name} and classify none; leave it out."
        )
    return None, checkpoint.tensors


def _no_place(what: str, unused: list[str]) -> list[str]:
    if not unused:
        return []
    return [f"{what} has {len(unused)} tensors that the network has no place for: {listing(unused)}"]


def _hub_weights(config: BackboneConfig, network: nn.Module) -> dict[str, Tensor]:
    """Fetch a timm model's own weights, or say in one sentence why that is not possible here."""
    import timm

    from tes.hub import require_hub

    repository = network.pretrained_cfg.get("hf_hub_id")
    if not repository:
        raise ModelError(f"timm has no weights for `{config.name}`; give a local file with --checkpoint.")
    if not _is_in_hub_cache(network.pretrained_cfg):
        require_hub(repository, "use `--backbone lite0`, or a local file with `--checkpoint`", error=ModelError)
    try:
        full = timm.create_model(config.name, pretrained=True, **config.kwargs)
    except Exception as problem:  # timm and the Hub client raise many kinds; all mean: no weights
        raise ModelError(f"The weights of `{config.name}` cannot be loaded: {one_line(problem, 200)}.") from problem
    return full.state_dict()


def _is_in_hub_cache(pretrained_cfg: Mapping[str, Any]) -> bool:
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = pretrained_cfg["hf_hub_id"].partition("@")
    named = pretrained_cfg.get("hf_hub_filename")
    files = [named] if named else ["model.safetensors", "pytorch_model.bin"]
    return any(isinstance(try_to_load_from_cache(repository, file, revision=revision or None), str) for file in files)


def _own_module(config: BackboneConfig, images: ImageConfig, network: nn.Module | None) -> Backbone:
    notes = []
    if network is None:
        network = own_network(config)
    head_name = config.source_head or next(
        (name for name in HEAD_NAMES if isinstance(getattr(network, name, None), nn.Linear)), None
    )
    head = None
    implied: list[tuple[str, Mapping[str, Any]]] = []
    if config.checkpoint is not None:
        path, what = user_path(config.checkpoint), f"The checkpoint `{config.checkpoint}`"
        checkpoint = open_checkpoint(path, network, what, config.name if ":" in config.name else None)
        weights = checkpoint.tensors
        if path.is_dir():  # the run's own classifier, which the network has no place for
            weights = {
                name: tensor for name, tensor in weights.items() if not name.startswith("head.") or head_name == "head"
            }
        own_head = (f"{head_name}.weight", f"{head_name}.bias") if head_name else ()
        absent = tuple(name for name in own_head if name not in weights)
        unused = load_strictly(network, weights, what, may_lack=own_head)
        notes += [*checkpoint.notes, *_no_place(what, unused)]
        implied = [*image_settings.beside_weights(path), checkpoint.layout.implied]
        head = None if absent or not head_name else _head_of(checkpoint, head_name, config)[0]
    else:
        notes.append(f"the weights of `{config.name}` are taken as its constructor made them (no --checkpoint)")
    for name in {head_name, *HEAD_NAMES} - {None}:
        module = getattr(network, name, None)
        if isinstance(module, nn.Linear):
            module.requires_grad_(False)  # the pre-training classifier is kept, not trained
    settings, origin = image_settings.resolve(images, implied)
    return Backbone(network, config.name, settings, origin, head, notes)


def own_network(config: BackboneConfig) -> nn.Module:
    """Import `package.module:factory` and call it. Only ever on the user's own word, never on a run folder's.

    Raises:
        ModelError: It cannot be imported or called, or returns no module.
    """
    module_name, _, attribute = config.name.partition(":")
    # A module in the folder that the user stands in is found, as with `python -m`.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as problem:  # a module of the user's: anything can happen in it
        raise ModelError(
            f"The backbone `{config.name}` cannot be imported: {_reason(problem)}. It is written as"
            " `package.module:factory`, importable from this folder."
        ) from problem
    try:
        network = factory(**config.kwargs)
    except (Exception, SystemExit) as problem:
        raise ModelError(
            f"The factory `{config.name}` fails when called with {config.kwargs}: {_reason(problem)}."
        ) from problem
    if not isinstance(network, nn.Module):
        raise ModelError(f"The factory `{config.name}` returned a {type(network).__name__}, not an nn.Module.")
    return network


def _reason(problem: BaseException) -> str:
    kind, said = type(problem).__name__, one_line(problem).rstrip(".")
    return kind if said == kind else f"{kind}: {said}"


def _split_head(
    weights: Mapping[str, Tensor], classifier: str, config: BackboneConfig
) -> tuple[SourceHead | None, dict[str, Tensor]]:
    """Take the pre-training classifier out of a network's weights."""
    keys = (f"{classifier}.weight", f"{classifier}.bias")
    rest = {name: tensor for name, tensor in weights.items() if name not in keys}
    weight = weights.get(keys[0])
    if weight is None or weight.ndim != 2:
        if config.source_classes is not None:
            raise ModelError(
                f"`backbone.source_classes` names classes, but the weights have no linear layer `{classifier}`."
            )
        return None, rest
    bias = weights.get(keys[1], torch.zeros(len(weight)))
    return SourceHead(weight.float(), bias.float(), source_names(config.source_classes, len(weight))), rest


def source_names(source_classes: str | None, num_rows: int) -> tuple[str, ...] | None:
    """Return the names of a source head's rows, in order; None where the user has not said what they are.

    Raises:
        ModelError: The list has another length than the head, or cannot be read.
    """
    if source_classes is None:
        return None
    if source_classes == "imagenet1k":
        names = imagenet_names()
    elif source_classes == "cifar10":
        names = tuple(["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"])
    else:
        try:
            lines = user_path(source_classes).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as problem:
            raise ModelError(
                f"`backbone.source_classes` is `{source_classes}`: neither imagenet1k nor cifar10, nor a readable text"
                f" file with one name a line ({problem})."
            ) from None
        names = tuple(line.strip() for line in lines if line.strip())
    if len(names) != num_rows:
        raise ModelError(
            f"`backbone.source_classes` names {len(names)} classes, but the source head has {num_rows} rows."
        )
    return names


def hub_names(pretrained_cfg: Mapping[str, Any], num_rows: int) -> tuple[str, ...] | None:
    """Return the names of a Hub checkpoint's source classes where its tag says that it was last trained on ImageNet.

    Args:
        pretrained_cfg: timm's, whose tag reads like `a1_in1k` or `augreg_in21k_ft_in1k`.
        num_rows: Of the source head; tells the variants of ImageNet-21k apart.
    """
    from timm.data import infer_imagenet_subset

    tag = pretrained_cfg.get("tag") or ""
    subset = infer_imagenet_subset({"num_classes": num_rows})
    stages = re.findall(r"(?:^|_)in(?:1k|12k|21k|22k)(?=_|$)", tag)
    is_small = subset == "imagenet-1k"
    if subset is None or not stages or stages[-1].endswith("in1k") != is_small:
        return None
    return imagenet_names(subset)


def is_clip_tower(pretrained_cfg: Mapping[str, Any]) -> bool:
    """Whether a Hub checkpoint is a CLIP image tower as it was trained, whose last layer is its projection."""
    architecture, tag = pretrained_cfg.get("architecture") or "", pretrained_cfg.get("tag") or ""
    return "_clip" in architecture and bool(tag) and "ft" not in tag.split("_")


def imagenet_names(subset: str = "imagenet-1k") -> tuple[str, ...]:
    """Return ImageNet's class names in the order of its classifiers, by their first synonym."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(index).split(",")[0].strip() for index in range(info.num_classes()))
