from __future__ import annotations

import hashlib
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tes.data.splits import carve, draw_fraction, draw_shots, find_units
from tes.errors import DataError


def sha1(content: object) -> str:
    return hashlib.sha1(repr(content).encode()).hexdigest()


@st.composite
def distinct(draw):
    """Labels and contents of images that are all different."""
    counts = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    start = draw(st.integers(0, 10**6))
    labels = [f"class {number}" for number, count in enumerate(counts) for _ in range(count)]
    return labels, [sha1((start, index)) for index in range(len(labels))]


@st.composite
def tangled(draw):
    """Labels, contents and groups with copies, groups that span classes, and classes of one."""
    number = draw(st.integers(1, 60))
    labels = draw(st.lists(st.sampled_from("abcd"), min_size=number, max_size=number))
    contents = draw(st.lists(st.integers(0, 40), min_size=number, max_size=number))
    groups = draw(st.lists(st.one_of(st.none(), st.sampled_from("uvwxyz")), min_size=number, max_size=number))
    return labels, [sha1(content) for content in contents], groups


def none(labels) -> list[None]:
    return [None] * len(labels)


def test_units_are_joined_by_content_and_by_group_and_by_both():
    units = find_units(["A", "B", "A", "C", "D", "E"], [None, "g", "g", None, "h", "h"])
    assert units.tolist() == [0, 0, 0, 3, 4, 4]


@given(distinct())
def test_quotas_are_met_where_all_images_differ(images):
    labels, sha1s = images
    splits = carve(labels, sha1s, none(labels), split_seed=0)
    for label, num_images in Counter(labels).items():
        found = Counter(splits[np.array(labels) == label].tolist())
        num_test = min(max(round(0.25 * num_images + 1e-9), 1), num_images // 2)
        left = num_images - num_test
        num_val = min(max(round(0.1 * left + 1e-9), 1), left // 2)
        assert (found["test"], found["val"], found["train"]) == (num_test, num_val, left - num_val)


@given(tangled(), st.integers(0, 3))
def test_no_unit_is_divided_and_no_class_leaves_train(images, split_seed):
    labels, sha1s, groups = images
    splits = carve(labels, sha1s, groups, split_seed)
    assert set(splits.tolist()) <= {"train", "val", "test"}
    places = defaultdict(set)
    for unit, split in zip(find_units(sha1s, groups).tolist(), splits.tolist()):
        places[unit].add(split)
    assert all(len(found) == 1 for found in places.values())
    for label, num_images in Counter(labels).items():
        found = Counter(splits[np.array(labels) == label].tolist())
        assert found["train"] >= 1
        assert found["test"] <= num_images // 2


@given(tangled(), st.randoms(use_true_random=False))
def test_the_order_of_the_images_does_not_matter(images, random):
    order = list(range(len(images[0])))
    random.shuffle(order)
    shuffled = [[column[index] for index in order] for column in images]
    one = zip(*images, carve(*images, 0).tolist())
    other = zip(*shuffled, carve(*shuffled, 0).tolist())
    assert Counter(one) == Counter(other)


@given(distinct(), st.integers(0, 10**6), st.data())
def test_one_more_photo_moves_at_most_two_others(images, new, data):
    labels, sha1s = images
    label = data.draw(st.sampled_from(sorted(set(labels))))
    before = carve(labels, sha1s, none(labels), 0)
    after = carve([*labels, label], [*sha1s, sha1(("new", new))], none([*labels, label]), 0)[:-1]
    moved = before != after
    assert moved.sum() <= 2
    assert {labels[index] for index in np.flatnonzero(moved)} <= {label}


def test_another_split_seed_gives_another_test():
    labels = ["a"] * 40
    sha1s = [sha1(index) for index in range(40)]
    assert (carve(labels, sha1s, none(labels), 0) != carve(labels, sha1s, none(labels), 1)).any()


def test_a_class_that_only_has_copies_of_another_class_stays_in_train():
    labels = ["big"] * 8 + ["small"] * 2
    sha1s = [sha1(index) for index in range(8)] + [sha1(0), sha1(1)]
    for split_seed in range(20):
        assert "train" in carve(labels, sha1s, none(labels), split_seed)[8:]


def test_only_the_missing_part_is_carved():
    labels, sha1s = ["a"] * 20, [sha1(index) for index in range(20)]
    assert Counter(carve(labels, sha1s, none(labels), 0, test=False).tolist()) == {"train": 18, "val": 2}
    assert Counter(carve(labels, sha1s, none(labels), 0, val=False).tolist()) == {"train": 15, "test": 5}


@given(tangled(), st.integers(1, 6), st.integers(0, 5))
def test_shots_are_exact_nested_and_kept_apart_from_val(images, num_shots, seed):
    labels, sha1s, groups = images
    splits = carve(labels, sha1s, groups, 0)
    pool = Counter(label for label, split in zip(labels, splits.tolist()) if split != "test")
    num_shots = min(num_shots, min(pool.values()) // 2)
    if num_shots == 0:
        return
    drawn = draw_shots(labels, sha1s, groups, splits, num_shots, seed)
    twice = draw_shots(labels, sha1s, groups, splits, 2 * num_shots, seed)
    assert Counter(label for label, split in zip(labels, drawn) if split == "train") == {
        label: num_shots for label in pool
    }
    assert set(np.flatnonzero(drawn == "train")) <= set(np.flatnonzero(twice == "train"))
    assert ((drawn == "test") == (splits == "test")).all()
    units = find_units(sha1s, groups)
    assert not set(units[drawn == "train"]) & set(units[drawn == "val"])
    val = Counter(label for label, split in zip(labels, drawn) if split == "val")
    assert all(number <= min(num_shots, 4) for number in val.values())


def test_shots_come_from_train_and_val_and_val_gets_what_is_left():
    labels, sha1s = ["a"] * 10 + ["b"] * 6, [sha1(index) for index in range(16)]
    splits = np.array(["train"] * 5 + ["val"] * 3 + ["test"] * 2 + ["train"] * 6, dtype="<U6")
    drawn = draw_shots(labels, sha1s, none(labels), splits, 5, seed=0)
    assert Counter(drawn[:10].tolist()) == {"train": 5, "val": 3, "test": 2}
    assert Counter(drawn[10:].tolist()) == {"train": 5, "val": 1}
    assert (drawn[:10] != draw_shots(labels, sha1s, none(labels), splits, 5, seed=1)[:10]).any()


def test_copies_are_drawn_last():
    labels, sha1s = ["a"] * 8, [sha1(0)] * 5 + [sha1(1), sha1(2), sha1(3)]
    splits = np.full(8, "train", dtype="<U6")
    for seed in range(10):
        drawn = draw_shots(labels, sha1s, none(labels), splits, 4, seed)
        assert len({content for content, split in zip(sha1s, drawn) if split == "train"}) == 4


def test_more_shots_than_a_class_has_name_the_class_and_its_count():
    splits = np.array(["train", "train", "train", "test"], dtype="<U6")
    with pytest.raises(DataError, match="but `b` has 1; lower --shots"):
        draw_shots(["a", "a", "b", "b"], list("wxyz"), [None] * 4, splits, 2, seed=0)


def test_zero_shots_leave_the_pool_unused_and_the_test_images_where_they_are():
    splits = np.array(["train", "val", "test", "train"], dtype="<U6")
    drawn = draw_shots(["a", "a", "a", "b"], list("wxyz"), [None] * 4, splits, 0, seed=0)
    assert drawn.tolist() == ["unused", "unused", "test", "unused"]


@given(tangled(), st.sampled_from([0.01, 0.15, 0.5, 1.0]), st.integers(0, 5))
def test_a_fraction_is_taken_class_by_class_from_train_alone(images, fraction, seed):
    labels, sha1s, groups = images
    splits = carve(labels, sha1s, groups, 0)
    drawn = draw_fraction(labels, sha1s, groups, splits, fraction, seed)
    before = Counter(label for label, split in zip(labels, splits.tolist()) if split == "train")
    after = Counter(label for label, split in zip(labels, drawn.tolist()) if split == "train")
    assert after == {label: max(1, int(fraction * number + 0.5)) for label, number in before.items()}
    for split in ("val", "test"):
        assert ((drawn == split) == (splits == split)).all()
    more = draw_fraction(labels, sha1s, groups, splits, 1.0, seed)
    assert set(np.flatnonzero(drawn == "train")) <= set(np.flatnonzero(more == "train"))
