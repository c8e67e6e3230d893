"""`bert:ID`: any BERT-type network (BERT, RoBERTa, MPNet, …); its token vectors are averaged, or the first is taken."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tes.errors import TextError
from tes.text.pretrained import PretrainedEncoder, load, model_folder, model_settings

if TYPE_CHECKING:
    import torch

    from tes.config import TextConfig


class BertEncoder(PretrainedEncoder):
    """A BERT-type network from a local folder or the Hub; `text.pooling` is `mean` (default) or `cls`."""

    def __init__(self, identifier: str, config: TextConfig) -> None:
        super().__init__(identifier, config)
        self.identifier = identifier
        self.pooling = config.pooling or "mean"
        self.spec = f"bert:{identifier}" + (" pooling=cls" if self.pooling == "cls" else "")

    @cached_property
    def folder(self) -> Path:
        """The model's folder; fetched from the Hub where it is neither here nor in the local Hub cache."""
        folder = model_folder("bert", self.identifier)
        settings = model_settings(folder)
        if settings.get("is_encoder_decoder"):
            raise TextError(f"`{self.identifier}` writes text as well as reading it; `bert:` takes an encoder alone.")
        if "clip" in str(settings.get("model_type", "")):
            raise TextError(f"`{self.identifier}` is a CLIP model: write `--text clip:{self.identifier}`.")
        return folder

    def load_network(self) -> torch.nn.Module:
        """Return the network without what a task has put on top."""
        from transformers import AutoModel

        return load(AutoModel, self.folder, unused=("pooler.",))

    def pool(self, output: Any, mask_BL: torch.Tensor) -> torch.Tensor:
        """Return the mean of the token vectors or the first of them (B, D)."""
        tokens_BLD = output.last_hidden_state
        return tokens_BLD[:, 0] if self.pooling == "cls" else mean_of_tokens(tokens_BLD, mask_BL)


def mean_of_tokens(tokens_BLD: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
    """Return the mean (B, D) of the token vectors that are no padding."""
    mask_BL1 = mask_BL.unsqueeze(-1).to(tokens_BLD.dtype)
    return (tokens_BLD * mask_BL1).sum(dim=1) / mask_BL1.sum(dim=1)
