"""Batches: the same one at the same (seed, epoch, step), whatever the workers; every image once in an evaluation."""

from __future__ import annotations

import dataclasses
import itertools
import shutil

import numpy as np
import pytest
import torch

from tes import data
from tes.config import AugmentConfig, DataConfig
from tes.engine import loader
from tes.engine.compute import Compute
from tes.engine.loader import eval_batches, order, steps_per_epoch, train_batches
from tes.engine.memory import ImageMemory
from tes.errors import DataError
from tes.models.image_settings import ImageSettings

IMAGES = ImageSettings(32, 1.0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear")


def compute(num_workers: int = 0) -> Compute:
    return Compute("cpu", "fp32", "contiguous", num_workers)


@pytest.fixture(scope="module")
def dataset(photos):
    return data.load(DataConfig(source=str(photos)))


def reading(dataset, num_workers=0, first_step=0, num_steps=5, seed=0, images=IMAGES, augment=None, **more):
    return train_batches(
        dataset, dataset.indices("train"), images, augment or AugmentConfig(), compute(num_workers),
        batch_size=10, num_steps=num_steps, seed=seed, first_step=first_step, **more,
    )  # fmt: skip


def batches(dataset, num_workers=0, **more):
    return list(reading(dataset, num_workers, **more))


def assert_same(ones, others):
    for one, other in zip(ones, others, strict=True):
        assert torch.equal(one.images_B3HW, other.images_B3HW) and torch.equal(one.indices_B, other.indices_B)


def test_an_epoch_sees_every_image_and_its_last_batch_wraps_round():
    indices = np.arange(100, 125)
    steps = list(order(indices, 10, 6, seed=0))
    assert steps_per_epoch(25, 10) == 3 and all(len(step) == 10 for step in steps)
    first = [index for step in steps[:3] for _, index in step]
    assert set(first) == set(indices) and first[25:] == first[:5]
    assert [{epoch for epoch, _ in step} for step in steps] == [{0}] * 3 + [{1}] * 3
    assert first != [index for step in steps[3:] for _, index in step]


def test_a_batch_is_no_larger_than_the_data():
    assert [len(step) for step in order(np.arange(3), 32, 2, seed=0)] == [3, 3]


def test_the_order_is_a_function_of_seed_and_epoch_and_costs_nothing_ahead():
    indices = np.arange(7)
    assert list(order(indices, 2, 9, seed=1)) == list(order(indices, 2, 20, seed=1))[:9]
    assert list(order(indices, 2, 9, seed=1)) != list(order(indices, 2, 9, seed=2))
    assert len(list(itertools.islice(order(indices, 2, 10**300, seed=0), 3))) == 3


def test_balanced_epochs_show_every_class_as_often_and_its_images_in_turn():
    labels = np.array([0] * 40 + [1] * 9 + [2] * 2)
    indices = np.arange(51)
    steps = list(order(indices, 10, 12, seed=0, labels=labels))
    for epoch in (steps[:6], steps[6:]):
        seen = [index for step in epoch for _, index in step][:51]
        assert sorted(np.bincount(labels[seen])) == [17, 17, 17]
        for label, (fewest, most) in {0: (0, 1), 1: (1, 2), 2: (8, 9)}.items():
            times = [seen.count(index) for index in np.flatnonzero(labels == label)]
            assert fewest <= min(times) and max(times) <= most
    assert steps == list(order(indices, 10, 12, seed=0, labels=labels))
    assert steps[:6] != [[(0, index) for _, index in step] for step in steps[6:]]


@pytest.mark.parametrize("size", [32, 16])
def test_workers_and_a_start_in_the_middle_change_nothing(dataset, size):
    images = dataclasses.replace(IMAGES, size=size)  # the photos are 40 px high: at 16, they are reduced beforehand
    plain = batches(dataset, images=images)
    workers, middle = ({"num_workers": 2}, {"first_step": 2})
    for other in (batches(dataset, images=images, **workers), [*plain[:2], *batches(dataset, images=images, **middle)]):
        assert_same(plain, other)


def test_an_image_is_augmented_anew_in_every_epoch_and_seed(dataset):
    first, second = batches(dataset, num_steps=6)[:3], batches(dataset, num_steps=6)[3:]
    views = [
        {int(index): image for batch in part for index, image in zip(batch.indices_B, batch.images_B3HW)}
        for part in (first, second)
    ]
    assert any(not torch.equal(views[0][index], views[1][index]) for index in views[0])
    assert not torch.equal(batches(dataset)[0].images_B3HW, batches(dataset, seed=1)[0].images_B3HW)


def test_the_global_generator_is_left_alone(dataset):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    batches(dataset)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("policy", ["none", "padded_crop", "resized_crop", "auto"])
def test_every_policy_gives_uint8_images_of_the_size(dataset, policy):
    (batch,) = batches(dataset, num_steps=1, augment=AugmentConfig(policy=policy))
    assert batch.images_B3HW.shape == (10, 3, 32, 32) and batch.images_B3HW.dtype == torch.uint8
    assert torch.equal(batch.labels_B, torch.from_numpy(dataset.labels[batch.indices_B.numpy()]))


def test_an_evaluation_sees_every_image_once_in_order(dataset):
    indices = np.arange(len(dataset.paths))
    seen = torch.cat([batch.indices_B for batch in eval_batches(dataset, indices, IMAGES, compute())])
    assert torch.equal(seen, torch.from_numpy(indices))


def test_a_second_view_is_another_draw_and_leaves_the_first_as_it_is(dataset):
    plain, double = batches(dataset, num_steps=3), batches(dataset, num_steps=3, two_views=True)
    again = batches(dataset, num_steps=3, two_views=True)
    for one, two, same in zip(plain, double, again, strict=True):
        assert one.key_images_B3HW is None and torch.equal(one.images_B3HW, two.images_B3HW)
        assert two.key_images_B3HW.shape == two.images_B3HW.shape
        assert not torch.equal(two.images_B3HW, two.key_images_B3HW)
        assert torch.equal(two.key_images_B3HW, same.key_images_B3HW)


@pytest.mark.parametrize("two_views", [False, True])
def test_micro_batches_are_the_batch_in_order(dataset, two_views):
    (batch,) = batches(dataset, num_steps=1, two_views=two_views)
    parts = list(batch.split(3))
    assert [len(part.labels_B) for part in parts] == [4, 3, 3]
    for name, whole in vars(batch).items():
        pieces = [getattr(part, name) for part in parts]
        assert pieces == [None] * 3 if whole is None else torch.equal(torch.cat(pieces), whole)


@pytest.mark.skipif(not loader.CAN_FORK, reason="processes that are not forked share no memory")
@pytest.mark.parametrize("size", [32, 16])
def test_processes_read_no_image_that_was_read_ahead(losing, size):
    images = dataclasses.replace(IMAGES, size=size)
    expected = batches(losing, images=images)
    ahead = reading(losing, 2, images=images)
    for index in losing.indices("train"):
        take_away(losing, index)
    assert_same(expected, list(ahead))
    assert losing.lost == {}


def test_the_next_training_finds_what_this_one_has_read_in_the_memory(losing):
    memory = ImageMemory()
    expected = batches(losing, memory=memory)
    for index in losing.indices("train"):
        take_away(losing, index)
    assert_same(expected, batches(losing, memory=memory))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_memory_with_room_for_some_changes_nothing(dataset, num_workers):
    size = 40 * 48 * 4
    memory = ImageMemory(room=3 * size + 1)
    expected = batches(dataset)
    assert_same(expected, batches(dataset, num_workers, memory=memory))
    assert memory.room == 1, "three images are in it"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_second_evaluation_reads_no_image(losing, num_workers):
    indices, memory = np.arange(len(losing.paths)), ImageMemory()
    first = list(eval_batches(losing, indices, IMAGES, compute(num_workers), memory))
    for index in indices:
        take_away(losing, index)
    assert_same(first, list(eval_batches(losing, indices, IMAGES, compute(num_workers), memory)))
    assert losing.lost == {}
    other = dataclasses.replace(IMAGES, size=16)
    assert list(eval_batches(losing, indices[:2], other, compute(), memory)) == [], "prepared otherwise, it is another"


def test_an_evaluation_starts_no_process_that_would_have_nothing_to_read(dataset, monkeypatch):
    started = []

    class Spy(loader.DataLoader):
        def __init__(self, *args, num_workers, **more):
            started.append(num_workers)
            super().__init__(*args, num_workers=num_workers, **more)

    monkeypatch.setattr(loader, "DataLoader", Spy)
    for num_images, expected in {0: 0, 16: 0, 17: 2, 36: 2}.items():  # 16 images a batch
        seen = list(eval_batches(dataset, np.arange(num_images), IMAGES, compute(num_workers=2)))
        assert sum(len(batch.labels_B) for batch in seen) == num_images and started.pop() == expected


BATCH_BYTES = 10 * 3 * 32**2


@pytest.mark.parametrize(("batches_free", "expected"), [(1000, 2), (12, 2), (11, 1), (8, 1), (7, 0), (0, 0)])
def test_no_more_processes_read_than_shared_memory_has_room_for(
    dataset, monkeypatch, capsys, tmp_path, batches_free, expected
):
    free = batches_free * BATCH_BYTES
    monkeypatch.setattr(loader, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, free))
    loader._say_that_memory_is_short.cache_clear()
    assert loader._affordable(2, BATCH_BYTES) == loader._affordable(2, BATCH_BYTES) == expected
    assert_same(batches(dataset), batches(dataset, num_workers=2))
    said = "fewer processes read images than num_workers says"
    assert capsys.readouterr().err.count(said) == (1 if expected < 2 else 0)


def test_a_training_makes_room_for_its_images_and_leaves_the_prepared_ones(dataset):
    train, val = dataset.indices("train"), dataset.indices("val")
    size = 40 * 48 * 4
    memory = ImageMemory(room=4 * size + len(val) * 3 * 32**2)
    list(eval_batches(dataset, val, IMAGES, compute(), memory))
    how = {"batch_size": 4, "num_steps": 1, "seed": 0, "memory": memory}
    for indices in (train[:4], train[4:8], train[2:6]):
        list(train_batches(dataset, indices, IMAGES, AugmentConfig(policy="none"), compute(), **how))
        assert memory.room == 0 and all(("reduced", 64, index) in memory for index in indices.tolist())
        assert all(("prepared", IMAGES, index) in memory for index in val.tolist())


@pytest.mark.parametrize("make", ["_EvalReader", "_TrainReader"])
def test_a_process_that_is_not_forked_is_sent_no_images(dataset, make):
    import pickle

    memory = ImageMemory()
    assert memory.keep(("reduced", 64, 0), dataset.read_image(0), 40 * 48 * 4)
    more = (AugmentConfig(), 0, memory, dataset.indices("train")) if make == "_TrainReader" else (memory,)
    how = {"num_views": 1, "keeps": False} if make == "_TrainReader" else {}
    sent = pickle.loads(pickle.dumps(getattr(loader, make)(dataset, IMAGES, *more, **how)))
    assert ("reduced", 64, 0) not in sent.memory and sent.memory.room == 0


@pytest.fixture
def losing(photos, tmp_path):
    """A data set of its own, from which images can be taken away after it was opened."""
    shutil.copytree(photos, tmp_path / "squares")
    return data.load(DataConfig(source=str(tmp_path / "squares"), max_unreadable=2))


def take_away(dataset, index, how="gone"):
    file = dataset.source.root / dataset.paths[index]
    file.unlink() if how == "gone" else file.write_bytes(file.read_bytes()[:90])


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_in_the_place_of_a_lost_image_comes_another_of_its_class_and_all_else_stays(losing, num_workers, capsys):
    whole = batches(losing)
    gone, cut = losing.indices("train")[[0, 5]].tolist()
    take_away(losing, gone)
    take_away(losing, cut, how="cut")
    with_losses = batches(losing, num_workers)
    for before, after in zip(whole, with_losses, strict=True):
        lost = np.isin(before.indices_B, [gone, cut])
        assert not np.isin(after.indices_B, [gone, cut]).any()
        assert np.array_equal(before.indices_B[~lost], after.indices_B[~lost])
        assert torch.equal(before.images_B3HW[~lost], after.images_B3HW[~lost])
        assert torch.equal(before.labels_B, after.labels_B)  # so the classes keep their shares
        assert np.array_equal(losing.labels[after.indices_B], after.labels_B)
    assert losing.lost.keys() == {gone, cut} and losing.lost[gone] == "no such file or directory"
    err = capsys.readouterr().err
    assert err.count("warning: ") == 2 and losing.paths[gone] in err and "cannot be now" in err
    again = batches(losing, num_workers)  # the same losses, the same batches
    assert all(torch.equal(a.images_B3HW, b.images_B3HW) for a, b in zip(with_losses, again, strict=True))


def test_more_losses_than_are_tolerated_stop_the_training(losing):
    for index in losing.indices("train")[[0, 9, 17]]:
        take_away(losing, index)
    with pytest.raises(DataError, match=r"3 of 36 images of `squares` cannot be read, more than the 2 that are tol"):
        batches(losing)


def test_a_class_that_has_lost_all_its_images_stops_the_training(losing):
    reds = [index for index in losing.indices("train") if losing.labels[index] == 2]
    losing = dataclasses.replace(losing, max_unreadable=100)
    for index in reds:
        take_away(losing, index)
    with pytest.raises(DataError, match=r"No training image of the class `red_square` can be read any more: .*no such"):
        batches(losing)


def test_an_evaluation_leaves_a_lost_image_out_and_shifts_no_row(losing):
    test = losing.indices("test")
    take_away(losing, test[1])
    (batch,) = eval_batches(losing, test, IMAGES, compute())
    assert batch.indices_B.tolist() == [test[0], *test[2:]] and losing.present(test).tolist() == [test[0], *test[2:]]
    assert np.array_equal(losing.labels[batch.indices_B], batch.labels_B)
    for index in test[:1]:
        take_away(losing, index)
    assert list(eval_batches(losing, test[:2], IMAGES, compute())) == []


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_data_set_that_has_vanished_is_one_sentence(photos, tmp_path, num_workers):
    gone = shutil.copytree(photos, tmp_path / "gone")
    dataset = data.load(DataConfig(source=str(gone)))
    gone.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError) as said:
        batches(dataset, num_workers)
    assert "cannot be read" in str(said.value) or "can be read any more" in str(said.value)
    assert "no such file or directory" in str(said.value) and "\n" not in str(said.value)


@pytest.mark.parametrize("fit", ["crop", "squash"])
def test_an_image_that_is_not_square_loses_its_ends_or_its_proportions(dataset, fit):
    from PIL import Image

    images = dataclasses.replace(IMAGES, fit=fit)
    index = int(dataset.indices("test")[0])
    (batch,) = eval_batches(dataset, np.array([index]), images, compute())
    photo = dataset.read_image(index)
    assert photo.size == (48, 40)
    squashed = photo.resize((32, 32), Image.Resampling.BILINEAR)
    cropped = photo.resize((38, 32), Image.Resampling.BILINEAR).crop((3, 0, 35, 32))
    expected, other = (squashed, cropped) if fit == "squash" else (cropped, squashed)
    found = batch.images_B3HW[0].permute(1, 2, 0).numpy()
    assert np.array_equal(found, np.asarray(expected)) and not np.array_equal(found, np.asarray(other))
