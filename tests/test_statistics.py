from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from tes.errors import RunError
from tes.predictions import Predictions
from tes.statistics import MIN_SEEDS, Answers, Effect, bootstrap_images, holm, paired, resample_images, sentence

ARM_S = [0.712, 0.694, 0.731, 0.702, 0.709, 0.688, 0.725, 0.716, 0.699, 0.707]
CE_S = [0.701, 0.699, 0.712, 0.688, 0.709, 0.671, 0.717, 0.695, 0.701, 0.690]
DIFFERENCES_S = np.subtract(ARM_S, CE_S)


def effect(**figures) -> Effect:
    """An effect that helped, by both seeds and images, but for the figures given."""
    helped = Effect(
        mean=0.021, standard_error=0.0057, low=0.008, high=0.034, p=0.005, num_seeds=10, wins=9, ties=0, losses=1,
        p_holm=0.01, bootstrap_low=0.012, bootstrap_high=0.03,
    )  # fmt: skip
    return replace(helped, **figures)


def hurt(**figures) -> Effect:
    mirrored = {"mean": -0.021, "low": -0.034, "high": -0.008, "bootstrap_low": -0.03, "bootstrap_high": -0.012}
    return effect(**(mirrored | figures))


def answers(is_correct, labels, paths=None) -> Answers:
    paths = paths or [f"{i}.png" for i in range(len(labels))]
    return Answers(paths, np.array(labels), np.array(is_correct, dtype=bool))


def random_cell(rng: np.random.Generator, labels: list[int]) -> tuple[Answers, Answers]:
    return answers(rng.random(len(labels)) < 0.8, labels), answers(rng.random(len(labels)) < 0.6, labels)


# Seeds


def test_the_paired_t_test_is_scipys():
    result, expected = paired(DIFFERENCES_S), stats.ttest_rel(ARM_S, CE_S)
    interval = stats.t.interval(0.95, 9, loc=DIFFERENCES_S.mean(), scale=stats.sem(DIFFERENCES_S))
    assert result.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert (result.low, result.high) == pytest.approx(interval, rel=1e-9)
    assert (result.low, result.high) == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-9)
    assert result.mean == pytest.approx(0.01) and result.standard_error == pytest.approx(stats.sem(DIFFERENCES_S))
    assert (result.num_seeds, result.wins, result.ties, result.losses) == (10, 7, 1, 2)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-40, 40), min_size=1, max_size=12))
def test_every_figure_is_finite_or_none_and_turns_with_the_sign(images):
    result, mirrored = paired(np.array(images) / 300), paired(-np.array(images) / 300)
    assert all(value is None or math.isfinite(value) for value in vars(result).values())
    assert (mirrored.mean, mirrored.p) == pytest.approx((-result.mean, result.p))
    assert (mirrored.wins, mirrored.ties, mirrored.losses) == (result.losses, result.ties, result.wins)
    if len(set(images)) > 1:
        assert result.p == pytest.approx(stats.ttest_1samp(np.array(images) / 300, 0).pvalue)
        assert result.low < result.mean < result.high
        assert (result.low > 0 or result.high < 0) == (result.p < 0.05)


def test_one_seed_has_a_mean_and_neither_interval_nor_p():
    result = paired([0.02])
    assert (result.mean, result.num_seeds, result.wins) == (0.02, 1, 1)
    assert result.standard_error is result.low is result.high is result.p is None


def test_one_run_without_seeds_counts_no_seed():
    result = paired([-0.02], has_seeds=False)
    assert (result.mean, result.num_seeds, result.losses) == (-0.02, 0, 1)


def test_differences_that_are_all_zero_but_for_rounding_are_zero():
    result = paired([0.1 + 0.2 - 0.3, 0.3 - 0.1 - 0.2, 0])
    assert (result.mean, result.low, result.high, result.p, result.ties) == (0, 0, 0, 1, 3)


@pytest.mark.parametrize("difference", [0.01, -0.01])
def test_equal_differences_have_the_p_of_the_sign_flip_test_and_no_interval(difference):
    differences_S = np.full(6, difference) + np.arange(6) * 1e-16
    means = [np.mean(signs * differences_S) for signs in itertools.product([-1, 1], repeat=6)]
    result = paired(differences_S)
    assert result.p == np.mean(np.abs(means) >= 0.01 - 1e-9) == 2 / 2**6
    assert result.low is result.high is None and result.standard_error == 0


# Holm


@settings(max_examples=15, deadline=None)
@given(st.lists(st.one_of(st.none(), st.floats(0, 1), st.sampled_from([0.01, 0.02])), max_size=9))
def test_holm_is_statsmodels_and_leaves_none_out(p_values):
    adjusted = holm(p_values)
    known = [p for p in p_values if p is not None]
    assert [p is None for p in adjusted] == [p is None for p in p_values]
    if known:
        expected = multipletests(known, method="holm")[1]
        assert [p for p in adjusted if p is not None] == pytest.approx(expected.tolist(), abs=1e-15)


def test_holm_on_numbers_worked_by_hand():
    assert holm([0.04, None, 0.01, 0.03]) == pytest.approx([0.06, None, 0.03, 0.06])


# Images


def slow_resamples(cells, metric: str, num_resamples: int) -> list[float]:
    """The bootstrap as its definition says, image by image, for cells that all scored the same images.

    n of a class's n images are drawn, and the distance of their mean to the class's is enlarged by sqrt(n / (n-1)).
    """
    draw = random.Random(1)
    paths_of: dict[int, list[str]] = {}
    for path, label in zip(cells[0][0].paths, cells[0][0].labels.tolist()):
        paths_of.setdefault(label, []).append(path)
    weight_of = {label: len(paths) / len(cells[0][0].paths) for label, paths in paths_of.items()}
    if metric == "mean_per_class":
        weight_of = dict.fromkeys(paths_of, 1 / len(paths_of))
    tables = [[dict(zip(side.paths, side.is_correct.tolist())) for side in cell] for cell in cells]
    effects = []
    for _ in range(num_resamples):
        drawn_of = {label: draw.choices(paths, k=len(paths)) for label, paths in paths_of.items()}
        in_cells = []
        for arm, ce in tables:
            parts = []
            for label, paths in paths_of.items():
                mean, drawn = (np.mean([arm[path] - ce[path] for path in some]) for some in (paths, drawn_of[label]))
                parts.append(weight_of[label] * (mean + math.sqrt(len(paths) / (len(paths) - 1)) * (drawn - mean)))
            in_cells.append(sum(parts))
        effects.append(float(np.mean(in_cells)))
    return effects


@pytest.mark.parametrize("metric", ["mean_per_class", "top1"])
def test_the_bootstrap_is_the_slow_one_and_has_the_unbiased_variance(metric):
    rng = np.random.default_rng(0)
    labels = [0] * 9 + [1] * 6 + [3] * 5
    cells = [random_cell(rng, labels) for _ in range(3)]
    effects_R = resample_images(cells, metric, 20_000)
    slow = slow_resamples(cells, metric, 4_000)
    d_N = np.mean([arm.is_correct * 1.0 - ce.is_correct for arm, ce in cells], axis=0)
    of_class = [d_N[np.array(labels) == label] for label in (0, 1, 3)]
    weights = [9 / 20, 6 / 20, 5 / 20] if metric == "top1" else [1 / 3] * 3
    variance = sum(weight**2 * values.var(ddof=1) / len(values) for weight, values in zip(weights, of_class))
    assert variance > 0
    assert effects_R.var() == pytest.approx(variance, rel=0.05)
    assert effects_R.mean() == pytest.approx(
        sum(weight * values.mean() for weight, values in zip(weights, of_class)), abs=4 * math.sqrt(variance / 20_000)
    )
    standard_error = math.sqrt(variance)
    for quantile in (2.5, 16, 50, 84, 97.5):
        # The effects lie on a grid of 1 / (3 cells x images): the quantiles of 4,000 draws are off by a step or so.
        assert np.percentile(effects_R, quantile) == pytest.approx(
            np.percentile(slow, quantile), abs=0.25 * standard_error
        )
    assert bootstrap_images(cells, metric, 20_000) == tuple(np.percentile(effects_R, [2.5, 97.5]))


@pytest.mark.parametrize("sizes", [[1] * 30, [2] * 15, [1] * 12 + [2] * 9])
def test_classes_of_one_or_two_images_vary_as_all_images_do(sizes):
    rng = np.random.default_rng(0)
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    cell = random_cell(rng, labels)
    d_N = cell[0].is_correct * 1.0 - cell[1].is_correct
    weight_N = np.array([1 / len(sizes) / sizes[label] for label in labels])
    effects_R = resample_images([cell] * 2, num_resamples=20_000)
    assert effects_R.var() == pytest.approx((weight_N**2).sum() * d_N.var(), rel=0.05)
    assert effects_R.mean() == pytest.approx(weight_N @ d_N, abs=4 * effects_R.std() / math.sqrt(20_000))


@pytest.mark.parametrize("sizes", [[2] * 50, [1] * 40 + [2] * 10, [1] + [20] * 5])
def test_two_equally_good_arms_are_seldom_called_different(sizes):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(sizes)), sizes).tolist()
    called = 0
    for _ in range(300):
        arm, ce = (answers(rng.random(len(labels)) < 0.6, labels) for _ in range(2))
        low, high = bootstrap_images([(arm, ce)], num_resamples=500)
        called += low > 0 or high < 0
    assert called / 300 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)


@pytest.mark.parametrize("num_scored", [1, 2, 6])
def test_seeds_that_scored_other_images_do_not_make_equal_arms_different(num_scored):
    rng = np.random.default_rng(0)
    called = 0
    for _ in range(100):
        right = rng.random((2, 20, 9)) < 0.6  # 20 classes of 9 images, and what each arm says of them, from any seed
        cells = []
        for _ in range(10):
            chosen = [(c, int(i)) for c in range(20) for i in rng.choice(9, num_scored, replace=False)]
            paths, labels = [f"{c} {i}" for c, i in chosen], [c for c, _ in chosen]
            cells.append(tuple(answers([side[place] for place in chosen], labels, paths) for side in right))
        low, high = bootstrap_images(cells, num_resamples=400)
        called += low > 0 or high < 0
    assert called / 100 < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 100)


def test_an_image_is_one_unit_however_many_cells_scored_it():
    rng = np.random.default_rng(0)
    cell = random_cell(rng, [0] * 20 + [1] * 30)
    once, often = resample_images([cell]), resample_images([cell] * 10)
    assert often.std() == pytest.approx(once.std(), rel=0.05)  # were they ten units, it would be 0.32 of it


def test_the_order_of_the_images_does_not_matter():
    rng = np.random.default_rng(0)
    labels = [0] * 20 + [1] * 15
    arm, ce = random_cell(rng, labels)
    order = rng.permutation(35)
    shuffled = answers(arm.is_correct[order], np.array(labels)[order], [arm.paths[i] for i in order])
    np.testing.assert_allclose(resample_images([(shuffled, ce)]), resample_images([(arm, ce)]), atol=1e-12)


def test_cells_that_scored_different_images_share_what_they_have_in_common():
    # Every image of class 0 is won in every cell, whichever were scored: nothing there can vary.
    labels = [0] * 5 + [1] * 5
    first = answers([1] * 5 + [0] * 5, labels, [*"abcdevwxyz"]), answers([0] * 10, labels, [*"abcdevwxyz"])
    second = answers([1] * 5 + [0] * 5, labels, [*"fghijqrstu"]), answers([0] * 10, labels, [*"fghijqrstu"])
    assert resample_images([first, second]) == pytest.approx(0.5)
    # Class 1 is won on v to z, in the first cell alone, where they are all of the class.
    won = answers([1] * 10, labels, first[0].paths), first[1]
    assert resample_images([won, second]) == pytest.approx(0.75)


def test_cells_without_a_common_image_vary_independently():
    rng = np.random.default_rng(0)
    cells = [random_cell(rng, [0] * n) for n in (12, 30)]
    cells[1] = tuple(replace(side, paths=[f"other {path}" for path in side.paths]) for side in cells[1])
    variances = [(arm.is_correct * 1.0 - ce.is_correct).var(ddof=1) / len(arm.paths) for arm, ce in cells]
    assert resample_images(cells, num_resamples=20_000).var() == pytest.approx(sum(variances) / 4, rel=0.05)


def test_classes_that_a_cell_did_not_score_do_not_count_in_it():
    first = answers([1, 1], [2, 2], ["a", "b"]), answers([0, 0], [2, 2], ["a", "b"])
    second = answers([0, 0], [0, 0], ["c", "d"]), answers([0, 0], [0, 0], ["c", "d"])
    assert resample_images([first, second]) == pytest.approx(0.5)


def test_the_draws_are_seeded():
    cells = [random_cell(np.random.default_rng(0), [0] * 20 + [1] * 20)]
    assert bootstrap_images(cells) == bootstrap_images(cells)
    assert (resample_images(cells, seed=1) != resample_images(cells, seed=2)).any()


def test_of_fewer_than_twenty_images_there_is_no_interval():
    labels = [0] * 10 + [1] * 9
    assert bootstrap_images([(answers([1] * 19, labels), answers([0] * 19, labels))]) is None
    assert bootstrap_images([(answers([1] * 20, [*labels, 1]), answers([0] * 20, [*labels, 1]))]) == (1, 1)


def test_arms_that_were_scored_on_different_images_are_refused():
    ce = answers([1, 0], [0, 0], ["a.png", "b.png"])
    with pytest.raises(RunError, match=r"same images: 2 .* `b.png`, `c.png`"):
        bootstrap_images([(answers([1, 0], [0, 0], ["a.png", "c.png"]), ce)])
    with pytest.raises(RunError, match=r"`b.png` has one class for the arm and another for `ce`"):
        bootstrap_images([(answers([1, 0], [0, 1], ["a.png", "b.png"]), ce)])
    other = answers([1, 0], [1, 0], ["a.png", "b.png"])
    with pytest.raises(RunError, match=r"`a.png` has different classes in different runs"):
        bootstrap_images([(ce, ce), (other, other)])


def test_answers_come_from_predictions_and_ties_go_to_the_lower_index():
    logits = np.float32([[0, 1], [1, 0], [1, 1], [1, 1]])
    made = Answers.of(Predictions([*"abcd"], np.array([1, 1, 0, 1]), {"vision": logits}), "vision")
    assert made.is_correct.tolist() == [True, False, True, False]
    assert (made.paths, made.labels.tolist()) == ([*"abcd"], [1, 1, 0, 1])


# Verdicts and sentences


@pytest.mark.parametrize("p_holm", [0.049, 0.05, None])
@pytest.mark.parametrize("over_images", [(0.001, 0.04), (0.0, 0.04), (-0.04, 0.04), (-0.04, -0.001), (None, None)])
@pytest.mark.parametrize("num_seeds", [0, 1, MIN_SEEDS - 1, MIN_SEEDS, 10])
@pytest.mark.parametrize("mean", [0.02, 0.0, -0.02])
def test_the_verdict_needs_seeds_and_images(mean, num_seeds, over_images, p_holm):
    low, high = over_images
    found = effect(mean=mean, num_seeds=num_seeds, bootstrap_low=low, bootstrap_high=high, p_holm=p_holm).verdict
    seeds_allow = num_seeds == 0 or (num_seeds >= 5 and p_holm == 0.049)
    expected = {(0.02, (0.001, 0.04)): "helped", (-0.02, (-0.04, -0.001)): "hurt"}.get((mean, over_images))
    assert found == (expected if seeds_allow and expected else "no evidence")


@pytest.mark.parametrize("num_seeds", [1, 5, 10])
def test_an_arm_equal_to_ce_is_no_evidence(num_seeds):
    cells = [random_cell(np.random.default_rng(seed), [0] * 30 + [1] * 10) for seed in range(num_seeds)]
    over_seeds = paired([0.0] * num_seeds)
    same = Effect.of(over_seeds, holm([over_seeds.p])[0], bootstrap_images([(arm, arm) for arm, _ in cells]))
    assert same.verdict == "no evidence" and (same.bootstrap_low, same.bootstrap_high) == (0, 0)
    assert sentence("`tes`", same).startswith("no evidence that `tes` helped: 0.0 points (95 % CI")


def test_an_arm_that_is_better_on_every_seed_helped_from_its_predictions_to_its_sentence():
    cells = [random_cell(np.random.default_rng(seed), [0] * 100 + [1] * 100) for seed in range(10)]
    differences_S = [arm.is_correct.mean() - ce.is_correct.mean() for arm, ce in cells]  # balanced: top1 is per class
    over_seeds = paired(differences_S)
    better = Effect.of(over_seeds, *holm([over_seeds.p]), bootstrap_images(cells))
    assert better.bootstrap_low < better.mean < better.bootstrap_high
    assert better.verdict == "helped" and better.wins == 10
    swapped = paired(-np.array(differences_S))
    worse = Effect.of(swapped, *holm([swapped.p]), bootstrap_images([(ce, arm) for arm, ce in cells]))
    assert worse.verdict == "hurt"


def test_json_holds_every_figure_and_the_verdict_and_no_nan():
    held = json.loads(json.dumps(Effect.of(paired([0.02]), None, None).to_dict(), allow_nan=False))
    assert held == {
        "mean": 0.02, "standard_error": None, "low": None, "high": None, "p": None, "num_seeds": 1,
        "wins": 1, "ties": 0, "losses": 0, "p_holm": None, "bootstrap_low": None, "bootstrap_high": None,
        "verdict": "no evidence",
    }  # fmt: skip


TEXT = "text supervision"
BOTH = {"the text prior": 0.02, "the objective": 0.001}
NONE = {"mean": 0.002, "low": -0.004, "high": 0.008, "p": 0.4, "p_holm": 0.4, "bootstrap_low": -0.002}
ONE_RUN = {"num_seeds": 0, "low": None, "high": None, "p": None, "p_holm": None}


@pytest.mark.parametrize(
    ("made", "options", "expected"),
    [
        (
            effect(),
            {"credit": BOTH},
            "text supervision helped by +2.1 points (95 % CI 0.8 to 3.4, 10 seeds); "
            "+2.0 of it from the text prior, +0.1 from the objective",
        ),
        (hurt(), {}, "text supervision hurt by -2.1 points (95 % CI -3.4 to -0.8, 10 seeds)"),
        (
            effect(**NONE),
            {},
            "no evidence that text supervision helped: +0.2 points (95 % CI -0.4 to 0.8, 10 seeds)",
        ),
        (
            effect(num_seeds=3),
            {},
            "no evidence that text supervision helped: +2.1 points (95 % CI 0.8 to 3.4, 3 seeds); "
            "3 seeds are too few to judge, run it with `--seeds 10`",
        ),
        (
            effect(num_seeds=1, low=None, high=None, p=None, p_holm=None),
            {},
            "no evidence that text supervision helped: +2.1 points (95 % CI over images 1.2 to 3.0, 1 seed); "
            "1 seed is too few to judge, run it with `--seeds 10`",
        ),
        (effect(**ONE_RUN), {}, "text supervision helped by +2.1 points (95 % CI over images 1.2 to 3.0, one run)"),
        (
            effect(**ONE_RUN, bootstrap_low=None, bootstrap_high=None),
            {},
            "no evidence that text supervision helped: +2.1 points (one run); "
            "fewer than 20 images were scored, so that chance cannot be told",
        ),
        (
            effect(bootstrap_low=-0.001),
            {},
            "no evidence that text supervision helped: +2.1 points (95 % CI 0.8 to 3.4, 10 seeds); "
            "over images the interval is -0.1 to 3.0",
        ),
        (
            effect(p_holm=0.06, num_seeds=5),
            {},
            "no evidence that text supervision helped: +2.1 points (95 % CI 0.8 to 3.4, 5 seeds); "
            "p = 0.060 after Holm's correction",
        ),
        (
            effect(**NONE | {"mean": -0.0003}),
            {"scope": "seeds draw most of a small pool: the interval is about this pool"},
            "no evidence that text supervision helped: 0.0 points (95 % CI -0.4 to 0.8, 10 seeds); "
            "seeds draw most of a small pool: the interval is about this pool",
        ),
    ],
)
def test_sentences(made, options, expected):
    assert sentence(TEXT, made, **options) == expected


RANDOM, PERMUTED = "`tes@random-text`", "the start `ce+probe+permuted`"
LESS = {"mean": 0.008, "low": 0.003, "high": 0.013}
EQUAL = {"mean": 0.005, "low": -0.01, "high": 0.02}


@pytest.mark.parametrize(
    ("figures", "clause"),
    [
        (LESS, "the names' meaning counts, against `tes@random-text` (+0.8, 95 % CI 0.3 to 1.3)"),
        (EQUAL, "the names' meaning is not shown to count, against `tes@random-text` (+0.5, 95 % CI -1.0 to 2.0)"),
        (
            {**ONE_RUN, "mean": 0.008, "bootstrap_low": 0.001, "bootstrap_high": 0.02},
            "the names' meaning counts, against `tes@random-text` (+0.8, 95 % CI 0.1 to 2.0)",
        ),
        (
            {**ONE_RUN, "mean": 0.008, "bootstrap_low": None, "bootstrap_high": None},
            "whether the names' meaning counts cannot be told from `tes@random-text` (+0.8, one run)",
        ),
    ],
)
def test_what_helped_is_held_against_its_controls(figures, clause):
    assert sentence(TEXT, effect(), controls={RANDOM: effect(**figures)}).endswith(f", 10 seeds); {clause}")


def test_controls_that_say_the_same_share_a_clause():
    same = sentence(TEXT, effect(), controls={RANDOM: effect(**LESS), PERMUTED: effect(**LESS)})
    assert same.count("the names' meaning counts, against") == 1 and " and the start `ce+probe+permuted` (+0.8" in same
    mixed = sentence(TEXT, effect(), controls={RANDOM: effect(**EQUAL), PERMUTED: effect(**LESS)})
    assert "not shown to count, against `tes@random-text`" in mixed
    assert "meaning counts, against the start `ce+probe+permuted`" in mixed


def test_what_did_not_help_is_not_explained():
    controls = {RANDOM: effect()}
    assert "tes@random-text" not in sentence(TEXT, effect(**NONE), controls=controls)
    assert "tes@random-text" not in sentence(TEXT, hurt(), controls=controls)


def test_the_scope_is_said_of_an_interval_over_seeds_alone():
    assert "this pool" in sentence(TEXT, effect(), scope="about this pool")
    assert "this pool" not in sentence(TEXT, effect(**ONE_RUN), scope="about this pool")
