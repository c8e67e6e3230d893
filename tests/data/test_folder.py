"""Class folders, as people have them."""

from __future__ import annotations

import itertools
import os

import pytest

from tes.config import DataConfig
from tes.data import load, open_source
from tes.data.folder import FolderSource
from tes.errors import DataError


def put(folder):
    """Put an image (nobody looks into it here) into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "1.png").touch()


def listed(source):
    return [(sample.path, sample.label, sample.split) for sample in source.samples]


def test_each_folder_is_a_class_and_its_images_are_listed_by_path(photos):
    source = FolderSource(photos(dog=1, cat=2))
    assert listed(source) == [("cat/000.jpg", "cat", None), ("cat/001.jpg", "cat", None), ("dog/000.jpg", "dog", None)]
    assert source.name == "photos"
    assert source.notes == []


def test_an_image_is_read_as_the_bytes_of_its_file(photos):
    root = photos(cat=1, dog=1)
    source = FolderSource(root)
    assert source.read(source.samples[0]) == (root / "cat/000.jpg").read_bytes()
    assert source.locate(source.samples[0]) == root / "cat/000.jpg"


@pytest.mark.parametrize("word", ["val", "validation", "valid", "Valid", "VAL"])
def test_folders_that_are_all_splits_give_each_image_its_split(photos, word):
    source = FolderSource(photos(**{"train/cat": 1, f"{word}/cat": 1, "test/cat": 1}))
    assert {sample.path: sample.split for sample in source.samples} == {
        "train/cat/000.jpg": "train",
        f"{word}/cat/000.jpg": "val",
        "test/cat/000.jpg": "test",
    }
    assert {sample.label for sample in source.samples} == {"cat"}


def test_one_folder_that_is_no_split_makes_all_of_them_classes_and_says_so_beside_train_and_test(photos):
    source = FolderSource(photos(train=1, test=1, bus=1))
    assert [sample.label for sample in source.samples] == ["bus", "test", "train"]
    assert {sample.split for sample in source.samples} == {None}
    assert any("`train` too" in note and "bus" in note for note in source.notes)


def test_a_class_called_train_among_vehicles_needs_no_note(photos):
    assert FolderSource(photos(train=1, bus=1)).notes == []


def test_two_folders_for_the_same_split_are_refused(photos):
    with pytest.raises(DataError, match=r"2 folders for the val split, val, validation"):
        FolderSource(photos(**{"train/cat": 1, "val/cat": 1, "validation/cat": 1}))


def test_split_folders_without_train_are_refused(photos):
    with pytest.raises(DataError, match=r"the split folders test, val but no `train`"):
        FolderSource(photos(**{"val/cat": 1, "test/cat": 1}))


def test_a_split_folder_without_class_folders_is_refused(photos, photo):
    root = photos(**{"train/cat": 1})
    photo(root / "test/000.jpg")
    with pytest.raises(DataError, match=r"test` holds 1 image but no class folders"):
        FolderSource(root)


def test_folders_inside_a_class_folder_belong_to_the_class(photos):
    source = FolderSource(photos(**{"cat/2020/may": 1, "cat": 1, "dog": 1}))
    assert ("cat/2020/may/000.jpg", "cat", None) in listed(source)
    assert [sample.label for sample in source.samples] == ["cat", "cat", "dog"]


def test_links_to_folders_and_files_are_followed(photos, photo, tmp_path):
    root = photos(cat=1)
    photo(tmp_path / "elsewhere/dogs/rex.jpg")
    (root / "dog").symlink_to(tmp_path / "elsewhere/dogs")
    (root / "cat/more").symlink_to(tmp_path / "elsewhere")
    (root / "cat/link.jpg").symlink_to(tmp_path / "elsewhere/dogs/rex.jpg")
    assert [path for path, _, _ in listed(FolderSource(root))] == [
        "cat/000.jpg",
        "cat/link.jpg",
        "cat/more/dogs/rex.jpg",
        "dog/rex.jpg",
    ]


@pytest.mark.parametrize("target", [".", "cat", ".."], ids=["the data", "the class", "what holds the data"])
def test_a_link_that_leads_back_from_within_a_class_is_not_followed(photos, target):
    root = photos(cat=1, dog=1)
    (root / "cat/loop").symlink_to((root / target).resolve())
    source = FolderSource(root)
    assert [path for path, _, _ in listed(source)] == ["cat/000.jpg", "dog/000.jpg"]
    assert source.notes == ["Did not follow 1 link to a folder that is read already."]


@pytest.mark.parametrize("target", [".", ".."], ids=["the data", "what holds the data"])
def test_a_link_that_leads_back_is_no_class(photos, target):
    root = photos(cat=1, dog=1)
    (root / "loop").symlink_to((root / target).resolve())
    source = FolderSource(root)
    assert [label for _, label, _ in listed(source)] == ["cat", "dog"]
    assert source.notes == ["Did not follow 1 link to a folder that is read already."]


def test_a_link_in_a_split_folder_that_leads_back_to_it_is_no_class(photos):
    root = photos(**{"train/cat": 1, "train/dog": 1, "test/cat": 1})
    (root / "train/loop").symlink_to(root / "train")
    (root / "loop").symlink_to(root)
    assert [(label, split) for _, label, split in listed(FolderSource(root))] == [
        ("cat", "test"),
        ("cat", "train"),
        ("dog", "train"),
    ]


def test_links_in_a_circle_end(photos):
    root = photos(**{"cat/a": 1, "cat/b": 1, "dog": 1})
    (root / "cat/a/to_b").symlink_to(root / "cat/b")
    (root / "cat/b/to_a").symlink_to(root / "cat/a")
    images = [path for path, label, _ in listed(FolderSource(root)) if label == "cat"]
    assert len(images) == 2


def test_a_link_to_a_missing_image_is_listed_so_that_it_can_be_reported(photos, tmp_path):
    root = photos(cat=1, dog=1)
    (root / "cat/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert ("cat/gone.jpg", "cat", None) in listed(FolderSource(root))


def test_what_operating_systems_leave_behind_is_ignored_silently(photos, photo):
    root = photos(cat=1, dog=1)
    photo(root / "cat/._000.jpg")
    photo(root / ".cache/000.jpg")
    photo(root / "__MACOSX/000.jpg")
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store"):
        (root / name).write_bytes(b"clutter")
        (root / "cat" / name).write_bytes(b"clutter")
    source = FolderSource(root)
    assert [path for path, _, _ in listed(source)] == ["cat/000.jpg", "dog/000.jpg"]
    assert source.notes == []


def test_other_files_are_ignored_and_counted_by_kind(photos):
    root = photos(cat=1, dog=1)
    for name in ("cat/notes.txt", "dog/more.TXT", "dog/clip.mp4"):
        (root / name).write_text("no image")
    assert FolderSource(root).notes == ["Ignored 3 files other than images (.txt, .mp4)."]


def test_images_outside_the_class_folders_are_ignored_and_counted(photos, photo):
    root = photos(cat=1, dog=1)
    photo(root / "cover.jpg")
    assert FolderSource(root).notes == ["Ignored 1 image outside the class folders (cover.jpg)."]


def test_the_suffix_may_be_in_capitals(photos, photo):
    root = photos(cat=1, dog=1)
    photo(root / "cat/IMG_1.JPG")
    assert ("cat/IMG_1.JPG", "cat", None) in listed(FolderSource(root))


def test_an_empty_class_folder_is_refused(photos):
    root = photos(cat=1)
    (root / "dog").mkdir()
    with pytest.raises(DataError, match=r"class folder `.*dog` holds no image; add some, or remove the folder"):
        FolderSource(root)


def test_a_class_folder_with_other_files_alone_says_what_they_are(photos):
    root = photos(cat=1)
    (root / "dog").mkdir()
    (root / "dog/clip.mp4").write_text("no image")
    with pytest.raises(DataError, match=r"dog` holds no image \(1 other file: .mp4\)"):
        FolderSource(root)


def test_a_folder_of_images_without_classes_is_refused(tmp_path, photo):
    photo(tmp_path / "photos/a.jpg")
    with pytest.raises(DataError, match=r"holds 1 image but no class folders; put the images of each class"):
        FolderSource(tmp_path / "photos")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="has no class folders"):
        FolderSource(tmp_path)


def test_a_missing_folder_is_refused_with_the_nearest_name_that_exists(photos, tmp_path):
    photos(cat=1)
    with pytest.raises(DataError, match=r"There is no folder `.*/photo`\. Did you mean `photos`\?"):
        open_source(str(tmp_path / "photo"))


def test_a_missing_folder_in_a_missing_folder_names_both(tmp_path):
    with pytest.raises(DataError, match=r"no folder `.*/nowhere/photos`, and no folder `.*/nowhere`"):
        open_source(str(tmp_path / "nowhere/photos"))


def test_a_name_that_is_not_utf8_is_listed_with_a_mark_in_its_place(photos):
    root = photos(cat=1, dog=1)
    (root / "cat/000.jpg").rename(root / "cat" / b"caf\xe9.jpg".decode(errors="surrogateescape"))
    assert FolderSource(root).samples[0].path == "cat/caf\ufffd.jpg"


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("", "name is empty"),
        ("foldr:photos", r"names no known data source\. Did you mean `folder`\? Known: csv, folder"),
        ("https://example.com/photos", "is a web address; download the images first"),
    ],
)
def test_what_cannot_be_a_data_source_is_refused_in_one_sentence(ref, message):
    with pytest.raises(DataError, match=message):
        open_source(ref)


def test_an_archive_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "photos.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="neither a folder nor a CSV or TSV file; unpack an archive first"):
        open_source(str(tmp_path / "photos.zip"))


def test_a_kind_of_source_can_be_named_before_a_colon(photos):
    source = open_source(f"folder:{photos(**{'cat': 1, 'dog': 1})}")
    assert isinstance(source, FolderSource)
    assert len(source.samples) == 2


def test_links_to_common_folders_do_not_multiply(photos):
    # Each of twelve folders links twice to the next: followed every time, the last image would be found 4,096 times.
    root = photos(cat=1, dog=1)
    folders = [root / "cat" / f"{number:02}" for number in range(13)]
    for folder in folders:
        folder.mkdir()
    for folder, below in itertools.pairwise(folders):
        (folder / "once").symlink_to(below)
        (folder / "again").symlink_to(below)
    (folders[-1] / "deep.jpg").symlink_to(root / "dog/000.jpg")
    assert len([sample for sample in FolderSource(root).samples if sample.label == "cat"]) == 2


def test_a_pipe_is_not_read(photos):
    root = photos(cat=1, dog=1)
    os.mkfifo(root / "cat/pipe.jpg")
    assert [path for path, _, _ in listed(FolderSource(root))] == ["cat/000.jpg", "dog/000.jpg"]


def test_the_name_is_fit_for_a_run_folder(photos):
    assert FolderSource(photos("my photos, 2024 (new)", cat=1, dog=1)).name == "my-photos-2024-new"


@pytest.mark.parametrize("names", [("Training", "Testing"), ("train", "Testing"), ("train_set", "val_set", "test_set")])
def test_splits_by_another_name_are_not_taken_for_classes(tmp_path, names):
    for name in names:
        for label in ("glioma", "meningioma"):
            put(tmp_path / name / label)
    with pytest.raises(
        DataError, match=r"look like splits, not like classes: each holds glioma, meningioma; call them"
    ):
        FolderSource(tmp_path)


def test_classes_that_are_called_like_splits_are_classes_where_their_folders_differ(tmp_path):
    for name in ("train_set", "test_set"):  # of a model railway and a laboratory
        put(tmp_path / name)
    assert {sample.label for sample in FolderSource(tmp_path).samples} == {"train_set", "test_set"}


def test_images_that_all_lie_deeper_are_said_to(tmp_path):
    for path in ("Rosaceae/rosa", "Rosaceae/rubus", "Poaceae/poa"):
        put(tmp_path / path)
    source = FolderSource(tmp_path)
    assert {sample.label for sample in source.samples} == {"Rosaceae", "Poaceae"}
    assert any("a folder deeper than its class, as `Poaceae/poa/1.png` of `Poaceae`" in note for note in source.notes)
    put(tmp_path / "Poaceae")
    assert not any("deeper" in note for note in FolderSource(tmp_path).notes)


def test_a_folder_around_the_class_folders_is_named(tmp_path):
    for label in ("a", "b"):
        put(tmp_path / "archive" / label)
    with pytest.raises(DataError, match=r"only `archive`\. If the classes are in it, name `.*archive`"):
        load(DataConfig(source=str(tmp_path)))
    assert {sample.label for sample in FolderSource(tmp_path).samples} == {
        "archive"
    }  # to score one class is no mistake
