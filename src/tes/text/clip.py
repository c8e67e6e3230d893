"""`clip:ID`: CLIP's text tower with its projection, the authors' own choice (ViT-B/32)."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tes.errors import ConfigError, TextError
from tes.text.pretrained import PretrainedEncoder, explained, load, model_folder, model_settings

if TYPE_CHECKING:
    import torch

    from tes.config import TextConfig


class ClipEncoder(PretrainedEncoder):
    """The text half of a CLIP model from a local folder or the Hub."""

    max_tokens = 77

    def __init__(self, identifier: str, config: TextConfig) -> None:
        super().__init__(identifier, config)
        if config.pooling is not None:
            raise ConfigError("`text.pooling` is for `bert:ID`; CLIP has its own way to pool, leave it out.")
        self.identifier = identifier
        self.spec = f"clip:{identifier}"

    @cached_property
    def folder(self) -> Path:
        """The model's folder; fetched from the Hub where it is neither here nor in the local Hub cache."""
        folder = model_folder("clip", self.identifier)
        kind = model_settings(folder).get("model_type")
        if kind not in ("clip", "clip_text_model"):
            raise TextError(f"`{self.identifier}` is of the type `{kind}`, not `clip`; try `--text bert:…` for it.")
        return folder

    def load_network(self) -> torch.nn.Module:
        """Return the text tower and its projection; the image tower stays on disk."""
        from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModelWithProjection

        with explained(self.folder, "its config.json"):
            if model_settings(self.folder)["model_type"] == "clip":
                whole = CLIPConfig.from_pretrained(self.folder, local_files_only=True)
                settings = whole.text_config
                # The text half's own entry may be a left-over default: a whole CLIP model never reads it.
                settings.projection_dim = whole.projection_dim
            else:
                settings = CLIPTextConfig.from_pretrained(self.folder, local_files_only=True)
        return load(CLIPTextModelWithProjection, self.folder, config=settings)

    def pool(self, output: Any, mask_BL: torch.Tensor) -> torch.Tensor:
        """Return the projected vector of the end-of-text token (B, D)."""
        return output.text_embeds

    def image_projection(self) -> np.ndarray | None:
        """Return (D, F) from the image half of the same file; None where the folder holds the text half alone."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.folder / "model.safetensors", "numpy") as stored:
                name = "visual_projection.weight"
                return stored.get_tensor(name).astype(np.float32) if name in stored.keys() else None  # noqa: SIM118
        except (SafetensorError, OSError, TypeError):
            return None  # in several files, or not to be read without torch
