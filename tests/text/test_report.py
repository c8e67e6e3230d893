from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from tes.config import TextConfig
from tes.data.classes_file import ClassInfo, derive_classes
from tes.errors import TextError
from tes.text import TextClassifier, build, render, text_report


def classifier(classes, rows) -> TextClassifier:
    rows = np.asarray(rows, dtype=np.float64)
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    labels, names = tuple(info.label for info in classes), tuple(info.name for info in classes)
    prompts = tuple((f"a photo of a {name}", f"the {name}") for name in names)
    return TextClassifier(labels, names, prompts, rows, None, "test")


DISTINCT = derive_classes(["apple", "pear", "sea_horse", "tick"])
ANGLES = np.radians([0, 60, 130, 240])
ROWS = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)


def test_nearest_classes_and_cosines_are_those_of_the_rows():
    report = text_report(classifier(DISTINCT, ROWS), DISTINCT)
    cosines = {pair: np.cos(ANGLES[pair[0]] - ANGLES[pair[1]]) for pair in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]}
    cosines[2, 3] = np.cos(ANGLES[2] - ANGLES[3])
    assert report["cosine"]["raw"]["mean"] == pytest.approx(np.mean(list(cosines.values())), abs=1e-6)
    assert report["cosine"]["raw"]["max"] == pytest.approx(cosines[0, 1], abs=1e-6)
    nearest = report["classes"][0]["nearest"]
    assert [other["class"] for other in nearest] == ["pear", "tick", "sea_horse"]
    assert nearest[0]["cosine"] == pytest.approx(0.5, abs=1e-6)
    assert report["classes"][2]["prompts"] == ["a photo of a sea horse", "the sea horse"]
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_distinct_telling_names_stand_in_nobodys_way():
    [sentence] = text_report(classifier(DISTINCT, ROWS), DISTINCT)["verdict"]
    assert "nothing stands in the way" in sentence


def test_duplicates_near_duplicates_and_silent_names_are_said_to_be_so():
    classes = derive_classes(["17", "class_3", "pear", "tick", "x"])
    angles = np.radians([0, 0.01, 90, 200, 95])
    report = text_report(classifier(classes, np.stack([np.cos(angles), np.sin(angles)], axis=1)), classes)
    assert report["duplicates"] == [["17", "class_3"]]
    assert report["uninformative"] == ["17", "class_3", "x"]
    verdict = " ".join(report["verdict"])
    assert "1 pair of classes has one and the same row (17 = class_3)" in verdict
    assert "3 names of 5 say nothing (17, class_3, x)" in verdict
    assert "1 further pair of classes is nearly the same to the text (pear and x 1.00)" in verdict
    assert "nothing stands in the way" not in verdict


def test_names_that_an_english_encoder_cannot_read_are_said_to_be_so():
    classes = derive_classes(["Löwenzahn", "Mohn", "pear"])
    text = dataclasses.replace(classifier(classes, ROWS[:3]), encoder="minilm")
    assert "1 name of 3 has letters that English lacks (löwenzahn)" in text_report(text, classes)["verdict"][0]
    nests = derive_classes(["bird’s nest", "fern", "pear"])  # an apostrophe is no letter
    english = dataclasses.replace(classifier(nests, ROWS[:3]), encoder="minilm")
    assert "nothing stands in the way" in text_report(english, nests)["verdict"][0]
    prompted = [ClassInfo("Löwenzahn", "löwenzahn", prompts=("a photo of a dandelion",)), *classes[1:]]
    assert "letters" not in text_report(text, prompted)["verdict"][0]
    other = dataclasses.replace(text, encoder="st:multilingual")
    assert "nothing stands in the way" in text_report(other, classes)["verdict"][0]


def test_a_silent_name_with_a_description_is_not_silent():
    described = [ClassInfo("class_3", "class 3", descriptions=("A green pear.",)), *DISTINCT[1:]]
    assert text_report(classifier(described, ROWS), described)["uninformative"] == []


def test_a_narrow_cone_calls_for_centring_and_centring_is_shown_to_widen_it():
    rows = ROWS[:, [0, 1, 1]] * [1, 1, 0] + [0, 0, 2]
    loose = text_report(classifier(DISTINCT, rows), DISTINCT)
    [sentence] = loose["verdict"]
    assert "turn centring on" in sentence
    plain = classifier(DISTINCT, rows)
    mean = plain.Z.mean(axis=0)
    rest = plain.Z - mean
    centred_rows = rest / np.linalg.norm(rest, axis=1, keepdims=True)
    centred = TextClassifier(plain.labels, plain.names, plain.prompts, centred_rows, mean, "test")
    report = text_report(centred, DISTINCT)
    assert any("Centring is on" in sentence for sentence in report["verdict"])
    assert report["cosine"]["raw"] == pytest.approx(loose["cosine"]["raw"], abs=1e-5)
    assert report["cosine"]["centred"] == pytest.approx(loose["cosine"]["centred"], abs=1e-5)
    assert report["cosine"]["centred"]["mean"] < 0.1 < CROWDED_AT_LEAST < report["cosine"]["raw"]["mean"]


CROWDED_AT_LEAST = 0.5


def test_the_text_for_people_has_a_line_per_class_and_says_what_it_means():
    lines = render(text_report(classifier(DISTINCT, ROWS), DISTINCT)).splitlines()
    assert lines[0] == "Text classifier: test, 4 classes, 2 dimensions, not centred."
    [line] = [line for line in lines if line.startswith("sea_horse")]
    assert " ".join(line.split()) == "sea_horse a photo of a sea horse (+1) pear 0.34, tick -0.34, apple -0.64"
    assert "What this means:" in lines
    assert max(map(len, lines[:7])) <= 150


def test_a_single_class_has_no_neighbours_and_no_nan():
    one = [ClassInfo("pear", "pear")]
    report = text_report(classifier(one, [[1.0, 0.0]]), one)
    assert report["classes"][0]["nearest"] == []
    assert json.dumps(report, allow_nan=False)
    assert render(report)


def test_a_classifier_of_other_classes_is_not_reported_on():
    with pytest.raises(TextError, match="Row 0"):
        text_report(classifier(DISTINCT, ROWS), DISTINCT[::-1])


@pytest.mark.slow
def test_minilm_on_caltech_stands_in_the_narrow_cone_that_is_known(shared):
    pytest.importorskip("torch")
    classes = derive_classes(sorted(folder.name for folder in (shared / "data" / "caltech101").iterdir()))
    report = text_report(build(classes, TextConfig(), centre=True), classes)
    assert report["num_classes"] == 101
    assert report["cosine"]["raw"]["mean"] == pytest.approx(0.38, abs=0.02)
    assert abs(report["cosine"]["centred"]["mean"]) < 0.02
    assert report["uninformative"] == []
