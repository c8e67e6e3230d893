"""Which number format and memory layout trains fastest, per family of networks: fills src/tes/models/precision.json.

    uv run python benchmarks/precision.py            # measure and print
    uv run python benchmarks/precision.py --write    # and write this device's entries into the table

Every combination takes its turn in every round, so that a machine whose speed drifts treats them alike; the figure is
the median over rounds of the time relative to fp32 in contiguous layout. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import timm
import torch

from tes.engine.compute import Compute
from tes.models.precision import device_kind

TABLE = Path(__file__).resolve().parents[1] / "src/tes/models/precision.json"
NETWORKS = {
    "conv": ("resnet18", 128),
    "depthwise": ("mobilenetv2_100", 128),
    "transformer": ("vit_tiny_patch16_224", 224),
}
LARGE_NETWORKS = {
    "conv": ("resnet50", 224),
    "depthwise": ("efficientnet_b0", 224),
    "transformer": ("vit_base_patch16_224", 224),
}
"""For a GPU, which spends most of a small network's step waiting for the CPU to start its kernels."""
COMBINATIONS = [(p, m) for p in ("fp32", "bf16") for m in ("contiguous", "channels_last")]


def train_seconds(network: torch.nn.Module, images: torch.Tensor, compute: Compute) -> float:
    """Return the time of one forward and backward pass, the images being on the device already."""
    images = compute.images(images)
    if compute.device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    with compute.autocast():
        features = network(images)
    features.float().square().mean().backward()
    network.zero_grad(set_to_none=True)
    if compute.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int, help="default: 32 on a CPU, 128 on a GPU")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    entries = {}
    is_gpu = arguments.device == "cuda"
    batch_size = arguments.batch_size or (128 if is_gpu else 32)
    for family, (name, size) in (LARGE_NETWORKS if is_gpu else NETWORKS).items():
        images = torch.rand(batch_size, 3, size, size)
        candidates = {}
        for precision, memory_format in COMBINATIONS:
            compute = Compute(arguments.device, precision, memory_format, 0)
            network = compute.place(timm.create_model(name, num_classes=0)).train()
            train_seconds(network, images, compute)  # the first pass prepares kernels
            candidates[precision, memory_format] = (network, compute, [])
        for _ in range(arguments.rounds):
            for network, compute, seconds in candidates.values():
                seconds.append(train_seconds(network, images, compute))
        base = candidates["fp32", "contiguous"][2]
        ratios = {
            key: statistics.median(mine / its for mine, its in zip(seconds, base))
            for key, (_, _, seconds) in candidates.items()
        }
        for (precision, memory_format), ratio in ratios.items():
            rate = batch_size / statistics.median(candidates[precision, memory_format][2])
            print(
                f"{family:12} {name:22} {precision} {memory_format:14} {ratio:5.2f} x fp32 time, {rate:7.1f} images/s"
            )
        # Half precision and another layout have to earn their place: below 5 % it is noise.
        best = min(ratios, key=ratios.get)
        if ratios[best] > 0.95:
            best = ("fp32", "contiguous")
        entries[family] = {
            "precision": best[0],
            "memory_format": best[1],
            "measured": True,
            "time_vs_fp32": round(ratios[best], 2),
            "network": f"{name} at {size} px",
        }
    if arguments.write:
        table = json.loads(TABLE.read_text())
        table["entries"][device_kind(arguments.device)] = entries
        TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
