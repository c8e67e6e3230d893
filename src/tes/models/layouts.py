"""The layouts of weights files that people hold: how each is recognised, what is the backbone in it, what is set aside.

Recognised by the tensors' names, never by the file's. A new layout is an entry of `LAYOUTS`; the first that suits is
taken. What is left of the names is then put into timm's by timm's own converter, where the architecture has one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CLIP = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "crop_fraction": 1.0,
    "interpolation": "bicubic",
}
"""How the images were prepared that CLIP was trained on (Radford et al. 2021)."""


@dataclass(frozen=True)
class Layout:
    """One way to lay out a weights file.

    Attributes:
        name: As a note calls it.
        marks: Patterns that tensor names begin with; each must occur.
        absent: A pattern that no name may begin with.
        prefix: What stands before the backbone's own names; tensors without it are set aside.
        head: A pattern for what is set aside within the backbone: heads that classify nothing.
        renames: (pattern, replacement) from here to names that timm, or its converter, knows.
        is_split: Whether queries, keys and values are tensors of their own.
        images: How images were prepared, by the names of `ImageSettings`, where all files of the layout agree.
        is_guess: Whether `images` is a guess, to be called one.
    """

    name: str
    marks: tuple[str, ...] = ()
    absent: str | None = None
    prefix: str = ""
    head: str | None = None
    renames: tuple[tuple[str, str], ...] = ()
    is_split: bool = False
    images: Mapping[str, Any] = field(default_factory=dict)
    is_guess: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether all that is kept belongs to the network: a tensor without a place is then another architecture's."""
        return bool(self.images) and not self.is_guess

    @property
    def implied(self) -> tuple[str, Mapping[str, Any]]:
        """The image settings that follow from the layout, after the sentence that says so."""
        return ("*assumed* of " if self.is_guess else "known of ") + self.name, self.images

    def suits(self, names: Iterable[str]) -> bool:
        """Whether tensors with these names are laid out like this."""
        names = list(names)
        if self.absent is not None and any(re.match(self.absent, name) for name in names):
            return False
        return all(any(re.match(mark, name) for name in names) for mark in self.marks)

    def split(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Return the backbone's tensors under the names that the layout leaves them, and the names of all others."""
        kept, aside = {}, []
        for name, tensor in tensors.items():
            own = name.removeprefix(self.prefix)
            if not name.startswith(self.prefix) or (self.head is not None and re.match(self.head, own)):
                aside.append(name)
                continue
            for pattern, replacement in self.renames:
                own = re.sub(pattern, replacement, own)
            kept[own] = tensor
        return _joined(kept) if self.is_split else kept, aside


PLAIN = Layout("plain")
CLIP_OF_OPEN_CLIP = Layout(
    "CLIP (OpenAI, open_clip)",
    marks=(r"visual\.(class_embedding$|layer1\.)",),
    head=r"(?!visual\.)|visual\.(proj$|attnpool\.c_proj\.|head\.)",  # the text tower, and the projection to it
    images=CLIP,
)
CLIP_OF_TRANSFORMERS = Layout(
    "CLIP (transformers)",
    marks=(r"vision_model\.embeddings\.class_embedding",),
    head=r"(?!vision_model\.)|vision_model\.embeddings\.position_ids",
    renames=(
        (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
        (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
        (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
        (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
        (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
        (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
        (r"\.layer_norm([12])\.", r".ln_\1."),
        (r"\.self_attn\.", ".attn."),
        (r"\.mlp\.fc1\.", ".mlp.c_fc."),
        (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    ),
    is_split=True,
    images=CLIP,
)
LAYOUTS = (
    # He et al. 2020, Chen et al. 2020: the query encoder is kept beside the key encoder and its queue.
    Layout("MoCo v1/v2", marks=(r"encoder_q\.",), prefix="encoder_q.", head=r"(fc|head)\.", images=IMAGENET),
    # Chen et al. 2021, ResNet and ViT: base encoder, its slow copy, and a predictor.
    *(
        Layout(
            "MoCo v3",
            marks=(re.escape(prefix),),
            prefix=prefix,
            head=r"(fc|head)\.",
            images=IMAGENET,
        )
        for prefix in ("base_encoder.", "momentum_encoder.")
    ),
    # Caron et al. 2021; DINOv2's and iBOT's own checkpoints are like it.
    Layout(
        "DINO",
        marks=(r"backbone\.", r"(head\.(mlp|last_layer)|dino_head|ibot_head)\."),
        prefix="backbone.",
        head=r"(fc|head)\.",
        images=IMAGENET,
    ),
    # Caron et al. 2020; DeepCluster-v2 as well.
    Layout(
        "SwAV",
        marks=(r"(projection_head|prototypes)\.",),
        head=r"(projection_head|prototypes)\.",
        images=IMAGENET,
    ),
    # He et al. 2022, with its decoder.
    Layout("MAE", marks=(r"decoder_(embed|blocks|pos_embed)",), head=r"mask_token$|decoder_", images=IMAGENET),
    CLIP_OF_OPEN_CLIP,
    CLIP_OF_TRANSFORMERS,
    # SigLIP and others; they do not agree on how images are prepared, and timm's configuration for the name knows.
    Layout("open_clip with a tower of timm's", marks=(r"visual\.trunk\.",), head=r"(?!visual\.trunk\.)"),
    Layout(
        "torchvision's ViT",
        marks=(r"conv_proj\.", r"encoder\.layers\.encoder_layer_0\."),
        renames=(
            (r"^class_token$", "cls_token"),
            (r"^conv_proj\.", "patch_embed.proj."),
            (r"^encoder\.pos_embedding$", "pos_embed"),
            (r"^encoder\.ln\.", "norm."),
            (r"^heads\.head\.", "head."),
            (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
            (r"\.ln_([12])\.", r".norm\1."),
            (r"\.self_attention\.in_proj_", ".attn.qkv."),
            (r"\.self_attention\.out_proj\.", ".attn.proj."),
            (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
            (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
        ),
        images=IMAGENET,
    ),
    # A run's model.safetensors named by itself, and what many training programs leave.
    Layout("a network called `backbone`", marks=(r"backbone\.",), prefix="backbone."),
    # What MAE, DINO and DINOv2 publish for others to use. timm's configuration for the bare architecture is another's.
    Layout(
        "a ViT without a head, as MAE and DINO publish theirs",
        marks=(r"cls_token$", r"blocks\.0\.attn\.qkv\.bias$"),
        absent=r"(head|fc|classifier)",
        head=r"mask_token$",
        images=IMAGENET,
        is_guess=True,
    ),
    PLAIN,
)


def recognise(names: Iterable[str]) -> Layout:
    """Return the layout of tensors with these names; without a mark of another: `PLAIN`."""
    names = list(names)
    return next(layout for layout in LAYOUTS if layout.suits(names))


def has_classifier(layout: Layout) -> bool:
    """Whether the linear layer after the pooled feature, if there is one, classified the source classes."""
    return layout.head is None


def image_projection(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Return what carries a CLIP image tower's pooled feature to the space shared with text, (D, F); None without one.

    A ViT's is a matrix; a ModifiedResNet's is the last layer of its attention pooling, whose bias shifts all images
    alike and is left out.
    """
    if "visual_projection.weight" in tensors:
        return tensors["visual_projection.weight"].float()
    if "visual.proj" in tensors:
        return tensors["visual.proj"].T.float()
    if "visual.attnpool.c_proj.weight" in tensors:
        return tensors["visual.attnpool.c_proj.weight"].float()
    return None


def _joined(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return queries, keys and values as one tensor each, as `nn.MultiheadAttention` has them."""
    joined = {}
    for name, tensor in tensors.items():
        parts = [tensors.get(re.sub(r"\.[qkv]_proj\.", f".{part}_proj.", name)) for part in "qkv"]
        if ".q_proj." in name and all(part is not None for part in parts):
            joined[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
        elif not re.search(r"\.[qkv]_proj\.", name):
            joined[name] = tensor
    return joined
