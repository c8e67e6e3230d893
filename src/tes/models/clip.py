"""What is particular about CLIP's image towers: the activation that they were trained with, and their projection."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor, nn

from tes.errors import ModelError
from tes.models.checkpoint import Checkpoint
from tes.models.layouts import CLIP_OF_OPEN_CLIP, CLIP_OF_TRANSFORMERS


def check_activation(path: Path, network: nn.Module, checkpoint: Checkpoint, name: str) -> list[str]:
    """Refuse a ViT tower in a network with another activation: no tensor tells QuickGELU from GELU, features do.

    Returns:
        A note where the weights do not say which they need: OpenAI's own need QuickGELU.

    Raises:
        ModelError: `open_clip_config.json` beside the weights, or their being OpenAI's own, says that it is the other.
    """
    if checkpoint.layout not in (CLIP_OF_OPEN_CLIP, CLIP_OF_TRANSFORMERS) or not any(
        "attn" in key for key in checkpoint.tensors
    ):
        return []  # a ModifiedResNet has ReLUs
    has_quick = _has_quick_gelu(network)
    needs_quick, why = _needs_quick_gelu(path, checkpoint)
    if needs_quick is None:
        kind = "QuickGELU" if has_quick else "GELU"
        return [f"CLIP weights do not say whether they need QuickGELU (OpenAI's do); `{name}` is built with {kind}"]
    if needs_quick == has_quick:
        return []
    raise _other_activation(f"`{path}`", name, needs_quick, why)


def refuse_other_activation(network: nn.Module, name: str) -> None:
    """Refuse a Hub model whose weights need QuickGELU, as timm notes, and that timm builds with GELU.

    Raises:
        ModelError: It is one of those.
    """
    notes = str(network.pretrained_cfg.get("notes"))
    if "quickgelu" in notes.lower() and not _has_quick_gelu(network):
        raise _other_activation(f"of `{name}`", name, True, "timm's notes on them")


def _has_quick_gelu(network: nn.Module) -> bool:
    return any(type(module).__name__.lower() == "quickgelu" for module in network.modules())


def _other_activation(weights: str, name: str, needs_quick: bool, why: str) -> ModelError:
    other = name.replace("_clip_", "_clip_quickgelu_") if needs_quick else name.replace("_clip_quickgelu_", "_clip_")
    return ModelError(
        f"The weights {weights} were trained with {'QuickGELU' if needs_quick else 'GELU'} ({why}), and `{name}` has"
        f" the other activation; name `{other}`, or set backbone.kwargs.act_layer="
        f"{'quick_gelu' if needs_quick else 'gelu'}."
    )


def usable_projection(network: nn.Module, projection_DF: Tensor | None) -> Tensor | None:
    """Return the projection where the network's pooled feature is the one that CLIP projects; None otherwise.

    That is a ViT's class token, or the output of a ModifiedResNet's attention pooling; an average of places is neither.
    """
    if projection_DF is None or projection_DF.ndim != 2:
        return None
    is_pooled_so = "head.q.weight" in network.state_dict() or getattr(network, "global_pool", None) == "token"
    return projection_DF.float() if is_pooled_so else None


def _needs_quick_gelu(path: Path, checkpoint: Checkpoint) -> tuple[bool | None, str]:
    described = (
        ("open_clip_config.json", "model_cfg", "quick_gelu", False),
        ("config.json", "vision_config", "hidden_act", "quick_gelu"),
    )
    for name, part, key, default in described:
        try:
            settings = json.loads((path.parent / name).read_text(encoding="utf-8"))[part]
            return settings.get(key, default) in (True, "quick_gelu"), f"so says `{name}` beside them"
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # absent, or a description of something else
    if "input_resolution" in checkpoint.aside:
        return True, "they are OpenAI's own"
    return None, ""
