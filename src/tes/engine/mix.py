"""mixup and cutmix: training on mixtures of two images, with the mixture of their labels as target.

    mixup     x = λ x_i + (1-λ) x_j                          Zhang, Cisse, Dauphin, Lopez-Paz. ICLR 2018
    cutmix    x = x_i with a rectangle of x_j, 1-λ its area  Yun, Han, Oh, Chun, Choe, Yoo. ICCV 2019

and y = λ y_i + (1-λ) y_j for both, with one λ ~ Beta(α, α) a batch. Shapes: B batch, C classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from tes.config import AugmentConfig
from tes.engine.compute import Compute
from tes.engine.learner import one_hot
from tes.engine.loader import Batch


def mixed(
    batches: Iterable[Batch],
    augment: AugmentConfig,
    num_classes: int,
    compute: Compute,
    *,
    seed: int,
    first_step: int = 0,
) -> Iterable[Batch]:
    """Return the batches, mixed as `augment` says: by mixup, by cutmix, or, with both, by one of them, at even odds.

    A batch is mixed whole, on the device, into float32 images of the range 0..255 and soft targets (B, C). What is
    drawn is a function of (seed, step). With neither, the batches are returned as they are.
    """
    from torchvision.transforms import v2

    kinds = [kind(alpha=alpha) for kind, alpha in ((v2.MixUp, augment.mixup), (v2.CutMix, augment.cutmix)) if alpha]
    return _mix(batches, v2.RandomChoice(kinds), num_classes, compute, seed, first_step) if kinds else batches


def _mix(
    batches: Iterable[Batch], mix: torch.nn.Module, num_classes: int, compute: Compute, seed: int, first_step: int
) -> Iterator[Batch]:
    for step, batch in enumerate(batches, first_step):
        images_B3HW = compute.images(batch.images_B3HW).float()  # mixup cannot be written into uint8
        target_BC = one_hot(compute.move(batch.labels_B), num_classes)
        digest = hashlib.blake2b(f"mix:{seed}:{step}".encode(), digest_size=8).digest()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int.from_bytes(digest))  # the CPU's alone: an accelerator draws nothing
            images_B3HW, target_BC = mix(images_B3HW, target_BC)
        yield replace(batch, images_B3HW=images_B3HW, target_BC=target_BC)
