from __future__ import annotations

import pytest

from tes.config import TextConfig
from tes.data.classes_file import ClassInfo
from tes.errors import TextError
from tes.text.prompts import class_prompts, with_templates


def test_the_default_prompt_is_the_authors_own():
    assert class_prompts(ClassInfo("sea_horse", "sea horse")) == ["a photo of a sea horse"]


def test_every_template_gives_a_sentence_and_other_braces_are_left_alone():
    assert class_prompts(ClassInfo("x", "pear"), ["a {}.", "art of {name} {}"]) == ["a pear.", "art of {name} pear"]


@pytest.mark.parametrize("template", ["a photo", "a {} and a {}", "a {name}", ""])
def test_a_template_without_exactly_one_place_for_the_name_is_refused(template):
    with pytest.raises(TextError, match="must have exactly one"):
        class_prompts(ClassInfo("x", "pear"), ["a {}", template])


def test_prompts_are_verbatim_and_a_description_gets_the_name_where_it_lacks_it():
    info = ClassInfo(
        "ant", "ant", descriptions=("Ants live in hills.", " Smaller than elephants. "), prompts=("what a bug",)
    )
    assert class_prompts(info) == ["what a bug", "Ants live in hills.", "ant: Smaller than elephants."]


def test_own_sentences_replace_the_templates_unless_they_are_mixed():
    described = ClassInfo("pear", "pear", descriptions=("A green pear.",))
    assert class_prompts(described, ["a {}"]) == ["A green pear."]
    assert class_prompts(described, ["a {}"], mix=True) == ["A green pear.", "a pear"]


def test_an_empty_description_counts_as_none():
    assert class_prompts(ClassInfo("pear", "pear", descriptions=("  ",))) == ["a photo of a pear"]


def test_prompts_that_come_with_the_data_fill_what_the_user_left_open():
    single, ensemble = ["a {}, a type of pet."], ["a {}.", "the {}."]
    own = TextConfig(templates=("my {}",))
    assert with_templates(own, single, ensemble) == (own, None)
    assert with_templates(TextConfig(), None, None) == (TextConfig(), None)
    filled, whose = with_templates(TextConfig(), single, ensemble)
    assert (filled.templates, whose) == (("a {}, a type of pet.",), "the task's own")
    assert with_templates(filled, single, ensemble) == (filled, None)
    many, _ = with_templates(TextConfig(templates="ensemble"), single, ensemble)
    assert many.templates == ("a {}.", "the {}.")
    rows = TextConfig(encoder="file:rows.npz")
    assert with_templates(rows, single, ensemble) == (rows, None)  # nothing reads prompts there
    with pytest.raises(TextError, match="these data are no task"):
        with_templates(TextConfig(templates="ensemble"), None, None)
