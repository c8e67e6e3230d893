"""Weights files: opened without running anything they bring along, and matched to a network tensor by tensor."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tes.errors import ModelError, did_you_mean, listing, one_line
from tes.models.layouts import PLAIN, Layout, has_classifier, image_projection, recognise
from tes.run import Run

CONTAINERS = ("teacher", "student", "state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict")
"""Keys under which training programs keep the weights beside optimisers and counters, the better ones first: DINO's
teacher before its student, an average of the weights before the last ones."""
WRAPPERS = ("module.", "_orig_mod.")
"""What (Distributed)DataParallel and torch.compile put before all names."""


@dataclass(frozen=True)
class Checkpoint:
    """A weights file that somebody published or kept, taken apart.

    Attributes:
        tensors: The backbone's, by the network's own names as far as these are known.
        layout: How the file was laid out.
        has_classifier: Whether a last linear layer among the tensors classified the source classes.
        projection_DF: What carries a CLIP tower's pooled feature to the space that it shares with text; None otherwise.
        aside: The names in the file of what was set aside.
        notes: What was taken and what was set aside, in sentences.
    """

    tensors: dict[str, Tensor]
    layout: Layout = PLAIN
    has_classifier: bool = True
    projection_DF: Tensor | None = None
    aside: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def open_checkpoint(path: Path, network: nn.Module, what: str, name: str | None) -> Checkpoint:
    """Read a weights file of any known layout, or the backbone of a run folder, for a network.

    Args:
        path: The file, or the run folder.
        network: Whose names the tensors are to have; it is not changed.
        what: How messages call the checkpoint.
        name: The backbone's name, which a run must have been trained from; None: any.

    Raises:
        ModelError: It cannot be read, or the run's backbone has another name.
        RunError: The folder is no finished run, or damaged.
    """
    if path.is_dir():
        if not any((path / name).is_file() for name in ("run.json", "config.yaml", "compare.json")):
            raise ModelError(f"{what} is a folder and no run of ours; name the weights file in it.")
        return _of_a_run(Run.open(path), network, what, name)
    tensors, container = _read(path)
    notes = [f"{what} holds several networks; `{container}` is the one that is taken"] if container else []
    layout = recognise(tensors)
    if layout.prefix and any(own.startswith(layout.prefix) for own in network.state_dict()):
        layout = PLAIN  # a part of the network itself is called like that
    kept, aside = layout.split(tensors)
    if layout is not PLAIN:
        notes.append(f"{what} is laid out like {layout.name}")
    if aside:
        notes.append(f"set aside in {what[0].lower()}{what[1:]}: {_grouped(aside, tensors.keys() - set(aside))}")
    converted = _converted(kept, network)
    if resized := _resized(kept, converted):
        notes.append(resized)
    return Checkpoint(converted, layout, has_classifier(layout), image_projection(tensors), tuple(aside), tuple(notes))


def run_weights(run: Run) -> dict[str, Tensor]:
    """Return a run's trained tensors: `backbone.*`, `head.weight`, `head.bias`; of a comparison's cell as well."""
    if "backbone.safetensors" in (run.summary.get("shared") or {}):
        return read_weights(run.file("backbone.safetensors")) | read_weights(run.path / "head.safetensors")
    return read_weights(run.path / "model.safetensors")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a `.safetensors` or PyTorch file by the names that they have in it.

    Raises:
        ModelError: The file is absent, damaged, holds more than tensors and plain values, or no tensors at all.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Return a file's tensors, and, where it holds several networks, which of them they are."""
    if not path.is_file():
        parent = path.parent if path.parent.is_dir() else Path()
        near = did_you_mean(path.name, [other.name for other in parent.iterdir() if other.is_file()])
        raise ModelError(f"There is no checkpoint `{path}`.{near}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return _unwrapped(load_file(path)), None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as problem:
            raise ModelError(
                f"The checkpoint `{path}` is not a readable safetensors file: {one_line(problem, 200)}."
            ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript archives, which are refused below
            with torch.serialization.safe_globals(_plain_values()):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as problem:
        found = re.search(r"GLOBAL ([\w.]+)", str(problem))
        named = f" (`{found.group(1)}`)" if found else ""
        raise ModelError(
            f"The checkpoint `{path}` holds Python objects{named}, not only tensors, and was not opened because loading"
            " them would run code from the file; save its `state_dict()` alone, best as .safetensors."
        ) from None
    except RuntimeError as problem:
        if "TorchScript" not in str(problem):
            raise ModelError(
                f"The checkpoint `{path}` is damaged or no PyTorch file: {one_line(problem, 200)}."
            ) from None
        items, out = f"torch.jit.load('{path}', 'cpu').state_dict().items()", path.with_suffix(".safetensors")
        raise ModelError(
            f"The checkpoint `{path}` is a TorchScript archive, a program with its weights (OpenAI's CLIP comes so),"
            " and was not opened because that would run the program; if you trust it, save its tensors once:"
            ' python -c "import torch; from safetensors.torch import save_file;'
            f" save_file({{k: v.contiguous() for k, v in {items}}}, '{out}')\"."
        ) from None
    except Exception as problem:  # PyTorch's unpickler raises nearly anything on damaged files
        raise ModelError(f"The checkpoint `{path}` is damaged or no PyTorch file: {one_line(problem, 200)}.") from None
    return _unwrap(content, path)


class _Unread:
    """Stands for a number of NumPy's in a file: its own constructors would copy memory on the file's word."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _plain_values() -> list[Any]:
    """Return what may stand beside the tensors, as training programs write it: settings, and NumPy's numbers."""
    names = ("numpy.dtype", "numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar")
    return [argparse.Namespace, *((_Unread, name) for name in names)]


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
        if "fc_norm.weight" in missing and "norm.weight" in unused:
            parts.append("with --set backbone.kwargs.fc_norm=false its last norm comes before the pooling, as here")
        raise ModelError(f"{what} does not fit the network `{_kind(network)}`: {'; '.join(parts)}.")
    network.load_state_dict({name: tensor for name, tensor in weights.items() if name in own}, strict=False)
    return unused


def _unwrap(content: object, path: Path) -> tuple[dict[str, Tensor], str | None]:
    found = [name for name in CONTAINERS if isinstance(content, Mapping) and isinstance(content.get(name), Mapping)]
    if found:
        content = content[found[0]]
    tensors = {
        str(name): value
        for name, value in (content.items() if isinstance(content, Mapping) else ())
        if torch.is_tensor(value)
    }
    if not tensors:
        raise ModelError(f"The checkpoint `{path}` holds no tensors by name; save the network's `state_dict()`.")
    return _unwrapped(tensors), found[0] if len(found) > 1 else None


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    while wrapper := next((mark for mark in WRAPPERS if all(name.startswith(mark) for name in tensors)), None):
        tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return tensors


def _of_a_run(run: Run, network: nn.Module, what: str, name: str | None) -> Checkpoint:
    recorded = run.settings.get("backbone")
    recorded = recorded if isinstance(recorded, dict) else {}
    if name is not None and recorded.get("name") != name:
        flags = ["--backbone", str(recorded.get("name"))]
        if recorded.get("kwargs"):
            flags += ["--set", f"backbone.kwargs={json.dumps(recorded['kwargs'])}"]
        raise ModelError(
            f"The run `{run.path}` was trained from `{recorded.get('name')}`, not from `{name}`: add"
            f" {shlex.join(flags)}."
        )
    weights = run_weights(run)
    layout = Layout("a run of ours", prefix="backbone.")
    kept, _ = layout.split(weights)
    tensors = _converted(kept, network)
    notes = [f"{what} is a run: training goes on from its backbone", _resized(kept, tensors)]
    if run.summary.get("default_head") == "vision":
        tensors |= {key: tensor for key, tensor in weights.items() if key in ("head.weight", "head.bias")}
    return Checkpoint(tensors, layout, notes=tuple(note for note in notes if note))


def _converted(tensors: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Put tensors into the network's names and sizes by timm's converter for its architecture, where there is one."""
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if convert is None or not type(network).__module__.startswith("timm."):
        return tensors
    try:
        return convert(dict(tensors), network)
    except Exception:  # tensors of another architecture: the strict loading that follows says which do not fit
        return tensors


def _resized(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> str | None:
    """Say that position embeddings were made for images of another size, where they were."""
    old = next((t for name, t in before.items() if name.endswith(("pos_embed", "positional_embedding"))), None)
    new = after.get("pos_embed")
    if old is None or new is None or old.shape[-2] == new.shape[-2]:
        return None
    return f"position embeddings are resized from {old.shape[-2]} to {new.shape[-2]} places"


def _grouped(aside: Sequence[str], kept: set[str]) -> str:
    """Return the names that were set aside in few words: as a whole where nothing was kept of what is called so."""
    in_use = {name.split(".")[0] for name in kept}
    groups = Counter(top if (top := name.split(".")[0]) not in in_use else name for name in aside)
    single = {name.split(".")[0]: name for name in aside}
    return listing(
        [single.get(group, group) if n == 1 else f"{group}.* ({n} tensors)" for group, n in groups.items()], 8
    )


def _kind(network: nn.Module) -> str:
    return type(network).__name__
