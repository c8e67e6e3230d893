"""What a training step costs beside a bare loop's, all else equal; and how fast images are read.

    python benchmarks/training_step.py                          # ResNet-50 and ViT-B/16 at 224 px: for a GPU
    python benchmarks/training_step.py --networks mobilenetv2_100 --size 128 --batch-size 32 --rounds 5
    python benchmarks/training_step.py --networks "" --images 48 --sides 4000 3000 --batch-size 16    # reading alone

Every way takes its turn in every round, but the bare loop with cudnn.benchmark, which comes after; the ratio is the
median over rounds. The bare loop has its images and labels on the device already; ours moves uint8 images from pinned
memory. FLOPs are those of PyTorch's counter, 2 per product.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tes
from tes import data
from tes.engine.compute import Compute, seed_everything
from tes.engine.learner import Learner
from tes.engine.loader import Batch, eval_batches, steps_per_epoch, train_batches
from tes.engine.loop import train_step
from tes.engine.memory import ROOM, ImageMemory
from tes.engine.optim import build_optimizer, build_schedule
from tes.engine.start import random_head
from tes.models.backbone import Backbone
from tes.models.image_settings import ImageSettings
from tes.models.precision import resolve_precision
from tes.objectives import objectives
from tes.objectives.base import ObjectiveContext

NUM_CLASSES, TEXT_DIM, STEPS = 100, 384, 10
ARMS = ("ce", "tes", "bi_tuning")
EPOCHS, EVALUATIONS = 10, 5
"""That reading is timed over: half of a training's default, and as often as a training looks at val."""


def bare(network: nn.Module, compute: Compute, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Return one step of the loop that anyone would write."""
    head = nn.Linear(network.num_features, NUM_CLASSES)
    model = compute.place(nn.Sequential(network, head)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    images, labels = compute.images(images), compute.move(labels)

    def step() -> None:
        with compute.autocast():
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def ours(arm: str, network: nn.Module, compute: Compute, batch: Batch, size: int) -> Callable[[], None]:
    """Return one step of the engine."""
    flags = {"data.source": "none", "objective": arm, "train": "all", "optim.learning_rate": 1e-5}
    config = tes.load_config(flags=flags | {"optim.head_learning_rate": 1e-5})
    objective_class = objectives.get(arm)
    decided = {key: value for key, (value, _) in config.objective.decide("all").items()}
    images = ImageSettings(size, 1.0, (0.5,) * 3, (0.5,) * 3, "bilinear")
    backbone = Backbone(network, "own", images, {})
    objective = objective_class(config.objective.model_copy(update=decided))
    learner = Learner(backbone, random_head(backbone.num_features, NUM_CLASSES, 0), objective, compute)
    rows = torch.randn(NUM_CLASSES, TEXT_DIM, generator=torch.Generator().manual_seed(0))
    class_text = nn.functional.normalize(rows, dim=1) if "class_text" in objective.needs else None
    target_NC = torch.eye(NUM_CLASSES).repeat(2, 1)
    features_NF = torch.randn(2 * NUM_CLASSES, backbone.num_features)
    objective.setup(ObjectiveContext(backbone.num_features, NUM_CLASSES, 0, class_text, None, features_NF, target_NC))
    compute.place(learner).train()
    optimizer = build_optimizer(learner, config.optim)
    schedule = build_schedule(optimizer, 10**6, 0.0)

    def step() -> None:
        train_step(learner, batch, optimizer, schedule, 1, config.optim.clip_norm)

    return step


def timed(step: Callable[[], None], device: str) -> float:
    """Return the seconds of one of `STEPS` steps."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / STEPS


def steps(name: str, device: str, size: int, batch_size: int, rounds: int) -> None:
    """Time a network's steps, and print them."""

    def network() -> nn.Module:
        kwargs = {"img_size": size} if name.startswith("vit") else {}
        return timm.create_model(name, num_classes=0, **kwargs)

    family = Backbone(network(), "own", ImageSettings(size, 1.0, (0.5,) * 3, (0.5,) * 3, "bilinear"), {}).family
    compute = Compute(device, *resolve_precision("auto", "auto", device, family)[:2], 0)
    pixels = torch.randint(256, (batch_size, 3, size, size), dtype=torch.uint8)
    labels = torch.arange(batch_size) % NUM_CLASSES
    batch = Batch(torch.arange(batch_size), pixels, labels, key_images_B3HW=None)
    two = Batch(torch.arange(batch_size), pixels, labels, key_images_B3HW=pixels)
    if device == "cuda":
        batch, two = batch.pin_memory(), two.pin_memory()
    ways: dict[str, Callable[[], None]] = {"bare": bare(network(), compute, pixels.float() / 255, labels)}
    for arm in ARMS:
        needs_two = "two_views" in objectives.get(arm).needs
        ways[arm] = ours(arm, network(), compute, two if needs_two else batch, size)
    with FlopCounterMode(display=False) as counter:
        ways["bare"]()
    peaks, seconds = {}, {way: [] for way in ways}
    for way, step in ways.items():
        timed(step, device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            peaks[way] = (torch.cuda.max_memory_allocated() - before) / 2**30
    for _ in range(rounds):
        for way, step in ways.items():
            seconds[way].append(timed(step, device))
    if device == "cuda":
        # The fastest convolutions for these shapes, which may sum in another order each time: what order costs us.
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = True, False
        timed(ways["bare"], device)
        seconds["bare, cudnn.benchmark"] = [timed(ways["bare"], device) for _ in range(rounds)]
    shown = f"{name} at {size} px, batch {batch_size}, {compute.precision} {compute.memory_format}"
    for way, its in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(its, seconds["bare"]))
        median = statistics.median(its)
        rate = counter.get_total_flops() / statistics.median(seconds["bare"]) / 1e12
        print(
            f"{shown}: {way:22} {1000 * median:7.2f} ms ({1000 * min(its):.2f} to {1000 * max(its):.2f}),"
            f" {batch_size / median:7.0f} images/s, {ratio:.3f} of bare"
            + (f", {peaks[way]:.2f} GiB beside the weights" if way in peaks else "")
            + (f", {rate:.1f} TFLOP/s" if way == "bare" else ""),
            flush=True,
        )


def reading(device: str, size: int, batch_size: int, num_images: int, sides: tuple[int, int]) -> None:
    """Time the loader alone, its processes' start included, on made JPEGs, with and without a memory for images."""
    with tempfile.TemporaryDirectory() as folder:
        draw = np.random.default_rng(0)
        for number in range(num_images):
            coarse = Image.fromarray(draw.integers(256, size=(24, 32, 3), dtype=np.uint8))
            path = Path(folder, "photos", f"class{number % 8}", f"{number:04}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse.resize(sides, Image.Resampling.BICUBIC).save(path, quality=90)
        config = tes.load_config(flags={"data.source": f"{folder}/photos"})
        dataset = data.open_dataset(config.data)
        images = ImageSettings(size, 0.95, (0.5,) * 3, (0.5,) * 3, "bicubic")
        indices = dataset.indices("train")
        num_steps = EPOCHS * steps_per_epoch(len(indices), batch_size)
        for num_workers in sorted({0, 2, 4, 8, 16} & set(range((os.cpu_count() or 1) + 1))):
            compute = Compute(device, "fp32", "contiguous", num_workers)
            for room in (0, ROOM):
                memory = ImageMemory(room)
                began = time.perf_counter()
                batches = train_batches(
                    dataset, indices, images, config.augment, compute, batch_size=batch_size, num_steps=num_steps,
                    seed=0, memory=memory,
                )  # fmt: skip
                training = sum(len(batch.labels_B) for batch in batches) / (time.perf_counter() - began)
                began = time.perf_counter()
                for _ in range(EVALUATIONS):
                    for _ in eval_batches(dataset, indices, images, compute, memory):
                        pass
                evaluating = EVALUATIONS * len(indices) / (time.perf_counter() - began)
                print(
                    f"reading {len(indices)} images of {sides[0]} x {sides[1]}, {num_workers} processes,"
                    f" {'with' if room else 'without'} memory: {training:.0f} images/s in {EPOCHS} epochs of training,"
                    f" {evaluating:.0f} in {EVALUATIONS} evaluations",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--networks", default="resnet50,vit_base_patch16_224")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=1024, help="for the loader; 0: leave it out")
    parser.add_argument("--sides", type=int, nargs=2, default=(500, 375), help="of these images, in pixels")
    arguments = parser.parse_args()
    for name in filter(None, arguments.networks.split(",")):
        seed_everything(0)
        steps(name, arguments.device, arguments.size, arguments.batch_size, arguments.rounds)
    if arguments.images:
        reading(arguments.device, arguments.size, arguments.batch_size, arguments.images, tuple(arguments.sides))


if __name__ == "__main__":
    main()
