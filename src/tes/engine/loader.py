"""From images on disk to batches: the same batch at the same (seed, epoch, step), whatever the workers.

Sample order is a function of (seed, epoch), an image's augmentation of (seed, epoch, index, view). Batches are uint8;
the backbone normalises on the device. Shapes: B batch, N images, H = W = size.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import shutil
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from tes import console
from tes.config import AugmentConfig
from tes.data.dataset import Dataset, LostImageError
from tes.data.scan import reading_threads
from tes.engine.balance import balanced_epoch
from tes.engine.compute import Compute
from tes.engine.memory import ImageMemory
from tes.errors import DataError
from tes.models.image_settings import ImageSettings

READ_AHEAD = 128
"""Images that are read between two looks at how much room is left."""
CAN_FORK = sys.platform == "linux"
"""Elsewhere a process starts with nothing of this one's memory."""
SHARED_MEMORY = Path("/dev/shm")
"""Through which processes hand batches over, on Linux; a container's is small."""
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


def eval_batches(
    dataset: Dataset, indices: np.ndarray, images: ImageSettings, compute: Compute, memory: ImageMemory | None = None
) -> Iterator[Batch]:
    """Yield every image of `indices` exactly once, in order, as at test time; an image that is lost is left out.

    Args:
        dataset: Which holds the images.
        indices: Which of them.
        images: How they are prepared.
        compute: With the size of the batches.
        memory: Takes up the prepared images, for those who come back for them.
    """
    reader = _EvalReader(dataset, images, memory or ImageMemory(room=0))
    num_parts = math.ceil(len(indices) / compute.eval_batch_size) or 1
    batches = [part.tolist() for part in np.array_split(indices, num_parts)]
    # More processes than batches would have nothing to read, nor would any where all images are in memory.
    is_kept = all(reader.key(index) in reader.memory for index in indices.tolist())
    num_workers = 0 if is_kept or num_parts == 1 else min(compute.num_workers, num_parts)
    num_workers = _affordable(num_workers, len(batches[0]) * 3 * images.size**2)
    for batch in _load(reader, batches, num_workers, compute):
        if not is_kept and reader.memory.room:
            for index, image in zip(batch.indices_B.tolist(), batch.images_B3HW):
                reader.memory.keep(reader.key(index), image.clone(), image.nbytes)
        yield batch


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
    memory: ImageMemory | None = None,
) -> Iterator[Batch]:
    """Return the augmented batches of steps `first_step` to `num_steps`; a second view leaves the first as it is.

    In the place of an image that is lost comes another of its class, which one a function of (seed, epoch, index).
    Where processes read, and more than one epoch is left, the images that `memory` has room for are read beforehand,
    or each process would decode them anew in every epoch.
    """
    num_views = 2 if two_views else 1
    batch_bytes = min(batch_size, len(indices)) * num_views * 3 * images.size**2
    num_workers = _affordable(compute.num_workers, batch_bytes)
    memory = memory or ImageMemory()
    reader = _TrainReader(dataset, images, augment, seed, memory, indices, num_views=num_views, keeps=num_workers == 0)
    memory.forget_others("reduced", set(map(reader.key, np.unique(indices).tolist())))
    if num_workers and CAN_FORK and num_steps - first_step > steps_per_epoch(len(indices), batch_size):
        reader.read_ahead()
    steps = order(indices, batch_size, num_steps, seed, dataset.labels if balanced else None)
    return _load(reader, itertools.islice(steps, first_step, None), num_workers, compute)


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


class _EvalReader(torch.utils.data.Dataset):
    """Reads an image as at test time, from `memory` where it is there.

    What is lost is only reported: the reader may be one of several processes, and the data set's record is kept in the
    first.
    """

    def __init__(self, dataset: Dataset, images: ImageSettings, memory: ImageMemory) -> None:
        self.dataset, self.images, self.memory = dataset, images, memory
        self.transform = eval_transform(images)

    def key(self, index: int) -> tuple[Hashable, ...]:
        """Return what a prepared image is known by in the memory."""
        return "prepared", self.images, index

    def __getitem__(self, index: int) -> _Read:
        label, image = int(self.dataset.labels[index]), self.memory.get(self.key(index))
        if image is None:
            try:
                image = self.transform(self.dataset.read_image(index))
            except LostImageError as problem:
                return _Read(index, label, [], [(index, problem.reason)])
        return _Read(index, label, [image], [])


class _TrainReader(torch.utils.data.Dataset):
    """Reads image `index` for `epoch`; draws its views from generators seeded by (seed, epoch, index, view).

    Where it cannot be read, one of its class from `pool`, the images that are trained on. What is lost is only
    reported, as above. With `keeps`, what is read goes into the memory.
    """

    def __init__(
        self,
        dataset: Dataset,
        images: ImageSettings,
        augment: AugmentConfig,
        seed: int,
        memory: ImageMemory,
        pool: np.ndarray,
        *,
        num_views: int,
        keeps: bool,
    ) -> None:
        self.dataset, self.seed, self.memory, self.pool = dataset, seed, memory, pool
        self.transform, self.max_side = train_transform(images, augment), _useful_side(images, augment)
        self.num_views, self.keeps = num_views, keeps

    def key(self, index: int) -> tuple[Hashable, ...]:
        """Return what a decoded image is known by in the memory."""
        return "reduced", self.max_side, index

    def __getitem__(self, position: tuple[int, int]) -> _Read:
        epoch, wanted = position
        label, lost = int(self.dataset.labels[wanted]), []
        for index in itertools.chain([wanted], self._others(epoch, wanted)):
            try:
                image = self.memory.get(self.key(index)) or self._decoded(index)
            except LostImageError as problem:
                lost.append((index, problem.reason))
                continue
            if self.keeps:
                self._keep(index, image)
            views = [self._view(image, epoch, index, view) for view in range(self.num_views)]
            return _Read(index, label, views, lost)
        return _Read(wanted, label, [], lost)

    def read_ahead(self) -> None:
        """Fill the memory, as far as there is room, with the images that are trained on."""
        missing = [index for index in np.unique(self.pool).tolist() if self.key(index) not in self.memory]
        with reading_threads() as threads, console.progress(len(missing), "reading ahead") as progress:
            for start in range(0, len(missing), READ_AHEAD):
                part = missing[start : start + READ_AHEAD]
                kept = [self._keep(*read) for read in zip(part, threads.map(self._decoded_if_there, part))]
                if not all(kept):
                    return
                progress.advance(len(part))

    def _others(self, epoch: int, index: int) -> Iterator[int]:
        """Yield the images of the pool that may stand in for one that is lost; nothing is drawn until then."""
        labels = self.dataset.labels
        like = self.pool[(labels[self.pool] == labels[index]) & (self.pool != index)]
        yield from np.random.default_rng((self.seed, epoch, index)).permutation(like).tolist()

    def _view(self, image: Image.Image, epoch: int, index: int, view: int) -> Tensor:
        key = f"{self.seed}:{epoch}:{index}" + (f":{view}" if view else "")
        with torch.random.fork_rng(devices=[]):
            # The CPU's alone: reading must not reseed what an accelerator draws in training.
            torch.default_generator.manual_seed(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()))
            return self.transform(image)

    def _decoded(self, index: int) -> Image.Image:
        """Return an image, reduced to what crops can use: the same one, whether images are kept or not."""
        image = self.dataset.read_image(index)
        if min(image.size) <= self.max_side:
            return image
        factor = self.max_side / min(image.size)
        size = tuple(max(1, round(side * factor)) for side in image.size)
        return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)

    def _decoded_if_there(self, index: int) -> Image.Image | None:
        try:
            return self._decoded(index)
        except LostImageError:  # whoever comes for it will find that, and say so
            return None

    def _keep(self, index: int, image: Image.Image | None) -> bool:
        # Pillow has four bytes for a pixel of three.
        return image is None or self.memory.keep(self.key(index), image, 4 * image.width * image.height)


def _load(
    reader: _EvalReader | _TrainReader, batches: Iterable[list], num_workers: int, compute: Compute
) -> Iterator[Batch]:
    # The loader draws its workers' base seed from the global generator; a generator of its own leaves that one alone.
    loader = DataLoader(
        reader,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=compute.device == "cuda",
        multiprocessing_context="fork" if num_workers and CAN_FORK else None,
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


def _affordable(num_workers: int, batch_bytes: int) -> int:
    """Return how many processes can hand their batches over; more would wait for ever for room in shared memory."""
    if num_workers == 0 or not SHARED_MEMORY.is_dir():
        return num_workers
    # Each reads two batches ahead, and two more are being handed over or used. Half of the room is left to the other
    # loader: a training's is alive while val is scored.
    affordable = max(0, shutil.disk_usage(SHARED_MEMORY).free // 2 // batch_bytes - 2) // 2
    if affordable < num_workers:
        _say_that_memory_is_short()
    return min(num_workers, affordable)


@functools.cache
def _say_that_memory_is_short() -> None:
    """Say it once."""
    console.warn(
        f"fewer processes read images than num_workers says: {SHARED_MEMORY} has no room for the batches of more"
        " (docker run --shm-size=2g gives it some)"
    )


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
