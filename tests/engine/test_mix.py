"""mixup and cutmix: against the formula, and a function of (seed, step) alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tes import data
from tes.config import AugmentConfig, DataConfig
from tes.engine.compute import Compute
from tes.engine.loader import Batch, train_batches
from tes.engine.mix import mixed
from tes.models.image_settings import ImageSettings

B, C, SIZE = 6, 9, 24
COMPUTE = Compute("cpu", "fp32", "channels_last", 0)


def raw(num_steps: int = 1) -> list[Batch]:
    """Batches of noise, each image of a class of its own, so that a target tells λ and the other image."""
    draw = torch.Generator().manual_seed(0)
    return [
        Batch(
            torch.arange(B),
            torch.randint(0, 256, (B, 3, SIZE, SIZE), generator=draw, dtype=torch.uint8),
            torch.randperm(C, generator=draw)[:B],
        )
        for _ in range(num_steps)
    ]


def mix(batches, seed=0, first_step=0, **alphas):
    return list(mixed(batches, AugmentConfig(**alphas), C, COMPUTE, seed=seed, first_step=first_step))


def read_off(before: Batch, after: Batch) -> tuple[float, list[int]]:
    """Return λ and each image's partner as the targets have them."""
    target = after.target_BC.double().numpy()
    np.testing.assert_allclose(target.sum(axis=1), 1, atol=1e-6)
    labels = before.labels_B.tolist()
    own = target[np.arange(B), labels]
    assert np.ptp(own) < 1e-6, "one λ a batch"
    partners = []
    for row, label in zip(target, labels):
        (other,) = [c for c in np.flatnonzero(row) if c != label]
        partners.append(labels.index(other))
    assert sorted(partners) == list(range(B)) and all(partner != i for i, partner in enumerate(partners))
    return float(own[0]), partners


@pytest.mark.parametrize("alpha", [0.4, 1, 100])
def test_mixup_is_the_weighted_mean_of_two_images_and_of_their_labels(alpha):
    (before,), (after,) = raw(), mix(raw(), mixup=alpha)
    weight, partners = read_off(before, after)
    x = before.images_B3HW.double().numpy()
    np.testing.assert_allclose(after.images_B3HW.numpy(), weight * x + (1 - weight) * x[partners], atol=1e-3)
    assert torch.equal(after.labels_B, before.labels_B) and before.images_B3HW.dtype == torch.uint8


def test_cutmix_pastes_one_rectangle_whose_area_is_the_labels_share():
    for before, after in zip(raw(8), mix(raw(8), cutmix=1.0)):
        x, got = before.images_B3HW.float().numpy(), after.images_B3HW.numpy()
        if torch.count_nonzero(after.target_BC) == B:  # a rectangle without area
            np.testing.assert_array_equal(got, x)
            continue
        weight, partners = read_off(before, after)
        pasted = (got != x).any(axis=(0, 1))  # noise: two images agree in all channels nowhere that matters
        rows, columns = np.flatnonzero(pasted.any(axis=1)), np.flatnonzero(pasted.any(axis=0))
        box = np.s_[:, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        expected = x.copy()
        expected[box] = x[partners][box]
        np.testing.assert_array_equal(got, expected)
        assert 1 - weight == pytest.approx(len(rows) * len(columns) / SIZE**2, abs=1e-6)


def test_with_both_every_batch_is_mixed_by_one_of_them_at_even_odds():
    steps = mix(raw(1) * 200, mixup=1.0, cutmix=1.0)
    is_mixup = [bool((batch.images_B3HW % 1).any()) for batch in steps]
    assert 70 < sum(is_mixup) < 130


def test_what_is_drawn_is_a_function_of_seed_and_step():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = mix(raw(4), mixup=0.3, cutmix=1.0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    rest = mix(raw(4)[2:], first_step=2, mixup=0.3, cutmix=1.0)
    for one, two in zip(first[2:], rest, strict=True):
        assert torch.equal(one.images_B3HW, two.images_B3HW) and torch.equal(one.target_BC, two.target_BC)
    assert not torch.equal(first[0].target_BC, mix(raw(4), seed=1, mixup=0.3, cutmix=1.0)[0].target_BC)


def test_switched_off_the_batches_are_what_they_were():
    batches = raw()
    assert mixed(batches, AugmentConfig(), C, COMPUTE, seed=0) is batches


def test_workers_change_nothing(photos):
    dataset = data.load(DataConfig(source=str(photos)))
    images = ImageSettings(32, 1.0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear")
    augment = AugmentConfig(mixup=0.3, cutmix=1.0)
    runs = []
    for num_workers in (0, 2):
        compute = Compute("cpu", "fp32", "contiguous", num_workers)
        batches = train_batches(
            dataset, dataset.indices("train"), images, augment, compute, batch_size=10, num_steps=3, seed=0
        )
        runs.append(list(mixed(batches, augment, dataset.num_classes, compute, seed=0)))
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one.images_B3HW, two.images_B3HW) and torch.equal(one.target_BC, two.target_BC)
