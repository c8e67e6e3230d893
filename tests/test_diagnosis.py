"""The diagnosis' figures against formulas written independently."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from tes.diagnosis import agreement, centred_cosine, debiased_cka, expected_agreement, geometry, sentence
from tes.dot_plot import SHAPES, dot_plot


@pytest.fixture
def draws():
    return np.random.default_rng(0)


def unbiased_hsic(x, y):
    """Song et al. 2007: the mean over ordered quadruples of distinct rows of k_ij (l_ij + l_qr - 2 l_iq)."""
    k, l = x @ x.T, y @ y.T  # noqa: E741
    terms = [k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in itertools.permutations(range(len(x)), 4)]
    return np.mean(terms)


@pytest.mark.parametrize("num_classes", [4, 7])
def test_debiased_cka_is_the_ratio_of_unbiased_hsics_over_all_quadruples(draws, num_classes):
    x, y = draws.normal(size=(num_classes, 5)), draws.normal(size=(num_classes, 3))
    y[:, 0] += x[:, 0]
    expected = unbiased_hsic(x, y) / np.sqrt(unbiased_hsic(x, x) * unbiased_hsic(y, y))
    assert debiased_cka(x, y) == pytest.approx(expected)


def test_debiased_cka_does_not_see_position_rotation_or_scale_and_is_small_for_unrelated_wide_rows(draws):
    x, y = draws.normal(size=(30, 200)), draws.normal(size=(30, 300))
    rotation = np.linalg.qr(draws.normal(size=(200, 200)))[0]
    assert debiased_cka(x, 3 * x @ rotation + 1) == pytest.approx(1)
    centred = [rows - rows.mean(axis=0) for rows in (x, y)]
    plain = [np.linalg.norm(a.T @ b) ** 2 for a, b in itertools.combinations_with_replacement(centred, 2)]
    assert plain[1] / np.sqrt(plain[0] * plain[2]) > 0.8 > 0.1 > abs(debiased_cka(x, y))


def test_what_has_no_geometry_gives_no_cka(draws):
    assert debiased_cka(draws.normal(size=(3, 5)), draws.normal(size=(3, 5))) is None
    assert debiased_cka(np.full((6, 5), 0.1), draws.normal(size=(6, 5))) is None
    assert geometry(np.full((6, 5), 0.1), draws.normal(size=(6, 5))) is None


def test_the_null_tells_a_shared_geometry_from_none(draws):
    x = draws.normal(size=(20, 8))
    same, none = geometry(x, x @ draws.normal(size=(8, 8))), geometry(x, draws.normal(size=(20, 8)))
    assert same["p"] == pytest.approx(1 / 501) and same["cka"] > same["null_95"]
    assert none["p"] > 0.05 and none["cka"] < none["null_95"]


def test_the_cosine_does_not_see_what_a_softmax_does_not_see(draws):
    a, b = draws.normal(size=(5, 7)), draws.normal(size=(5, 7))
    centre = np.eye(5) - 1 / 5
    expected = np.trace((centre @ a).T @ b) / np.linalg.norm(centre @ a) / np.linalg.norm(centre @ b)
    assert centred_cosine(a, b) == pytest.approx(expected)
    assert centred_cosine(a + draws.normal(size=7), 2 * b) == pytest.approx(expected)
    assert centred_cosine(np.ones((5, 7)), b) is None


def test_expected_agreement_is_what_independent_answers_show(draws):
    truth = draws.integers(0, 4, size=200_000)

    def answers(accuracy):
        wrong = (truth + draws.integers(1, 4, size=len(truth))) % 4
        return np.where(draws.random(len(truth)) < accuracy, truth, wrong)

    assert agreement(answers(0.7), answers(0.4)) == pytest.approx(expected_agreement(0.7, 0.4, 4), abs=0.01)
    assert agreement(truth[:0], truth[:0]) is None


def test_the_plot_is_an_svg_with_a_title_a_description_and_a_mark_for_each_figure():
    legend = {f"figure {number}": f"words <{number}>" for number in range(len(SHAPES))}
    rows = [("a & b", dict.fromkeys(legend, 0.5)), ("c", {"figure 0": -0.3, "figure 1": None})]
    root = ElementTree.fromstring(dot_plot("What?", legend, rows, "In words."))
    name = "{http://www.w3.org/2000/svg}"
    assert root.get("role") == "img" and root.find(f"{name}title").text == "What?"
    assert root.find(f"{name}desc").text == "In words."
    assert len(root.findall(f"{name}g")) == len(SHAPES) + 1
    assert "prefers-color-scheme:dark" in root.find(f"{name}style").text


def told(name: str, cosine: float, cka: float, objective: str = "ce") -> dict:
    return {
        "run": name, "arm_objective": objective, "uses_text": objective == "tes", "start": "random",
        "cosine_start": cosine, "agreement": 0.5, "text": {"cka": cka, "p": 0.01},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("cosine", "cka", "verdict"),
    [
        (0.20, 0.40, "the claim shows:"),
        (0.37, 0.40, "the claim shows in part: no further from W0"),
        (0.20, 0.22, "the claim shows in part: further from W0 than `ce` (0.20; `ce` 0.40 to 0.44), no nearer"),
        (0.37, 0.22, "the claim does not show"),
    ],
)
def test_the_claim_shows_only_by_more_than_two_seeds_of_ce_differ(cosine, cka, verdict):
    plain = [told("ce-0", 0.40, 0.18), told("ce-1", 0.44, 0.20)]
    assert sentence(told("tes-0", cosine, cka, "tes"), plain, []).startswith(f"tes-0: {verdict}")


def test_one_seed_of_ce_is_no_yardstick():
    said = sentence(told("tes-0", 0.2, 0.4, "tes"), [told("ce-0", 0.40, 0.18)], [])
    assert "a second seed of `ce` would tell" in said and "shows" not in said
