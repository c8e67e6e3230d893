"""What `train: last-N` saves: activations kept for the backward pass, and the time of a step, per image at 224 px.

    uv run python benchmarks/last_layers.py

The forward pass alone tells what keeping the outputs of the frozen layers could save at most.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

from tes.models.layers import count_layers, freeze_all_but_last

BATCH = 4


def main() -> None:
    images = torch.randn(BATCH, 3, 224, 224)
    for name in ("resnet50", "vit_small_patch16_224"):
        for num_last in (None, 4, 2, 1):
            network = timm.create_model(name, num_classes=0).eval()
            num_layers = count_layers(network)
            if num_last is not None:
                freeze_all_but_last(network, num_last)
            seconds = _fastest(lambda network=network: network(images).square().mean().backward())
            with torch.no_grad():
                forward = _fastest(lambda network=network: network(images))
            print(
                f"{name}, {'all' if num_last is None else f'last-{num_last}'} of {num_layers}:"
                f" {_kept(network, images) / BATCH / 2**20:.1f} MiB kept, {seconds / BATCH:.3f} s a step, of which the"
                f" whole forward pass {forward / BATCH:.3f} s",
                flush=True,
            )


def _kept(network: nn.Module, images: Tensor) -> int:
    """Return the bytes of all tensors that autograd keeps, weights left out."""
    kept: dict[int, int] = {}
    weights = {parameter.data_ptr() for parameter in network.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(images)
    return sum(kept.values())


def _fastest(work: Callable[[], object], times: int = 4) -> float:
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


if __name__ == "__main__":
    main()
