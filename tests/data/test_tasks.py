"""The tasks' entries and loaders, against the official lists where they are at hand, and on miniatures everywhere."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from miniatures import CLASSES, PER_CLASS, as_food_json, build
from tes import data
from tes.config import DataConfig
from tes.data.images import decode
from tes.data.layouts import READERS
from tes.data.names import is_uninformative
from tes.data.source import Sample
from tes.data.task import Task, load_task, split_checksum, task_names
from tes.data.task_source import TaskSource, open_task
from tes.errors import DataError
from tes.text import prompts

PAPER = {  # METHOD.md, section 5: classes, metric, train / val / test
    "aircraft": (100, "mean_per_class", 3334, 3333, 3333),
    "caltech101": (101, "mean_per_class", 3030, None, 5647),
    "cars": (196, "top1", 8144, None, 8041),
    "cifar10": (10, "top1", 50000, None, 10000),
    "cifar100": (100, "top1", 50000, None, 10000),
    "cub200": (200, "top1", 5994, None, 5794),
    "dtd": (47, "top1", 1880, 1880, 1880),
    "flowers102": (102, "mean_per_class", 1020, 1020, 6149),
    "food101": (101, "top1", 75750, None, 25250),
    "pets": (37, "mean_per_class", 3680, None, 3669),
    "sun397": (397, "top1", 19850, None, 19850),
}
ENSEMBLES = {"cifar10": 18, "cifar100": 18, "caltech101": 34, "dtd": 8, "cars": 8, "aircraft": 2, "sun397": 2}
LISTED = ("aircraft", "cars", "cub200", "flowers102", "food101", "pets", "sun397")


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


# What is known of the tasks


def test_the_tasks_are_the_paper_s():
    assert task_names() == tuple(PAPER)
    for name, (num_classes, metric, train, val, test) in PAPER.items():
        task = load_task(name)
        splits = {"train": train, "val": val, "test": test}
        assert (task.num_classes, task.metric) == (num_classes, metric)
        assert task.splits == {split: number for split, number in splits.items() if number}
        assert len(task.templates.ensemble) == ENSEMBLES.get(name, 1)


@pytest.mark.parametrize("name", PAPER)
def test_every_class_has_a_readable_name_of_its_own(name):
    task = load_task(name)
    names = list(task.classes.values())
    assert len(set(names)) == len(names)
    assert not any(is_uninformative(readable) or "_" in readable or readable != readable.strip() for readable in names)
    assert task.also.keys() <= task.classes.keys()
    assert all(template.count("{}") == 1 for template in (task.templates.single, *task.templates.ensemble))


def test_names_that_need_cleaning():
    read = {name: load_task(name).classes for name in PAPER}
    assert read["cub200"]["023.Brandt_Cormorant"] == "Brandt's cormorant"
    assert read["cub200"]["001.Black_footed_Albatross"] == "black-footed albatross"
    assert read["cars"]["Ram C/V Cargo Van Minivan 2012"] == "2012 Ram C/V Cargo Van Minivan"
    assert read["sun397"]["apartment_building/outdoor"] == "outdoor apartment building"
    assert read["aircraft"]["F-16A/B"] == "F-16A/B"
    assert read["caltech101"]["Faces"] != read["caltech101"]["Faces_easy"]


@pytest.mark.parametrize("name", PAPER)
def test_an_entry_says_what_its_split_is_held_against(name):
    task = load_task(name)
    assert bool(task.checksum) == (name not in ("cifar10", "cifar100", "dtd"))
    assert bool(task.md5) == (name in ("cifar10", "cifar100"))
    assert bool(task.unverified) == (name == "dtd")


@pytest.mark.slow
def test_cifar_s_files_are_those_that_torchvision_knows():
    from torchvision.datasets import CIFAR10, CIFAR100

    for name, known in (("cifar10", CIFAR10), ("cifar100", CIFAR100)):
        assert [list(pair) for pair in load_task(name).md5.items()] == known.train_list + known.test_list


# Against the official lists


def official(name: str, shared: Path) -> tuple[list[str], dict[str, tuple[str, str]]]:
    """Return the classes in order, and image -> (class, split), by other means than the loaders'."""
    lists = shared / "lists"
    if name == "aircraft":
        rows = {
            f"images/{line[:7]}.jpg": (line[8:], split)
            for split in ("train", "val", "test")
            for line in (lists / f"aircraft/images_variant_{split}.txt").read_text().splitlines()
        }
        return (lists / "aircraft/variants.txt").read_text().splitlines(), rows
    if name == "cub200":
        table = [np.loadtxt(lists / f"cub200/{stem}.txt", dtype=str) for stem in ("images", "train_test_split")]
        rows = {
            f"images/{path}": (path.split("/")[0], {"1": "train", "0": "test"}[flag])
            for path, flag in zip(table[0][:, 1], table[1][:, 1])
        }
        return np.loadtxt(lists / "cub200/classes.txt", dtype=str)[:, 1].tolist(), rows
    if name == "food101":
        rows = {
            f"images/{line}.jpg": (line.split("/")[0], split)
            for split in ("train", "test")
            for line in (lists / f"food101/{split}.txt").read_text().split()
        }
        return (lists / "food101/classes.txt").read_text().split(), rows
    if name == "pets":
        parts = {
            "train": np.loadtxt(lists / "pets/trainval.txt", str),
            "test": np.loadtxt(lists / "pets/test.txt", str),
        }
        rows = {
            f"images/{row[0]}.jpg": (row[0][: row[0].rindex("_")], split)
            for split, table in parts.items()
            for row in table
        }
        numbers = {int(row[1]): row[0][: row[0].rindex("_")] for row in parts["train"]}
        return [numbers[number] for number in sorted(numbers)], rows
    if name == "sun397":
        rows = {
            line[1:]: ("/".join(line.split("/")[2:-1]), split)
            for split, stem in (("train", "Training"), ("test", "Testing"))
            for line in (lists / f"sun397/{stem}_01.txt").read_text().split()
        }
        return [line[3:] for line in (lists / "sun397/ClassName.txt").read_text().split()], rows
    if name == "cars":
        classes, rows = (lists / "cars/class_names.txt").read_text().splitlines(), {}
        for split, stem in (("train", "train_annos"), ("test", "test_annos_withlabels")):
            content = scipy.io.loadmat(lists / f"cars/cars_{stem}.mat", simplify_cells=True)
            for row in content["annotations"]:
                rows[f"cars_{split}/{row['fname']}"] = (classes[row["class"] - 1], split)
        return classes, rows
    assert name == "flowers102"
    folder = shared / "data/flowers-102"
    by_number = json.loads((folder / "cat_to_name.json").read_text())
    classes = [by_number[str(number)] for number in range(1, 103)]
    labels = scipy.io.loadmat(folder / "imagelabels.mat")["labels"][0]
    sets = scipy.io.loadmat(folder / "setid.mat")
    rows = {
        f"jpg/image_{number:05d}.jpg": (classes[labels[number - 1] - 1], split)
        for split, key in (("train", "trnid"), ("val", "valid"), ("test", "tstid"))
        for number in sets[key][0]
    }
    return classes, rows


@pytest.fixture
def lists(shared: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Return `lists(task)`: a folder with copies of the official lists where the layout has them."""

    def copy(name: str) -> Path:
        source = shared / "data/flowers-102" if name == "flowers102" else shared / "lists" / name
        below = tmp_path / {"food101": "meta", "pets": "annotations"}.get(name, "")
        below.mkdir(exist_ok=True)
        for file in source.iterdir():
            if file.suffix in (".txt", ".mat"):
                (below / file.name).write_bytes(file.read_bytes())
        return tmp_path

    return copy


def read(name: str, folder: Path) -> list[Sample]:
    task = load_task(name)
    return READERS[task.sources[0].layout](folder, task).samples


@pytest.mark.parametrize("name", LISTED)
def test_classes_and_splits_are_those_of_the_official_lists_element_by_element(name, shared, lists):
    classes, rows = official(name, shared)
    task, samples = load_task(name), read(name, lists(name))
    assert list(task.classes) == classes
    assert len(samples) == len(rows)
    assert {sample.path: (sample.label, sample.split) for sample in samples} == rows
    content = "".join(sorted(f"{path}\t{label}\t{split}\n" for path, (label, split) in rows.items()))
    assert task.checksum == hashlib.sha256(content.encode()).hexdigest()
    assert {classes[number - 1]: label for number, label in CLASSES[name].items()} == {
        label: label for label in CLASSES[name].values()
    }


def test_cifar_s_and_dtd_s_classes_are_in_the_official_order(shared):
    lists = shared / "lists"
    assert list(load_task("cifar10").classes) == json.loads((lists / "cifar/cifar10_names.json").read_text())["names"]
    assert list(load_task("cifar100").classes) == json.loads((lists / "cifar/cifar100_names.json").read_text())["fine"]
    assert list(load_task("dtd").classes) == (lists / "dtd/class_names.txt").read_text().split()


def test_caltech_has_thirty_a_class_for_training_by_a_rule_over_file_names(tmp_path, shared):
    task, samples = load_task("caltech101"), read("caltech101", tmp_path)
    assert split_checksum(samples) == task.checksum
    assert list(task.classes) == sorted(folder.name for folder in (shared / "data/caltech101").iterdir())
    of_class = sorted(
        (f"accordion/image_{number:04d}.jpg" for number in range(1, 56)),
        key=lambda path: int.from_bytes(hashlib.sha256(path.encode()).digest(), "big"),
    )
    assert {s.path for s in samples if s.label == "accordion" and s.split == "train"} == set(of_class[:30])
    assert set(Counter(s.label for s in samples if s.split == "train").values()) == {30}
    there = {f"{file.parent.name}/{file.name}" for file in (shared / "data/caltech101").glob("*/*.jpg")}
    assert there <= {sample.path for sample in samples}
    source = open_task("caltech101", str(shared / "data"), partial=True)
    assert source.coverage == (5975, 8677)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("pets", "annotations/test.txt"),
        ("aircraft", "images_variant_val.txt"),
        ("cub200", "train_test_split.txt"),
        ("sun397", "Testing_01.txt"),
    ],
)
def test_the_order_of_a_list_and_its_line_ends_do_not_matter(name, change, lists):
    folder = lists(name)
    lines = (folder / change).read_text().splitlines()
    (folder / change).write_bytes("\r\n".join(reversed(lines)).encode())
    assert split_checksum(read(name, folder)) == load_task(name).checksum


def swap_labels_in_aircraft(folder: Path) -> None:
    path = folder / "images_variant_train.txt"
    lines = path.read_text().splitlines()
    lines[0], lines[-1] = lines[0][:7] + lines[-1][7:], lines[-1][:7] + lines[0][7:]
    path.write_text("\n".join(lines))


def swap_labels_in_cub(folder: Path) -> None:
    path = folder / "image_class_labels.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(["1 200", *lines[1:-1], "11788 1"]))


def swap_labels_in_pets(folder: Path) -> None:
    path = folder / "annotations/trainval.txt"
    lines = path.read_text().splitlines()
    lines[0], lines[-1] = "Abyssinian_100 37 1 1", lines[-1].replace(" 37 ", " 1 ")
    path.write_text("\n".join(lines))


def swap_labels_in_flowers(folder: Path) -> None:
    labels = scipy.io.loadmat(folder / "imagelabels.mat")["labels"]
    labels[0, [0, -1]] = labels[0, [-1, 0]]
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": labels})


def swap_labels_in_cars(folder: Path) -> None:
    path = folder / "cars_test_annos_withlabels.mat"
    annotations = scipy.io.loadmat(path)["annotations"]
    annotations["class"][0, [0, -1]] = annotations["class"][0, [-1, 0]]
    scipy.io.savemat(path, {"annotations": annotations})


def move_an_image(first: str, second: str) -> Callable[[Path], None]:
    def move(folder: Path) -> None:
        lines = [(folder / name).read_text().splitlines() for name in (first, second)]
        lines[0][0], lines[1][0] = lines[1][0], lines[0][0]  # an exchange: the counts stay right
        for name, changed in zip((first, second), lines):
            (folder / name).write_text("\n".join(changed))

    return move


def move_a_flower(folder: Path) -> None:
    sets = {key: value for key, value in scipy.io.loadmat(folder / "setid.mat").items() if not key.startswith("_")}
    sets["trnid"][0, 0], sets["tstid"][0, 0] = sets["tstid"][0, 0], sets["trnid"][0, 0]
    scipy.io.savemat(folder / "setid.mat", sets)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("aircraft", swap_labels_in_aircraft, "their checksum differs"),
        ("cub200", swap_labels_in_cub, "where it does not lie"),
        ("pets", swap_labels_in_pets, "which it is not named after"),
        ("flowers102", swap_labels_in_flowers, "their checksum differs"),
        slow("cars", swap_labels_in_cars, "their checksum differs"),
        slow("food101", move_an_image("meta/train.txt", "meta/test.txt"), "their checksum differs"),
        slow("sun397", move_an_image("Training_01.txt", "Testing_01.txt"), "their checksum differs"),
        ("pets", move_an_image("annotations/trainval.txt", "annotations/test.txt"), "their checksum differs"),
        ("flowers102", move_a_flower, "their checksum differs"),
    ],
)
def test_swapped_labels_and_moved_images_are_refused(name, change, sentence, lists):
    folder = lists(name)
    change(folder)
    for partial in (False, True):  # the lists are whole, whatever is there of the images
        message = refusal(lambda partial=partial: open_task(name, str(folder), partial))
        assert sentence in message and load_task(name).home in message


def test_a_list_cannot_name_an_image_outside_its_folder(tmp_path):
    build("food101", tmp_path)
    (tmp_path / "secret.jpg").write_bytes(b"")
    listed = next(tmp_path.rglob("meta/train.txt"))
    listed.write_text("apple_pie/../../../secret\n" + listed.read_text())
    assert "name images outside it" in refusal(lambda: open_task("food101", str(tmp_path), partial=True))


def test_the_variant_of_flowers_with_6552_images_is_refused_by_its_counts(lists):
    folder = lists("flowers102")
    rest = np.arange(6553, 8190)
    sets = {"trnid": np.arange(1, 6553), "valid": rest[:818], "tstid": rest[818:]}
    scipy.io.savemat(folder / "setid.mat", sets)
    message = refusal(lambda: open_task("flowers102", str(folder)))
    assert (
        "6552 train images instead of 1020, 818 val images instead of 1020, 819 test images instead of 6149" in message
    )
    assert "6552 train images instead of 1020;" in refusal(lambda: open_task("flowers102", str(folder), partial=True))


def test_a_download_that_is_not_complete_is_refused_with_what_is_missing(lists):
    folder = lists("flowers102")
    assert "of `flowers102`, 8189 are not in" in refusal(lambda: open_task("flowers102", str(folder)))
    assert "No image of `flowers102`" in refusal(lambda: open_task("flowers102", str(folder), partial=True))


# On miniatures


@pytest.mark.parametrize("name", PAPER)
def test_a_miniature_opens_with_the_right_classes_splits_and_prompts(name, miniature):
    task = load_task(name)
    dataset = data.open_dataset(DataConfig(source=name, root=str(miniature(name)), partial=True))
    assert [info.label for info in dataset.classes] == list(CLASSES[name].values())
    assert {list(task.classes)[number - 1] for number in CLASSES[name]} == set(CLASSES[name].values())
    assert dataset.metric == PAPER[name][1]
    official = dataset.source.official
    assert official["classes"] == (3, PAPER[name][0])
    if name != "caltech101":
        batches = 5 if name == "cifar10" else 1
        for split, number in task.splits.items():
            found = 3 * PER_CLASS[split] * (batches if split == "train" else 1)
            assert official[split] == (found, number)
    found, number = dataset.coverage
    assert (found, number) == (len(dataset.paths), sum(task.splits.values()))
    assert dataset.name == f"{name} ({found} / {number} images)"
    assert any(note.startswith("Found / official: 3 / ") for note in dataset.notes)
    assert dataset.unreadable == []
    assert dataset.read_image(0).size == ((32, 32) if name.startswith("cifar") else (20, 16))
    assert set(dataset.splits.tolist()) >= {"train", "test"}
    assert prompts.class_prompts(dataset.classes[0], dataset.templates) == [
        task.templates.single.replace("{}", task.classes[dataset.classes[0].label])
    ]


@pytest.mark.parametrize("name", PAPER)
def test_a_miniature_is_refused_where_the_whole_is_wanted(name, miniature):
    message = refusal(lambda: open_task(name, str(miniature(name))))
    assert "--partial" in message and load_task(name).home in message


def as_if_whole(name: str, root: Path) -> tuple[Task, Path]:
    """Return a task whose official lists are the miniature's, and its folder."""
    task = load_task(name)
    folder = task.sources[0].find(root)
    samples = READERS[task.sources[0].layout](folder, task).samples
    counts = Counter(sample.split for sample in samples)
    return task.model_copy(update={"splits": dict(counts), "checksum": split_checksum(samples)}), folder


@pytest.mark.parametrize("name", ["aircraft", "cars", "cub200", "flowers102", "food101", "pets", "sun397"])
def test_what_is_whole_is_accepted_without_a_mark(name, miniature):
    task, folder = as_if_whole(name, miniature(name))
    source = TaskSource(task, task.sources[0], folder, partial=False)
    assert source.coverage is None and list(source.notes) == []
    assert source.name == name and list(source.class_names) == list(CLASSES[name].values())


def test_a_part_of_the_images_of_whole_lists_is_accepted_as_a_part(tmp_path):
    task, folder = as_if_whole("pets", build("pets", tmp_path))
    gone = folder / "images" / "Abyssinian_1.jpg"
    gone.unlink()
    message = refusal(lambda: TaskSource(task, task.sources[0], folder, partial=False))
    assert "Of the 9 images of `pets`, 1 are not in" in message and "images/Abyssinian_1.jpg" in message
    source = TaskSource(task, task.sources[0], folder, partial=True)
    assert source.coverage == (8, 9)
    assert source.notes == ["Found / official: 3 / 37 classes, 5 / 6 train, 3 / 3 test."]


def test_a_class_left_without_a_training_image_is_left_out_and_named(tmp_path):
    root = build("pets", tmp_path)
    for number in (1, 2):
        (root / f"oxford-iiit-pet/images/Abyssinian_{number}.jpg").unlink()
    dataset = data.open_dataset(DataConfig(source="pets", root=str(root), partial=True))
    assert "Left out the class `Abyssinian`, of which no training image is here." in dataset.notes
    assert [info.label for info in dataset.classes] == ["american_bulldog", "yorkshire_terrier"]
    everything = data.load_labelled("pets", [*dataset.classes, data.ClassInfo("x", "abyssinian")], str(root), True)
    assert len(everything.paths) == 7  # to be scored on, no class needs a training image


def test_images_that_the_official_list_lacks_are_refused_in_caltech(tmp_path):
    root = build("caltech101", tmp_path)
    folder = root / "caltech101/101_ObjectCategories"
    (folder / "accordion/image_0001.jpg").rename(folder / "accordion/mine.jpg")
    message = refusal(lambda: open_task("caltech101", str(root), partial=True))
    assert "1 images that are not of the official `caltech101`: accordion/mine.jpg" in message


def test_food_s_lists_may_be_json_and_sun_s_lie_beside_the_images(tmp_path):
    root = build("food101", tmp_path / "food")
    before = open_task("food101", str(root), partial=True).samples
    as_food_json(root / "food-101")
    assert open_task("food101", str(root), partial=True).samples == before
    root = build("sun397", tmp_path / "sun")
    (root / "Partitions").mkdir()
    for name in ("Training_01.txt", "Testing_01.txt"):
        (root / "SUN397" / name).rename(root / "Partitions" / name)
    assert len(open_task("sun397", str(root), partial=True).samples) == 9


@pytest.mark.parametrize(
    ("name", "file", "content", "sentence"),
    [
        ("flowers102", "flowers-102/setid.mat", b"no matlab", "is not a MATLAB file that can be read"),
        ("flowers102", "flowers-102/imagelabels.mat", None, "needs"),
        ("cub200", "CUB_200_2011/image_class_labels.txt", b"1 999\n", "number the same images"),
        (
            "pets",
            "oxford-iiit-pet/annotations/test.txt",
            b"Abyssinian_1 x 1 1\n",
            "`x` is not one of the classes 1 to 37",
        ),
        ("food101", "food-101/meta/test.txt", b"air/1\n", "has classes that it should not have: air"),
        ("food101", "food-101/meta/test.txt", b"\xff\xfe", "cannot be read"),
        ("food101", "food-101/meta/test.txt", b"apple_pie/1\napple_pie/1\n", "have images twice"),
        ("cifar10", "cifar-10-batches-py/test_batch", b"\x80\x04.", "is not a CIFAR batch"),
        ("cifar10", "cifar-10-batches-py/batches.meta", pickle.dumps({"label_names": ["a"]}), "in another order"),
    ],
)
def test_damaged_files_of_a_layout_are_named(name, file, content, sentence, tmp_path):
    root = build(name, tmp_path)
    (root / file).unlink(missing_ok=True)
    if content is not None:
        (root / file).write_bytes(content)
    assert sentence in refusal(lambda: open_task(name, str(root), partial=True))


def test_data_that_are_nowhere_are_said_to_be_got_from_their_home(tmp_path, monkeypatch):
    message = refusal(lambda: open_task("cars", str(tmp_path)))
    assert "ai.stanford.edu" in message and "`stanford_cars` (devkit/cars_train_annos.mat" in message
    monkeypatch.setenv("TES_DATA", str(tmp_path / "elsewhere"))
    assert str(tmp_path / "elsewhere") in refusal(lambda: data.open_source("cars"))


def test_a_task_s_name_is_the_task_unless_it_is_written_as_a_path(photos, tmp_path, monkeypatch, miniature):
    photos("pets", cat=4, dog=4)
    monkeypatch.chdir(tmp_path)
    assert isinstance(data.open_source("pets", str(miniature("pets")), partial=True), TaskSource)
    assert {sample.label for sample in data.open_source("./pets").samples} == {"cat", "dog"}
    assert "Did you mean `flowers102`?" in refusal(lambda: data.open_source("flowers"))


def test_without_a_checksum_classes_are_counted_and_the_lists_called_unverified(tmp_path):
    folder = build("dtd", tmp_path) / "dtd"
    task = load_task("dtd").model_copy(update={"splits": {"train": 6, "val": 3, "test": 3}})
    message = refusal(lambda: TaskSource(task, task.sources[0], folder, partial=False))
    assert "has 3 classes instead of 47" in message
    source = TaskSource(task, task.sources[0], folder, partial=True)
    assert [note for note in source.notes if note.startswith("Its lists are unverified: ")]


def test_the_names_of_stanford_cars_must_be_in_the_official_order(tmp_path):
    root, labels = build("cars", tmp_path), load_task("cars").labels
    for names in (labels, labels[::-1]):
        rows = np.array([names], dtype=object)
        scipy.io.savemat(root / "stanford_cars/devkit/cars_meta.mat", {"class_names": rows})
        if names is labels:
            assert open_task("cars", str(root), partial=True).coverage == (9, 16185)
    assert "in another order" in refusal(lambda: open_task("cars", str(root), partial=True))


# CIFAR's batches


def test_pixels_of_a_batch_come_back_as_they_are(miniature):
    source = open_task("cifar100", str(miniature("cifar100")), partial=True)
    with (miniature("cifar100") / "cifar-100-python/train").open("rb") as file:
        batch = pickle.load(file, encoding="bytes")  # our own file
    for sample, row, label in zip(source.samples, batch[b"data"], batch[b"fine_labels"], strict=False):
        image = np.asarray(decode(source.read(sample)))
        assert (image == row.reshape(3, 32, 32).transpose(1, 2, 0)).all()
        assert sample.label == list(load_task("cifar100").classes)[label]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
def test_batches_of_every_pickle_protocol_are_read(protocol, order, tmp_path, miniature):
    build("cifar100", tmp_path)
    file = tmp_path / "cifar-100-python/train"
    batch = {key.decode(): value for key, value in pickle.loads(file.read_bytes()).items()}
    batch["data"] = np.array(batch["data"], order=order)
    file.write_bytes(pickle.dumps(batch, protocol=protocol))
    opened, before = (open_task("cifar100", str(root), partial=True) for root in (tmp_path, miniature("cifar100")))
    assert opened.samples == before.samples
    assert [opened.read(sample) for sample in opened.samples] == [before.read(sample) for sample in before.samples]


@pytest.mark.parametrize(("name", "label_bytes"), [("cifar10", 1), ("cifar100", 2)])
def test_the_binary_version_holds_the_same_images(name, label_bytes, tmp_path, miniature):
    python = open_task(name, str(miniature(name)), partial=True)
    numbers = {label: number for number, label in enumerate(load_task(name).classes)}
    folder = tmp_path / {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}[name]
    folder.mkdir()
    batches: dict[str, bytes] = {}
    for sample in python.samples:
        pixels = np.asarray(decode(python.read(sample))).transpose(2, 0, 1).tobytes()
        before = bytes([0] * (label_bytes - 1) + [numbers[sample.label]])
        batch = sample.path.partition("/")[0]
        batches[batch] = batches.get(batch, b"") + before + pixels
    for batch, content in batches.items():
        (folder / f"{batch}.bin").write_bytes(content)
    binary = open_task(name, str(tmp_path), partial=True)
    assert binary.samples == python.samples
    assert [binary.read(sample) for sample in binary.samples] == [python.read(sample) for sample in python.samples]
    names = folder / {"cifar10": "batches.meta.txt", "cifar100": "fine_label_names.txt"}[name]
    names.write_text("\n".join(load_task(name).labels) + "\n\n")
    assert open_task(name, str(tmp_path), partial=True).samples == python.samples
    names.write_text("\n".join(reversed(load_task(name).labels)))
    assert "in another order" in refusal(lambda: open_task(name, str(tmp_path), partial=True))
    names.unlink()
    (folder / f"{batch}.bin").write_bytes(content[:-1])
    assert "is not a whole number of images" in refusal(lambda: open_task(name, str(tmp_path), partial=True))


class Harm:
    """What a pickle may ask for when it is loaded."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("batch", ["train", "meta"])
def test_a_pickle_that_would_run_something_is_refused_and_nothing_runs(batch, protocol, tmp_path):
    root, mark = build("cifar100", tmp_path), tmp_path / "ran"
    harm = Harm(os.mkdir, str(mark))
    pickle.loads(pickle.dumps(harm, protocol=protocol))
    assert mark.is_dir()  # so it is a real attack
    mark.rmdir()
    tree = {b"data": harm, b"fine_labels": [0], b"fine_label_names": [harm]}
    (root / "cifar-100-python" / batch).write_bytes(pickle.dumps(tree, protocol=protocol))
    message = refusal(lambda: open_task("cifar100", str(root), partial=True))
    assert "it asks to run" in message and "mkdir" in message
    assert not mark.exists()


@pytest.mark.parametrize("function", [eval, np.load, np.frombuffer, getattr, bytearray])
def test_nothing_but_the_parts_of_an_array_is_built(function, tmp_path):
    root = build("cifar100", tmp_path)
    tree = {b"data": Harm(function, "1"), b"fine_labels": []}
    (root / "cifar-100-python/train").write_bytes(pickle.dumps(tree, protocol=2))
    assert "it asks to run" in refusal(lambda: open_task("cifar100", str(root), partial=True))


def test_files_of_cifar_that_are_whole_must_be_the_official_ones(tmp_path):
    root = build("cifar100", tmp_path)
    task = load_task("cifar100")
    folder = task.sources[0].find(root)
    md5 = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in task.md5}
    small = task.model_copy(update={"splits": {"train": 6, "test": 3}, "md5": md5})
    assert TaskSource(small, task.sources[0], folder, partial=False).notes == []
    batch = pickle.loads((folder / "train").read_bytes())
    batch[b"fine_labels"].reverse()
    (folder / "train").write_bytes(pickle.dumps(batch, protocol=2))
    message = refusal(lambda: TaskSource(small, task.sources[0], folder, partial=False))
    assert "is not the official file (its MD5 differs)" in message
