from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tes.data.names import NameIndex, is_uninformative, match_key, readable_name

READABLE = {
    "Faces_easy": "faces easy",
    "car_side": "car side",
    "Arla-Ecological-Medium-Fat-Milk": "arla ecological medium fat milk",
    "GoldenRetriever": "golden retriever",
    "HerbaceousVegetation": "herbaceous vegetation",
    "HTTPServer": "http server",
    "BMW M3": "bmw m3",
    "Ford F-150, 2012": "ford f-150, 2012",
    "F-16A/B": "f-16a/b",
    "747-400": "747-400",
    "Il-76": "il-76",
    "Boeing-747": "boeing 747",
    "McLaren MP4-12C Coupe 2012": "mclaren mp4-12c coupe 2012",
    "McLaren": "mclaren",
    "iPhone": "iphone",
    "n02085620-Chihuahua": "chihuahua",
    "n02085620-GermanShepherd": "german shepherd",
    "001.Black_footed_Albatross": "black footed albatross",
    "07_tulip": "tulip",
    "3.5mm jack": "3.5mm jack",
    "colt's foot": "colt's foot",
    "  two\t words ": "two words",
    "Ｆｕｌｌ　Ｗｉｄｔｈ": "full width",
    "Käse": "käse",
    "猫": "猫",
    "___": "___",
    "n02085620": "n02085620",
    "001.": "001.",
}


@pytest.mark.parametrize(("label", "name"), READABLE.items())
def test_a_label_is_read_as_a_person_would(label, name):
    assert readable_name(label) == name


@given(st.text(min_size=1))
def test_a_name_is_never_empty_and_is_readable_as_it_is(label):
    name = readable_name(label)
    assert name
    assert match_key(name) == match_key(label)


@given(st.lists(st.from_regex(r"[a-z]{2,8}", fullmatch=True), min_size=1, max_size=4))
def test_underscores_hyphens_and_case_do_not_matter(words):
    spaced = " ".join(words)
    for spelling in ("_".join(words), "-".join(words), spaced.upper(), "".join(map(str.capitalize, words))):
        assert match_key(spelling) == match_key(spaced)


@pytest.mark.parametrize(("one", "other"), [("1 11", "11 1"), ("747-400", "7474-00"), ("कि", "का"), ("a b", "a c")])
def test_different_names_stay_apart(one, other):
    assert match_key(one) != match_key(other)


@pytest.mark.parametrize(
    "name", ["class_3", "Class 12", "17", "0", "n02085620", "x", "___", "unknown", "Other", "id#4"]
)
def test_a_name_that_says_nothing_is_seen(name):
    assert is_uninformative(name)


@pytest.mark.parametrize("name", ["cat", "747-400", "猫", "a300b4", "class act", "ox", "Type R"])
def test_a_name_that_says_something_is_left_alone(name):
    assert not is_uninformative(name)


def test_an_exact_name_comes_before_a_similar_one():
    index = NameIndex(["sea_horse", "Sea-Horse", "cat"])
    assert index.find("sea_horse") == ["sea_horse"]
    assert index.find("sea horse") == ["sea_horse", "Sea-Horse"]
    assert index.find("CAT") == ["cat"]
    assert index.find("dog") == []


def test_what_is_not_found_is_described():
    index = NameIndex(["sea_horse", "Sea-Horse", "airplane"])
    assert index.describe_unknown("airplanes") == "`airplanes` (did you mean `airplane`?)"
    assert index.describe_unknown("seahorse") == "`seahorse` (it could mean `sea_horse` or `Sea-Horse`)"
    assert index.describe_unknown("zzz") == "`zzz`"


def test_further_spellings_find_an_option():
    assert NameIndex({"n01": ["golden retriever"]}).find("Golden_Retriever") == ["n01"]
