"""What very many classes cost, in seconds and in memory: drawn images, a tiny network, finished text rows, head only.

    uv run python benchmarks/many_classes.py OUT --classes 10000 --images 4

The images (of 16 x 16 pixels), the network and the text rows are made in OUT; they say nothing about accuracy.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import numpy as np
from PIL import Image

import tes
from tes.config import load_config

KWARGS = {"channels": [16, 32, 32, 64], "stem_width": 8}


def make(out: Path, num_classes: int, num_images: int) -> dict[str, object]:
    import timm
    import torch
    from safetensors.torch import save_file

    draw = np.random.default_rng(0)
    for label in range(num_classes):
        folder = out / "photos" / f"thing {label:05}"
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(num_images):
            if not (folder / f"{number}.png").exists():
                Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=10, **KWARGS)
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, out / "tiny.safetensors")
    names = np.array([f"thing {label:05}" for label in range(num_classes)])
    np.savez(out / "rows.npz", names=names, embeddings=draw.normal(size=(num_classes, 64)).astype(np.float32))
    return {
        "data.source": str(out / "photos"), "text.encoder": f"file:{out / 'rows.npz'}", "backbone.name": "resnet18",
        "backbone.kwargs": KWARGS, "backbone.checkpoint": str(out / "tiny.safetensors"), "image.size": 16,
        "train": "head", "precision": "fp32", "refit": "none",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--classes", type=int, default=10_000)
    parser.add_argument("--images", type=int, default=4)
    arguments = parser.parse_args()
    flags = make(arguments.out, arguments.classes, arguments.images)
    for objective in ("ce", "tes"):
        began = time.perf_counter()
        run = tes.train(
            load_config(flags=flags | {"objective": objective, "out": str(arguments.out / objective)}), overwrite=True
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{objective}: {time.perf_counter() - began:.0f} s, {peak:.2f} GiB at most, {len(run.images)} images")


if __name__ == "__main__":
    main()
