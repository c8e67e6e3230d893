"""`openclip:ID`: the text tower of a CLIP as open_clip saves it (Ilharco et al. 2021; Radford et al. 2021).

The architecture is read from `open_clip_config.json`; the weights are safetensors, or a PyTorch file of tensors alone.
"""

# N sentences, L tokens, D embedding dimensions, F features of the image tower

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tes.console import note, progress
from tes.errors import ConfigError, MissingExtraError, ModelError, TextError
from tes.files import sha256_file, sha256_text, user_path
from tes.text.encoder import TextEncoder
from tes.text.pretrained import BATCH_SIZE, OPEN_CLIP, explained, model_folder

if TYPE_CHECKING:
    from torch import Tensor

    from tes.config import TextConfig

DESCRIBED = "open_clip_config.json"
NO_IMAGES = {"layers": 1, "width": 64, "head_width": 64, "patch_size": 32, "image_size": 32}
"""Stands in for the image tower, which open_clip builds along with the text tower."""


class OpenClipEncoder(TextEncoder):
    """The text half of an open_clip model: a folder, a weights file with the description beside it, or a Hub name."""

    def __init__(self, identifier: str, config: TextConfig) -> None:
        super().__init__(identifier, config)
        if config.pooling is not None:
            raise ConfigError("`text.pooling` is for `bert:ID`; CLIP has its own way to pool, leave it out.")
        self.identifier = identifier
        self.spec = f"openclip:{identifier}"

    @cached_property
    def weights(self) -> Path:
        """The weights file; fetched from the Hub where the model is neither here nor in the local Hub cache.

        Raises:
            TextError: There is none, or no description beside it.
        """
        path = user_path(self.identifier)
        if path.is_file():
            if not (path.parent / DESCRIBED).is_file():
                raise TextError(
                    f"Beside `{self.identifier}` there is no {DESCRIBED}, which says what text tower it is; write it"
                    " once, with the name of the architecture (of OpenAI's, ViT-B-32-quickgelu and the like): python -c"
                    " \"import json, open_clip; print(json.dumps({'model_cfg':"
                    f" open_clip.get_model_config('ViT-B-32')}}))\" > {DESCRIBED}"
                )
            return path
        folder = model_folder("openclip", self.identifier, OPEN_CLIP)
        return next(path for name in OPEN_CLIP.weights if (path := folder / name).is_file())

    @cached_property
    def settings(self) -> dict[str, Any]:
        """`model_cfg` of the description.

        Raises:
            TextError: It is damaged, or its text tower or tokeniser is one that open_clip fetches from elsewhere.
        """
        path = self.weights.parent / DESCRIBED
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
            text = dict(settings["text_cfg"])
            int(settings["embed_dim"])
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise TextError(f"`{path}` does not describe an open_clip model ({problem}).") from None
        for key in ("hf_model_name", "hf_tokenizer_name"):
            if text.get(key):
                raise TextError(
                    f"The text tower of `{self.identifier}` needs `{text[key]}` from the Hub ({key} in `{path}`), which"
                    " is not fetched; use a CLIP with open_clip's own text tower and tokeniser."
                )
        return settings

    @cached_property
    def fingerprint(self) -> str:
        """The weights file and what describes it."""
        return sha256_text(type(self).__name__, json.dumps(self.settings, sort_keys=True), sha256_file(self.weights))

    def encode(self, sentences: Sequence[str]) -> np.ndarray:
        """Return the projected vector of each sentence's last token, (N, D) float32.

        Raises:
            MissingExtraError: open_clip is not installed.
            TextError: The weights cannot be read, or do not fit the description.
        """
        settings = self.settings
        if importlib.util.find_spec("open_clip") is None:
            raise MissingExtraError(
                "`--text openclip:…` needs open_clip, which is not installed: `uv sync --extra openclip`, or `pip"
                " install -c constraints.txt '.[openclip]'` from the clone."
            )
        import torch

        tensors = self._read()
        with torch.random.fork_rng(devices=[]), torch.inference_mode(), explained(self.weights.parent, "open_clip"):
            network, tokenize = _build(settings, is_custom=any(name.startswith("text.") for name in tensors))
            self._fill(network, tensors)
            tokens_NL = tokenize(list(sentences))
            if num_long := int((tokens_NL[:, -1] != 0).sum()):
                limit = tokens_NL.shape[1]
                note(
                    f"{num_long} of {len(tokens_NL)} sentences reach the {limit} tokens that {self.spec} can read: cut."
                )
            parts = []
            with progress(len(tokens_NL), f"text embeddings ({self.spec})", unit="sentences") as shown:
                for tokens_BL in tokens_NL.split(BATCH_SIZE):
                    parts.append(network.encode_text(tokens_BL).numpy())
                    shown.advance(len(tokens_BL))
        return np.concatenate(parts)

    def image_projection(self) -> np.ndarray | None:
        """Return (D, F) from the image tower that lies in the same file."""
        from tes.models.layouts import image_projection

        found = image_projection(self._read())
        return None if found is None else found.numpy()

    def _read(self) -> dict[str, Tensor]:
        from tes.models.checkpoint import read_weights

        try:
            return read_weights(self.weights)
        except ModelError as problem:
            raise TextError(str(problem)) from None

    def _fill(self, network: Any, tensors: dict[str, Tensor]) -> None:
        from tes.models.checkpoint import load_strictly

        images = tuple(name for name in network.state_dict() if name.startswith(("visual.", "logit_")))
        text = {name: tensor.float() for name, tensor in tensors.items() if not name.startswith("visual.")}
        try:
            load_strictly(network, text, f"The text tower in `{self.weights}`", may_lack=images)
        except ModelError as problem:
            raise TextError(str(problem)) from None


def _build(settings: dict[str, Any], is_custom: bool) -> tuple[Any, Any]:
    """Return open_clip's network, with a stand-in for the image tower, and its tokeniser."""
    import open_clip

    text = settings["text_cfg"]
    kind = open_clip.CustomTextCLIP if is_custom else open_clip.CLIP
    network = kind(settings["embed_dim"], NO_IMAGES, text, quick_gelu=bool(settings.get("quick_gelu", False)))
    tokenize = open_clip.SimpleTokenizer(
        context_length=text.get("context_length", 77), **(text.get("tokenizer_kwargs") or {})
    )
    if tokenize.vocab_size != network.vocab_size:
        raise TextError(
            f"The text tower knows {network.vocab_size} tokens and open_clip's own tokeniser {tokenize.vocab_size}; use"
            " a CLIP with open_clip's own tokeniser."
        )
    return network.eval(), tokenize
