"""`st:ID`: a model of sentence-transformers, with its own pooling, dense layers and prompts (Reimers, Gurevych 2019).

A model is a list of modules, each named by its class. Only four classes of the library itself are let in, so that no
code from the folder is ever imported, and only safetensors.
"""

# N sentences, D embedding dimensions

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tes.errors import ConfigError, MissingExtraError, TextError
from tes.files import sha256_file, sha256_text
from tes.text.encoder import TextEncoder
from tes.text.pretrained import BATCH_SIZE, SENTENCE_TRANSFORMERS, explained, load, model_folder, quiet

if TYPE_CHECKING:
    from tes.config import TextConfig

MODULE = re.compile(r"sentence_transformers(\.\w+)*\.(Transformer|Pooling|Normalize|Dense)")
ACTIVATION = re.compile(r"torch\.nn\.modules\.(activation|linear)\.\w+")


class SentenceEncoder(TextEncoder):
    """A model of sentence-transformers from a local folder or the Hub."""

    def __init__(self, identifier: str, config: TextConfig) -> None:
        super().__init__(identifier, config)
        if config.pooling is not None:
            raise ConfigError("`text.pooling` is for `bert:ID`; a sentence-transformers model says itself how to pool.")
        self.identifier = identifier
        self.spec = f"st:{identifier}"

    @cached_property
    def folder(self) -> Path:
        """The model's folder; fetched from the Hub where it is neither here nor in the local Hub cache."""
        return model_folder("st", self.identifier, SENTENCE_TRANSFORMERS)

    @cached_property
    def modules(self) -> list[tuple[str, Path]]:
        """The modules in their order: the name of the class, and the module's folder.

        Raises:
            TextError: modules.json is damaged, or a module is not one of the four, has no safetensors, or names an
                activation that is not torch's own.
        """
        found = []
        for entry in _read_json(self.folder / "modules.json", list):
            kind, below = (entry.get("type"), entry.get("path")) if isinstance(entry, dict) else (None, None)
            if not isinstance(kind, str) or not isinstance(below, str):
                raise TextError(f"`{self.folder / 'modules.json'}` does not list modules with `type` and `path`.")
            matched, path = MODULE.fullmatch(kind), self.folder / below
            if matched is None or not path.resolve().is_relative_to(self.folder.resolve()):
                raise TextError(
                    f"`{self.identifier}` is built from `{kind}` in `{below}`, and only sentence-transformers' own"
                    " Transformer, Pooling, Normalize and Dense in folders of the model are used: another class would"
                    " run code that nobody here has read; choose another model."
                )
            found.append((matched[2], path))
        for kind, path in found:
            if kind in ("Transformer", "Dense") and not any(path.glob("model*.safetensors")):
                raise TextError(
                    f"`{path}` has no model.safetensors, and other formats can run code when they are opened; take a"
                    " revision of the model with safetensors."
                )
            if kind == "Dense":
                activation = _read_json(path / "config.json", dict).get("activation_function", "")
                if activation and not (isinstance(activation, str) and ACTIVATION.fullmatch(activation)):
                    raise TextError(
                        f"`{path / 'config.json'}` names the activation `{activation}`, not one of torch's."
                    )
        if [kind for kind, _ in found].count("Transformer") != 1 or found[0][0] != "Transformer":
            raise TextError(
                f"`{self.identifier}` does not begin with the one Transformer that is to read the sentences."
            )
        return found

    @cached_property
    def fingerprint(self) -> str:
        """The content of all files of the model and its modules."""
        folders = dict.fromkeys([self.folder, *(path for _, path in self.modules)])
        patterns = ("*.json", "*.txt", "*.model", "model*.safetensors")
        paths = [path for folder in folders for pattern in patterns for path in sorted(folder.glob(pattern))]
        content = [(path.relative_to(self.folder).as_posix(), sha256_file(path)) for path in paths]
        return sha256_text(type(self).__name__, *(part for pair in content for part in pair))

    def encode(self, sentences: Sequence[str]) -> np.ndarray:
        """Return an embedding per sentence, (N, D) float32, as the library computes it.

        Raises:
            MissingExtraError: sentence-transformers is not installed.
            TextError: The model cannot be loaded, or the file of its network lacks tensors.
        """
        modules = self.modules  # checked before the library is imported
        if importlib.util.find_spec("sentence_transformers") is None:
            raise MissingExtraError(
                "`--text st:…` needs sentence-transformers, which is not installed: `uv sync --extra st`, or `pip"
                " install -c constraints.txt '.[st]'` from the clone."
            )
        import torch
        from transformers import AutoModel

        with torch.random.fork_rng(devices=[]), quiet():
            # The library leaves at random what a file lacks; this refuses it.
            load(AutoModel, modules[0][1], unused=("pooler.",))
            from sentence_transformers import SentenceTransformer

            with explained(self.folder, "sentence-transformers"):
                model = SentenceTransformer(
                    str(self.folder),
                    device="cpu",
                    local_files_only=True,
                    trust_remote_code=False,
                    model_kwargs={"use_safetensors": True, "trust_remote_code": False, "dtype": torch.float32},
                )
                rows_ND = model.encode(list(sentences), batch_size=BATCH_SIZE, show_progress_bar=False)
        return np.asarray(rows_ND, dtype=np.float32)


def _read_json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise TextError(f"`{path}` cannot be read as JSON: {problem}.") from None
    if not isinstance(value, kind):
        raise TextError(f"`{path}` is no description of a sentence-transformers model.")
    return value
