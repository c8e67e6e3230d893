"""Weights files: opened without running anything they bring along, and matched to a network tensor by tensor."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tes.errors import ModelError, did_you_mean, listing

CONTAINERS = ("state_dict", "model", "model_state_dict", "model_ema", "state_dict_ema")
"""Keys under which training programs keep the weights beside optimisers and counters."""
ENCODERS = ("module.encoder_q.", "encoder_q.")
"""What stands before the names of the network that is worth keeping, where a checkpoint holds several: MoCo v1 and v2
(He et al. 2020, Chen et al. 2020) keep the query encoder beside the key encoder and its queue."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a `.safetensors` or PyTorch file by name.

    Raises:
        ModelError: The file is absent, damaged, holds more than tensors and plain values, or no tensors at all.
    """
    if not path.is_file():
        parent = path.parent if path.parent.is_dir() else Path()
        near = did_you_mean(path.name, [other.name for other in parent.iterdir() if other.is_file()])
        raise ModelError(f"There is no checkpoint `{path}`.{near}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as problem:
            raise ModelError(f"The checkpoint `{path}` is not a readable safetensors file: {problem}.") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ModelError(
            f"The checkpoint `{path}` holds Python objects, not only tensors, and was not opened because loading them"
            " would run code from the file; save its `state_dict()` alone, best as .safetensors."
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as problem:
        raise ModelError(f"The checkpoint `{path}` is damaged or no PyTorch file: {_one_line(problem)}.") from None
    return _unwrap(content, path)


def load_strictly(
    network: nn.Module, weights: Mapping[str, Tensor], what: str, may_lack: tuple[str, ...] = ()
) -> list[str]:
    """Load `weights` into `network` so that no tensor is left as it was.

    Args:
        network: Changed in place.
        weights: Tensors by the network's own names.
        what: How messages call the weights.
        may_lack: Names of the network's tensors that the weights need not have.

    Returns:
        The names in `weights` that the network has no place for.

    Raises:
        ModelError: A tensor of the network is missing or of another shape; the message names them.
    """
    own = network.state_dict()
    counters = {name for name in own if name.endswith("num_batches_tracked")}  # absent from old and converted files
    missing = [name for name in own if name not in weights and name not in counters and name not in may_lack]
    wrong = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    unused = [name for name in weights if name not in own and not name.endswith("num_batches_tracked")]
    if missing or wrong:
        parts = [f"{len(missing)} tensors are missing: {listing(missing, 3)}"] if missing else []
        parts += [f"{len(wrong)} have another shape: {listing(wrong, 3)}"] if wrong else []
        parts += [f"the file has {len(unused)} others: {listing(unused, 3)}"] if unused and missing else []
        raise ModelError(f"{what} does not fit the network `{_kind(network)}`: {'; '.join(parts)}.")
    network.load_state_dict({name: tensor for name, tensor in weights.items() if name in own}, strict=False)
    return unused


def _unwrap(content: object, path: Path) -> dict[str, Tensor]:
    for container in CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(container), Mapping):
            content = content[container]
            break
    tensors = {
        str(name): value
        for name, value in (content.items() if isinstance(content, Mapping) else ())
        if torch.is_tensor(value)
    }
    if not tensors:
        raise ModelError(f"The checkpoint `{path}` holds no tensors by name; save the network's `state_dict()`.")
    for prefix in ENCODERS:
        if any(name.startswith(prefix) for name in tensors):
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if all(name.startswith("module.") for name in tensors):  # left by (Distributed)DataParallel
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _kind(network: nn.Module) -> str:
    return type(network).__name__


def _one_line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:200] or type(problem).__name__
