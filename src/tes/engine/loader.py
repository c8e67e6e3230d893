"""From images on disk to batches: the same batch at the same (seed, epoch, step), whatever the workers.

Sample order is a function of (seed, epoch), an image's augmentation of (seed, epoch, index, view). Batches are uint8;
the backbone normalises on the device. Shapes: B batch, N images, H = W = size.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from tes.config import AugmentConfig
from tes.data.dataset import Dataset, LostImageError
from tes.engine.balance import balanced_epoch
from tes.engine.compute import Compute
from tes.errors import DataError
from tes.models.image_settings import ImageSettings

CACHE_BYTES = 2 * 2**30
SMALL_IMAGES = 64
"""Up to this size in pixels, crops after padding (the CIFAR recipe); above, crops of random area and shape."""


@dataclass(frozen=True)
class Batch:
    """`indices_B` into the data set, uint8 RGB images, and the classes' indices.

    Once mixed (mix.py), also soft targets; for two views, the images drawn again.
    """

    indices_B: Tensor
    images_B3HW: Tensor
    labels_B: Tensor
    target_BC: Tensor | None = None
    key_images_B3HW: Tensor | None = None

    def pin_memory(self) -> Batch:
        """Return the batch in memory that an accelerator copies from while the CPU goes on; the data loader asks."""
        return Batch(*(None if x is None else x.pin_memory() for x in vars(self).values()))

    def split(self, num_parts: int) -> Iterator[Batch]:
        """Yield the micro-batches."""
        parts = [None if x is None else x.tensor_split(num_parts) for x in vars(self).values()]
        for k in range(num_parts):
            yield Batch(*(None if part is None else part[k] for part in parts))


def eval_transform(images: ImageSettings) -> Callable[[Image.Image], Tensor]:
    """Return resize (the short side, or with `squash` both, to size / crop_fraction), centre crop, uint8 (3, H, W)."""
    from torchvision.transforms import v2

    side = round(images.size / images.crop_fraction)
    return v2.Compose(
        [
            v2.Resize((side, side) if images.fit == "squash" else side, interpolation=_mode(images), antialias=True),
            v2.CenterCrop(images.size),
            v2.PILToTensor(),
        ]
    )


def train_transform(images: ImageSettings, augment: AugmentConfig) -> Callable[[Image.Image], Tensor]:
    """Return the random transform of a training image, uint8 tensor (3, H, W)."""
    from torchvision.transforms import v2

    policy, cut = augment.policy, augment.crop_size or images.size
    if policy == "auto":
        policy = "padded_crop" if cut <= SMALL_IMAGES or augment.crop_size else "resized_crop"
    steps: list[Callable] = {
        "none": lambda: [eval_transform(images)],
        "padded_crop": lambda: [
            v2.Resize(cut, interpolation=_mode(images), antialias=True),
            v2.RandomCrop(cut, padding=cut // 8),
            v2.Resize(images.size, interpolation=_mode(images), antialias=True),
            v2.PILToTensor(),
        ],
        "resized_crop": lambda: [
            v2.RandomResizedCrop(
                images.size, scale=(augment.min_scale, 1.0), interpolation=_mode(images), antialias=True
            ),
            v2.PILToTensor(),
        ],
    }[policy]()
    if augment.flip:
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose(steps)


def eval_batches(dataset: Dataset, indices: np.ndarray, images: ImageSettings, compute: Compute) -> Iterator[Batch]:
    """Yield every image of `indices` exactly once, in order, as at test time; an image that is lost is left out."""
    reader = _Reader(dataset, eval_transform(images), seed=None)
    num_parts = math.ceil(len(indices) / compute.eval_batch_size) or 1
    batches = [[(0, int(index)) for index in part] for part in np.array_split(indices, num_parts)]
    # To start a process takes as long as to read a batch: no more of them than batches, and none for one.
    num_workers = min(compute.num_workers, num_parts) if num_parts > 1 else 0
    yield from _load(reader, batches, replace(compute, num_workers=num_workers))


def train_batches(
    dataset: Dataset,
    indices: np.ndarray,
    images: ImageSettings,
    augment: AugmentConfig,
    compute: Compute,
    *,
    batch_size: int,
    num_steps: int,
    seed: int,
    first_step: int = 0,
    two_views: bool = False,
    balanced: bool = False,
) -> Iterator[Batch]:
    """Yield the augmented batches of steps `first_step` to `num_steps`; a second view leaves the first as it is.

    In the place of an image that is lost comes another of its class, which one a function of (seed, epoch, index).
    """
    reader = _Reader(
        dataset,
        train_transform(images, augment),
        seed,
        max_side=_useful_side(images, augment),
        keeps=compute.num_workers == 0,
        num_views=2 if two_views else 1,
        pool=indices,
    )
    steps = order(indices, batch_size, num_steps, seed, dataset.labels if balanced else None)
    yield from _load(reader, itertools.islice(steps, first_step, None), compute)


def _useful_side(images: ImageSettings, augment: AugmentConfig) -> int:
    """Return the short side from which on an image has more pixels than its smallest crop can show."""
    return max(math.ceil(images.size / math.sqrt(augment.min_scale)), augment.crop_size or 0, 2 * images.size)


def order(
    indices: np.ndarray, batch_size: int, num_steps: int, seed: int, labels: np.ndarray | None = None
) -> Iterator[list[tuple[int, int]]]:
    """Yield for every step its (epoch, index) pairs; with the data set's `labels`, every class comes as often.

    A batch holds min(batch_size, N) images; the last one of an epoch wraps round to the epoch's first images, since a
    batch of one breaks batch norm.
    """
    size = min(batch_size, len(indices))
    per_epoch = steps_per_epoch(len(indices), batch_size)
    for step in range(num_steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            draw = np.random.default_rng((seed, epoch))
            shuffled = draw.permutation(indices) if labels is None else balanced_epoch(indices, labels, draw)
            wrapped = np.resize(shuffled, per_epoch * size).reshape(per_epoch, size)
        yield [(epoch, int(index)) for index in wrapped[place]]


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Return how many batches see every image at least once."""
    return math.ceil(num_images / min(batch_size, num_images))


@dataclass(frozen=True)
class _Read:
    """An image's views, none where there is none to be had, and (index, reason) of what could not be read."""

    index: int
    label: int
    views: list[Tensor]
    lost: list[tuple[int, str]]


class _Reader(torch.utils.data.Dataset):
    """Reads image `index` for `epoch`; draws its views from generators seeded by (seed, epoch, index, view).

    Where it cannot be read, one of its class from `pool`, if there is a pool. What is lost is only reported: the reader
    may be one of several processes, and the data set's record is kept in the first.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Callable,
        seed: int | None,
        max_side: int | None = None,
        keeps: bool = False,
        num_views: int = 1,
        pool: np.ndarray | None = None,
    ) -> None:
        self.dataset, self.transform, self.seed, self.num_views = dataset, transform, seed, num_views
        self.max_side, self.kept, self.room = max_side, {}, CACHE_BYTES if keeps else 0
        self.pool = np.empty(0, dtype=np.int64) if pool is None else pool

    def __getitem__(self, position: tuple[int, int]) -> _Read:
        epoch, wanted = position
        label, lost = int(self.dataset.labels[wanted]), []
        for index in itertools.chain([wanted], self._others(epoch, wanted)):
            try:
                image = self._image(index)
            except LostImageError as problem:
                lost.append((index, problem.reason))
                continue
            views = [self._view(image, epoch, index, view) for view in range(self.num_views)]
            return _Read(index, label, views, lost)
        return _Read(wanted, label, [], lost)

    def _others(self, epoch: int, index: int) -> Iterator[int]:
        """Yield the images of the pool that may stand in for one that is lost; nothing is drawn until then."""
        labels = self.dataset.labels
        like = self.pool[(labels[self.pool] == labels[index]) & (self.pool != index)]
        yield from np.random.default_rng((self.seed or 0, epoch, index)).permutation(like).tolist()

    def _view(self, image: Image.Image, epoch: int, index: int, view: int) -> Tensor:
        if self.seed is None:
            return self.transform(image)
        key = f"{self.seed}:{epoch}:{index}" + (f":{view}" if view else "")
        with torch.random.fork_rng(devices=[]):
            # The CPU's alone: reading must not reseed what an accelerator draws in training.
            torch.default_generator.manual_seed(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()))
            return self.transform(image)

    def _image(self, index: int) -> Image.Image:
        """Return an image, of training reduced to what crops can use: the same one, whether images are kept or not."""
        image = self.kept.get(index)
        if image is None:
            image = self.dataset.read_image(index)
            if self.max_side is not None and min(image.size) > self.max_side:
                factor = self.max_side / min(image.size)
                size = tuple(max(1, round(side * factor)) for side in image.size)
                image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
            # Decoding costs more than a small network's training step: keep what fits.
            if (num_bytes := 3 * image.width * image.height) <= self.room:
                self.kept[index] = image
                self.room -= num_bytes
        return image


def _load(reader: _Reader, batches: Iterable[list[tuple[int, int]]], compute: Compute) -> Iterator[Batch]:
    # The loader draws its workers' base seed from the global generator; a generator of its own leaves that one alone.
    loader = DataLoader(
        reader,
        batch_sampler=batches,
        num_workers=compute.num_workers,
        collate_fn=_collate,
        pin_memory=compute.device == "cuda",
        generator=torch.Generator().manual_seed(0),
    )
    try:
        for batch, lost in loader:
            for index, reason in lost:
                reader.dataset.lose(index, reason)
            if batch is not None:
                yield batch
    except DataError as problem:  # a worker's comes with the worker's traceback before the sentence
        raise DataError(str(problem).rpartition(f"{DataError.__name__}: ")[2].strip()) from None


def _collate(samples: list[_Read]) -> tuple[Batch | None, list[tuple[int, str]]]:
    lost = [entry for sample in samples for entry in sample.lost]
    if not (samples := [sample for sample in samples if sample.views]):
        return None, lost
    indices, labels = ([getattr(sample, name) for sample in samples] for name in ("index", "label"))
    images, *more = (torch.stack(view) for view in zip(*(sample.views for sample in samples)))
    return Batch(torch.tensor(indices), images, torch.tensor(labels), key_images_B3HW=more[0] if more else None), lost


def _mode(images: ImageSettings):
    from torchvision.transforms import InterpolationMode

    return InterpolationMode(images.interpolation)
