from __future__ import annotations

import json
import pickle
import random
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from tes import data
from tes.config import DataConfig
from tes.data.classes_file import derive_classes
from tes.errors import DataError


def load(source, seed: int = 0, **settings) -> data.Dataset:
    return data.load(DataConfig(source=str(source), **settings), seed)


def refusal(source, **settings) -> str:
    with pytest.raises(DataError) as caught:
        load(source, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def split_of(dataset) -> dict[str, str]:
    return dict(zip(dataset.paths, dataset.splits.tolist()))


@pytest.fixture
def split_photos(photos, tmp_path):
    def make(**splits: dict[str, int]):
        for split, counts in splits.items():
            photos(f"data/{split}", **{label: 0 for label in counts})
            for label, count in counts.items():
                made = photos(f"made/{split}-{label}", **{f"{split}_{label}": count}) / f"{split}_{label}"
                made.parent.parent.mkdir(exist_ok=True)
                (tmp_path / "data" / split).mkdir(parents=True, exist_ok=True)
                made.rename(tmp_path / "data" / split / label)
        return tmp_path / "data"

    return make


def test_a_folder_becomes_a_split_data_set(photos):
    dataset = load(photos(sea_horse=8, Dog=12))
    assert [(info.label, info.name) for info in dataset.classes] == [("Dog", "dog"), ("sea_horse", "sea horse")]
    assert dataset.num_classes == 2
    assert dataset.paths == sorted(dataset.paths)
    assert dataset.labels.dtype == np.int64
    assert dataset.labels.tolist() == [0] * 12 + [1] * 8
    assert Counter(dataset.splits.tolist()) == {"train": 13, "val": 2, "test": 5}
    assert sorted(np.concatenate([dataset.indices(split) for split in ("train", "val", "test")])) == list(range(20))
    assert dataset.read_image(0).size == (24, 16)
    assert dataset.untested == []
    assert dataset.notes == ["No splits came with the data: of each class 25 % are test and 10 % of the rest val."]
    assert pickle.loads(pickle.dumps(dataset)).read_image(3).mode == "RGB"


def test_splits_depend_on_content_and_not_on_names_or_order(photos, tmp_path):
    root = photos(cat=9, dog=9)
    first = load(root)
    content = dict(zip(first.sha1s, first.splits.tolist()))
    files = [path.relative_to(root) for path in root.glob("*/*")]
    random.Random(0).shuffle(files)
    for number, file in enumerate(files):
        (root / file).rename(root / file.parent / f"renamed {number}.jpg")
    renamed = load(root)
    assert dict(zip(renamed.sha1s, renamed.splits.tolist())) == content

    rows = [f"{sample.path},{sample.label}" for sample in renamed.source.samples]
    (root / "one.csv").write_text("\n".join(["path,label", *rows]))
    random.Random(1).shuffle(rows)
    (root / "other.csv").write_text("\n".join(["path,label", *rows]))
    assert split_of(load(root / "one.csv")) == split_of(load(root / "other.csv")) == split_of(renamed)


def test_copies_are_never_divided_and_a_table_in_another_order_says_the_same(photos):
    root = photos(cat=6, dog=6)
    for number in range(4):
        shutil.copy(root / "cat" / "000.jpg", root / "cat" / f"copy{number}.jpg")
    shutil.copy(root / "cat" / "001.jpg", root / "dog" / "not a dog.jpg")
    rows = [f"{path.relative_to(root)},{path.parent.name}" for path in root.glob("*/*.jpg")]
    found = []
    for number in range(3):
        random.Random(number).shuffle(rows)
        (root / "photos.csv").write_text("\n".join(["path,label", *rows]))
        found.append(split_of(load(root / "photos.csv", shots=3)))
        whole = split_of(load(root / "photos.csv"))
        assert len({whole[f"cat/{name}.jpg"] for name in ("000", "copy0", "copy1", "copy2", "copy3")}) == 1
        assert whole["cat/001.jpg"] == whole["dog/not a dog.jpg"]
    assert found[0] == found[1] == found[2]


def test_rows_of_a_group_stay_together(photos):
    root = photos(cat=12, dog=12)
    rows = [f"{path.relative_to(root)},{path.parent.name},visit {path.stem[-1]}" for path in root.glob("*/*.jpg")]
    (root / "photos.csv").write_text("\n".join(["path,label,group", *rows]))
    dataset = load(root / "photos.csv")
    assert set(Counter(zip(dataset.groups, dataset.splits.tolist())).values()) <= {2, 4}
    assert len({(group, split) for group, split in zip(dataset.groups, dataset.splits.tolist())}) == 10


def test_official_splits_are_used(split_photos):
    dataset = load(split_photos(train={"a": 4, "b": 4}, val={"a": 2, "b": 1}, test={"a": 3, "b": 3}))
    assert all(path.startswith(split) for path, split in split_of(dataset).items())
    assert dataset.notes == []


def test_a_missing_val_is_carved_from_train_alone(split_photos):
    dataset = load(split_photos(train={"a": 10, "b": 10}, test={"a": 3, "b": 3}))
    assert Counter(dataset.splits.tolist()) == {"train": 18, "val": 2, "test": 6}
    assert all(path.startswith("test") for path, split in split_of(dataset).items() if split == "test")
    assert dataset.notes == ["Carved from train: val (10 % of each class)."]


def test_a_missing_test_is_carved_from_train_alone(split_photos):
    dataset = load(split_photos(train={"a": 8, "b": 8}, val={"a": 3, "b": 3}))
    assert Counter(dataset.splits.tolist()) == {"train": 12, "val": 6, "test": 4}
    assert all(path.startswith("val") for path, split in split_of(dataset).items() if split == "val")


def test_a_val_that_misses_a_class_joins_train_and_is_carved_again(split_photos):
    dataset = load(split_photos(train={"a": 9, "b": 10}, val={"a": 1}, test={"a": 3, "b": 3}))
    assert Counter(dataset.splits.tolist()) == {"train": 18, "val": 2, "test": 6}
    assert dataset.notes[0] == "The val split lacks the class `b`, so it joins train and val is carved anew."


def test_a_test_that_misses_a_class_leaves_it_untested(split_photos):
    dataset = load(split_photos(train={"a": 9, "b": 10}, val={"a": 1, "b": 1}, test={"a": 3}))
    assert dataset.untested == ["b"]
    assert dataset.notes == ["No test image, so no score, for the class `b`."]


def test_a_class_that_train_lacks_is_refused(split_photos):
    root = split_photos(train={"a": 4, "b": 4}, val={"a": 1, "b": 1}, test={"a": 1, "b": 1, "c": 1})
    assert "The train split has no image of the class `c`, which another split has" in refusal(root)
    assert load(root, only_classes=("a", "b")).num_classes == 2


def test_a_class_of_one_image_is_trained_on_and_not_tested(photos):
    dataset = load(photos(cat=1, dog=8))
    assert split_of(dataset)["cat/000.jpg"] == "train"
    assert dataset.untested == ["cat"]


def test_shots_and_seed_draw_from_train_and_val(photos):
    root = photos(cat=20, dog=24)
    whole, five, other, ten = load(root), load(root, shots=5), load(root, shots=5, seed=1), load(root, shots=10)
    assert Counter(five.splits.tolist()) == {"train": 10, "val": 8, "test": 11, "unused": 15}
    for drawn in (five, other, ten):
        np.testing.assert_array_equal(drawn.indices("test"), whole.indices("test"))
    assert set(five.indices("train")) <= set(ten.indices("train"))
    assert set(five.indices("train")) != set(other.indices("train"))


def test_more_shots_than_a_class_has_are_refused(photos):
    assert "but `cat` has 3; lower --shots" in refusal(photos(cat=4, dog=40), shots=4)


def test_a_fraction_keeps_val(photos):
    root = photos(cat=20, dog=40)
    whole, part = load(root), load(root, fraction=0.5)
    assert Counter(part.splits.tolist()) == {"train": 21, "val": 5, "test": 15, "unused": 19}
    np.testing.assert_array_equal(whole.indices("val"), part.indices("val"))


def test_an_unreadable_image_is_left_out_and_listed(photos):
    root = photos(cat=4, dog=4)
    (root / "cat" / "bad.jpg").write_text("I am a text")
    dataset = load(root)
    assert dataset.unreadable == [("cat/bad.jpg", "not an image")]
    assert len(dataset.paths) == 8
    assert dataset.notes[0] == "Left out 1 unreadable image: cat/bad.jpg (not an image)."


def test_too_many_unreadable_images_are_refused(photos):
    root = photos(cat=6, dog=6)
    for number in range(4):
        (root / "cat" / f"bad{number}.jpg").write_text("I am a text")
    message = refusal(root)
    assert message.startswith("4 of 16 images of `photos` cannot be read, more than the 3 that are tolerated: cat/bad0")
    assert len(load(root, max_unreadable=4).unreadable) == 4
    assert "more than the 0" in refusal(root, max_unreadable=0)


def test_a_class_without_a_readable_image_is_refused(photos):
    root = photos(cat=4, dog=4)
    (root / "bird").mkdir()
    (root / "bird" / "a.jpg").write_text("I am a text")
    assert refusal(root).startswith("No image of the class `bird` can be read: bird/a.jpg (not an image)")


def test_an_image_that_vanishes_after_the_scan_is_named(photos):
    dataset = load(photos(cat=4, dog=4))
    (dataset.source.root / "cat" / "000.jpg").unlink()
    with pytest.raises(DataError, match=r"The image `cat/000\.jpg` of `photos` could be read before"):
        dataset.read_image(0)


def test_one_class_is_not_enough(photos):
    assert "at least two classes to tell apart, but there is only `cat`" in refusal(photos(cat=4))


def test_classes_with_few_images_are_left_out_on_request(photos):
    dataset = load(photos(a=6, b=2, c=4), min_images=4)
    assert [info.label for info in dataset.classes] == ["a", "c"] and set(dataset.labels.tolist()) == {0, 1}
    assert any("Left out the class `b`, with fewer than 4 images" in note for note in dataset.notes)


def test_a_table_whose_images_lie_elsewhere_says_where_they_were_looked_for(photos, tmp_path):
    root = photos(a=3, b=3)
    rows = [f"{image.relative_to(root)},{image.parent.name}" for image in sorted(root.rglob("*.jpg"))]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *rows]))
    with pytest.raises(DataError, match=r"6 of 6 images .*`a/000.jpg` was looked for as `.*/a/000.jpg`: a table's"):
        load(tmp_path / "labels.csv")


def test_only_classes_are_kept_by_label_or_readable_name_or_from_a_file(photos, tmp_path):
    root = photos(sea_horse=4, dog=4, cat=4)
    dataset = load(root, only_classes=("Sea-Horse", "cat", "cat"))
    assert [info.label for info in dataset.classes] == ["cat", "sea_horse"]
    assert dataset.notes[0] == "Kept 2 of 3 classes, as `only_classes` says."
    (tmp_path / "list.txt").write_text("sea horse\n\ncat\n")
    assert load(root, only_classes=(str(tmp_path / "list.txt"),)).paths == dataset.paths


def test_only_classes_that_are_not_there_are_refused_with_suggestions(photos):
    root = photos(airplanes=4, dog=4)
    assert "`airplane` (did you mean `airplanes`?)" in refusal(root, only_classes=("airplane", "dog"))
    assert "at least two classes" in refusal(root, only_classes=("dog",))


def test_a_broken_image_of_a_class_that_is_left_out_does_not_count(photos):
    root = photos(cat=4, dog=4)
    (root / "bird").mkdir()
    (root / "bird" / "a.jpg").write_text("I am a text")
    assert load(root, only_classes=("cat", "dog")).unreadable == []


def test_a_classes_file_completes_the_classes(photos, tmp_path):
    texts = tmp_path / "classes.json"
    texts.write_text(json.dumps({"Cat": ["It purrs."], "dog": {"name": "hound"}, "bird": ["x"]}))
    dataset = load(photos(cat=4, dog=4), classes=str(texts))
    assert [(info.name, info.descriptions) for info in dataset.classes] == [("cat", ("It purrs.",)), ("hound", ())]
    assert dataset.notes[:2] == [
        f"Ignored 1 row of `{texts}` for classes that the data lacks: bird.",
        f"`{texts}` has no sentence for the class `dog`: the templates are used.",
    ]


def test_classes_can_be_had_without_reading_an_image(photos):
    root = photos(cat=1, sea_horse=1)
    (root / "cat" / "000.jpg").write_text("I am a text")
    assert [info.name for info in data.load_classes(DataConfig(source=str(root)))[0]] == ["cat", "sea horse"]


def test_other_data_are_matched_to_a_models_classes_by_name(photos):
    classes = derive_classes(["cat", "n02085620-Chihuahua", "sea_horse"])
    dataset = data.load_labelled(str(photos("other", **{"Sea Horse": 2, "chihuahua": 1})), classes)
    assert [info.label for info in dataset.classes] == ["cat", "n02085620-Chihuahua", "sea_horse"]
    assert dataset.labels.tolist() == [2, 2, 1]
    assert dataset.splits.tolist() == ["test"] * 3
    assert dataset.read_image(2).mode == "RGB"


def test_other_data_with_splits_are_scored_whole_and_a_note_says_so(split_photos):
    dataset = data.load_labelled(str(split_photos(train={"a": 2}, test={"b": 1})), derive_classes("ab"))
    assert dataset.splits.tolist() == ["test"] * 3
    assert dataset.notes == ["Scored all splits of `data` together."]


def test_other_data_with_classes_that_the_model_does_not_know_are_refused(photos):
    root = photos("other", cats=1, zebra=1)
    with pytest.raises(DataError, match=r"does not know these classes of .*`cats` \(did you mean `cat`\?\), `zebra`;"):
        data.load_labelled(str(root), derive_classes(["cat", "dog"]))


def test_other_data_with_unknown_classes_are_scored_without_them_on_request(photos):
    root = photos("other", cat=2, zebra=3)
    dataset = data.load_labelled(str(root), derive_classes(["cat", "dog"]), ignore_unknown=True)
    assert dataset.labels.tolist() == [0, 0]
    assert "Left out 3 images of the class `zebra`, which the model does not know." in dataset.notes
    with pytest.raises(DataError, match="does not know"):  # of nothing there is no score
        data.load_labelled(str(photos("none", zebra=1)), derive_classes(["cat", "dog"]), ignore_unknown=True)


def test_copies_across_splits_and_classes_are_found(photos):
    root = photos(cat=4, dog=4)
    shutil.copy(root / "cat" / "000.jpg", root / "cat" / "copy.jpg")
    shutil.copy(root / "cat" / "001.jpg", root / "dog" / "copy.jpg")
    shutil.copy(root / "cat" / "002.jpg", root / "cat" / "same split.jpg")
    files = sorted(path.relative_to(root) for path in root.glob("*/*.jpg"))
    rows = [f"{file},{file.parent},{'test' if file.stem in ('000', '003') else 'train'}" for file in files]
    (root / "photos.csv").write_text("\n".join(["path,label,split", *rows]))
    assert data.find_duplicates(load(root / "photos.csv")) == [
        ["cat/000.jpg (test, cat)", "cat/copy.jpg (train, cat)"],
        ["cat/001.jpg (train, cat)", "dog/copy.jpg (train, dog)"],
    ]


def test_the_data_room_needs_no_torch():
    code = "import sys, tes.data; assert not {'torch', 'torchvision', 'timm', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_grocery_store_opens_with_its_texts_as_they_are(shared):
    root = shared / "data" / "grocerystore"
    dataset = load(root, classes=str(root / "classes.json"))
    assert Counter(path.split("/")[0] for path in dataset.paths) == {"train": 2640, "val": 296, "test": 2485}
    assert dataset.num_classes == 81
    assert len(dataset.indices("test")) == 2485
    assert set(Counter(dataset.labels[dataset.indices("val")].tolist())) == set(range(81))
    assert all(info.coarse and info.descriptions for info in dataset.classes)
    assert dataset.unreadable == []


def test_caltech_opens_with_carved_splits(shared):
    dataset = load(shared / "data" / "caltech101", shots=5)
    assert dataset.num_classes == 101
    assert len(dataset.paths) == 5975
    assert Counter(dataset.splits.tolist()) == {"train": 505, "val": 404, "test": 1505, "unused": 3561}
    assert dataset.unreadable == dataset.untested == []


def test_the_flowers_two_known_copies_across_splits_are_found(shared, tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    root = shared / "data" / "flowers-102"
    labels = scipy_io.loadmat(root / "imagelabels.mat")["labels"][0]
    ids = scipy_io.loadmat(root / "setid.mat")
    split = {
        int(i): name for name, key in (("train", "trnid"), ("val", "valid"), ("test", "tstid")) for i in ids[key][0]
    }
    rows = [f"{root}/jpg/image_{i:05}.jpg,{labels[i - 1]},{split[i]}" for i in range(1, 8190)]
    (tmp_path / "flowers.csv").write_text("\n".join(["path,label,split", *rows]))
    dataset = load(tmp_path / "flowers.csv")
    assert Counter(dataset.splits.tolist()) == {"train": 1020, "val": 1020, "test": 6149}
    found = data.find_duplicates(dataset)
    pairs = [{text.split("image_")[1][:5] for text in group} for group in found]
    assert {"07307", "07309"} in pairs
    assert {"08067", "08077"} in pairs
    assert len(pairs) == 2
