from __future__ import annotations

import json
from pathlib import Path

import pytest

from tes.data.classes_file import ClassInfo, apply_classes_file, derive_classes, read_classes_file
from tes.errors import DataError


@pytest.fixture
def file(tmp_path):
    def write(content: object, name: str = "classes.json") -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


def refusal(path: Path, labels: tuple[str, ...] = ("cat", "dog")) -> str:
    with pytest.raises(DataError) as caught:
        apply_classes_file(derive_classes(labels), path)
    return str(caught.value)


def test_labels_become_classes_with_readable_names_in_order():
    assert derive_classes(["sea_horse", "Cat", "sea_horse"]) == [
        ClassInfo("Cat", "cat"),
        ClassInfo("sea_horse", "sea horse"),
    ]


def test_a_file_gives_names_texts_and_coarse_classes(file):
    path = file(
        {
            "cat": {"name": "domestic cat", "description": "It purrs.", "coarse": "pet", "legs": 4},
            "dog": {"descriptions": ["It barks.", "It  wags\nits tail."], "prompts": ["a dog"]},
        }
    )
    [cat, dog], ignored = apply_classes_file(derive_classes(["dog", "cat"]), path)
    assert cat == ClassInfo("cat", "domestic cat", ("It purrs.",), (), "pet", {"legs": 4})
    assert dog == ClassInfo("dog", "dog", ("It barks.", "It wags its tail."), ("a dog",))
    assert ignored == []


YAML = """\
cat:
  name: domestic cat
  description: It purrs.
dog: [It barks., It wags.]
"no": just one sentence
12:
  prompts: [a twelve]
"""


def test_yaml_and_csv_say_the_same_as_json(file):
    rows = {row.key: row for row in read_classes_file(file(YAML, "classes.yaml"))}
    assert rows["cat"].name == "domestic cat"
    assert rows["dog"].descriptions == ("It barks.", "It wags.")
    assert rows["no"].descriptions == ("just one sentence",)
    assert rows["12"].prompts == ("a twelve",)

    table = "Class,name,description,coarse\ncat,domestic cat,It purrs.,pet\ndog,,It barks.,\ndog,,It wags.,\n"
    cat, dog = read_classes_file(file("\ufeff" + table, "classes.csv"))
    assert (cat.name, cat.descriptions, cat.coarse) == ("domestic cat", ("It purrs.",), "pet")
    assert (dog.name, dog.descriptions, dog.coarse) == (None, ("It barks.", "It wags."), None)


def test_rows_are_matched_exactly_first_then_by_readable_name(file):
    path = file(
        {"SEA HORSE": {"name": "similar"}, "sea_horse": {"name": "exact"}, "globe flower": ["x"], "bird": ["y"]}
    )
    classes, ignored = apply_classes_file(derive_classes(["sea_horse", "globe-flower"]), path)
    assert [info.name for info in classes] == ["globe flower", "exact"]
    assert classes[0].descriptions == ("x",)
    assert ignored == ["SEA HORSE", "bird"]


def test_all_classes_without_a_row_are_named_with_near_misses(file):
    message = refusal(file({"airplane": ["x"], "cat": ["y"]}), ("airplanes", "cat", "zebra"))
    assert "no row for 2 of the 3 classes: `airplanes` (did you mean `airplane`?), `zebra`." in message
    assert "--only-classes" in message


def test_an_ambiguous_match_is_refused(file):
    assert "could all mean the class `sea_horse`" in refusal(
        file({"Sea Horse": ["x"], "sea-horse": ["y"]}), ("sea_horse", "x")
    )
    assert "`cat` could mean the classes `CAT` and `Cat`" in refusal(file({"cat": ["x"]}), ("CAT", "Cat"))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"cat": 3, "dog": ["x"]}, "class `cat`: `descriptions` must be text, not 3"),
        ({"cat": ["x", None]}, "class `cat`: `descriptions` must be text, not null"),
        ({"cat": [["x"]]}, "class `cat`: `descriptions` must be text, not a list"),
        ({"cat": " "}, "class `cat`: `descriptions` is empty"),
        ({"cat": {"name": ""}}, "class `cat`: `name` is empty"),
        ({"cat": {"name": 7}}, "class `cat`: `name` must be text, not 7"),
        ({"cat": {"coarse": ["pet"]}}, "class `cat`: `coarse` must be text, not a list"),
        ({"cat": {"prompt": ["x"]}}, "unknown key `prompt`; did you mean `prompts`?"),
        ({"cat": {"description": "x", "descriptions": ["y"]}}, "`description` or `descriptions`, not both"),
        ({"": ["x"]}, "name is empty"),
        ({}, "must map each class to its texts"),
        (["cat", "dog"], "must map each class to its texts"),
        ('{"cat": ["x"], "cat": ["y"]}', "has `cat` more than once"),
        ('{"cat": {"name": "x", "name": "y"}}', "has `name` more than once"),
        ('{"cat": ', "is not valid JSON"),
    ],
)
def test_a_faulty_json_is_refused_in_one_sentence(file, content, sentence):
    message = refusal(file(content))
    assert sentence in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "name", "sentence"),
    [
        ("cat: [x]\ncat: [y]\n", "c.yaml", "has `cat` more than once"),
        ("cat: {name: no}\n", "c.yaml", "class `cat`: `name` must be text, not false; put it in quotes"),
        ("cat: [x\n", "c.yml", "is not valid YAML"),
        ("cat: !!python/object/apply:os.getcwd []\n", "c.yaml", "is not valid YAML"),
        ("", "c.yaml", "must map each class"),
        ("label,name\ncat,x\n", "c.csv", "has no column `class`"),
        ("class,name\ncat,x,y\n", "c.csv", "line 2, does not have 2 cells"),
        ("class,name\ncat\n", "c.csv", "line 2, does not have 2 cells"),
        ("class,name\n,x\n", "c.csv", "line 2: the cell `class` is empty"),
        ("class,name\ncat,x\ncat,y\n", "c.csv", "line 3: an earlier row gave this class another `name`, `x`"),
        ("class,name,name\ncat,x,y\n", "c.csv", "has `name` more than once"),
        ("cat", "c.txt", "must end in .json"),
    ],
)
def test_a_faulty_yaml_or_csv_is_refused_in_one_sentence(file, content, name, sentence):
    message = refusal(file(content, name))
    assert sentence in message
    assert "\n" not in message


def test_a_file_that_is_not_there_is_named_with_the_nearest(file):
    path = file({"cat": ["x"]})
    assert refusal(path.with_name("clases.json")).endswith("Did you mean `classes.json`?")


def test_published_descriptions_of_flowers_work_as_they_are(shared):
    names = json.loads((shared / "data/flowers-102/cat_to_name.json").read_text()).values()
    texts = shared / "text/cupl/flower_prompts_full.json"
    with pytest.raises(DataError) as caught:
        apply_classes_file(derive_classes(names), texts)
    assert "no row for 3 of the 102 classes: `ball moss`, `lotus lotus`" in str(caught.value)
    assert "`pink-yellow dahlia` (did you mean `pink and yellow dahlia`?)" in str(caught.value)
    present = [name for name in names if name not in ("ball moss", "lotus lotus", "pink-yellow dahlia")]
    classes, ignored = apply_classes_file(derive_classes(present), texts)
    assert all(info.descriptions for info in classes)
    assert sorted(ignored) == ["air plant", "lotus", "pink and yellow dahlia"]


def test_published_descriptions_of_birds_work_as_they_are(shared):
    labels = [line.split()[1] for line in (shared / "lists/cub200/classes.txt").read_text().splitlines()]
    classes, ignored = apply_classes_file(derive_classes(labels), shared / "text/dclip/descriptors_cub.json")
    assert classes[0].name == "black footed albatross"
    assert classes[0].descriptions[0] == "a seabird"
    assert ignored == []


def test_every_published_file_can_be_read(shared):
    for path in sorted((shared / "text").glob("*/*.json")):
        rows = read_classes_file(path)
        silent = [row.key for row in rows if not row.descriptions]
        assert len(rows) >= 10
        assert len(silent) <= (5 if path.name == "descriptors_food101.json" else 0)


def test_published_descriptions_that_lack_classes_of_caltech_are_refused_with_all_of_them(shared):
    labels = [folder.name for folder in (shared / "data/caltech101").iterdir()]
    with pytest.raises(DataError) as caught:
        apply_classes_file(derive_classes(labels), shared / "text/cupl/cal_prompts_full.json")
    message = str(caught.value)
    assert "no row for 12 of the 101 classes: `Faces`, `Faces_easy`, `Leopards` (did you mean `leopard`?)" in message
    assert "`Motorbikes` (did you mean `motorbike`?), `airplanes` (did you mean `airplane`?)" in message
    assert "`yin_yang`. Add rows called exactly as the classes" in message
