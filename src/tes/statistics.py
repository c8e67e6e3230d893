"""Whether an arm is better than `ce`, by how much and how sure: pairing, intervals, verdicts, sentences.

Differences are arm - ce. All figures are fractions, 0..1; only sentences speak of points, hundredths.
Shapes: S seeds, n images of a cell, N distinct images of all cells, C classes, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from tes.errors import RunError, listing
from tes.predictions import Predictions

ALPHA = 0.05  # the intervals are 1 - ALPHA wide
MIN_SEEDS = 5  # before "helped" or "hurt" is said: the t interval of 3 seeds is 3.5 times as wide as that of 10
ADVISED_SEEDS = 10
MIN_IMAGES = 20  # before an interval over images is given: a handful that happen to agree would have one of width 0
MIN_OF_CLASS = 5  # images of a class before it tells by itself how they vary
ROUNDING = 1e-12  # accuracies differ by whole images; a smaller difference is floating point's


@dataclass(frozen=True)
class Paired:
    """An arm's differences to `ce` over seeds.

    Attributes:
        mean: The mean difference.
        standard_error: Of the mean, over seeds; None where there is no p.
        low: Lower end of the 95 % paired t interval, unadjusted; None where there is none.
        high: Its upper end.
        p: Of the two-sided paired t-test; None below 2 seeds.
        num_seeds: S; 0 where neither side has a seed.
        wins: How many differences are above 0.
        ties: How many are 0.
        losses: How many are below 0.
    """

    mean: float
    standard_error: float | None
    low: float | None
    high: float | None
    p: float | None
    num_seeds: int
    wins: int
    ties: int
    losses: int


@dataclass(frozen=True)
class Effect(Paired):
    """All figures of one arm against `ce`.

    Attributes:
        p_holm: `p`, adjusted over the arms that the user typed; None where there is no p, or the arm was not typed.
        bootstrap_low: Lower end of the 95 % bootstrap interval over test images; None where there is none.
        bootstrap_high: Its upper end.
    """

    p_holm: float | None
    bootstrap_low: float | None
    bootstrap_high: float | None

    @staticmethod
    def of(over_seeds: Paired, p_holm: float | None, over_images: tuple[float, float] | None) -> Effect:
        """Put together what `paired`, `holm` and `bootstrap_images` returned."""
        low, high = over_images or (None, None)
        return Effect(**asdict(over_seeds), p_holm=p_holm, bootstrap_low=low, bootstrap_high=high)

    @property
    def has_too_few_seeds(self) -> bool:
        """Whether the arms have seeds, but fewer than a verdict needs."""
        return 0 < self.num_seeds < MIN_SEEDS

    @property
    def images_agree(self) -> bool:
        """Whether the bootstrap interval lies wholly on the mean's side of 0."""
        if self.bootstrap_low is None or self.bootstrap_high is None:
            return False
        return (self.mean > 0 and self.bootstrap_low > 0) or (self.mean < 0 and self.bootstrap_high < 0)

    @property
    def seeds_agree(self) -> bool:
        """Whether enough seeds say that the mean is not 0: p < 0.05 after Holm's correction."""
        return self.num_seeds >= MIN_SEEDS and self.p_holm is not None and self.p_holm < ALPHA

    @property
    def verdict(self) -> Literal["helped", "hurt", "no evidence"]:
        """`helped` or `hurt` where seeds and images agree, else `no evidence`.

        Where neither side has a seed (a convex solve at full data), one run is all there is, and the images decide.
        """
        if self.images_agree and (self.seeds_agree or self.num_seeds == 0):
            return "helped" if self.mean > 0 else "hurt"
        return "no evidence"

    def to_dict(self) -> dict[str, Any]:
        """Return all figures and the verdict, for JSON; what does not exist is None."""
        return {**asdict(self), "verdict": self.verdict}


def paired(differences_S: Sequence[float], has_seeds: bool = True) -> Paired:
    """Summarise one difference per seed; equals `scipy.stats.ttest_rel` wherever the differences vary.

    Where they do not, t is 0 / 0 or infinite. If all are 0, the arm is `ce` as far as anyone can see: the interval is
    [0, 0] and p = 1. If all are equal and not 0, a p of 0 would claim certainty from a handful of seeds: p is then
    that of the exact sign-flip test, 2^(1-S) (all seeds on one side, twice), and there is no interval.

    Args:
        differences_S: arm - ce per seed, the mean over shots taken first; at least one, all finite.
        has_seeds: Whether either side has a seed; if not, there is one difference, of one run.
    """
    from scipy.stats import t

    d_S = np.asarray(differences_S, dtype=np.float64)
    assert d_S.ndim == 1 and len(d_S) > 0 and np.isfinite(d_S).all(), f"no differences to summarise: {differences_S}"
    assert has_seeds or len(d_S) == 1, f"{len(d_S)} differences of runs without a seed"
    d_S = np.where(np.abs(d_S) <= ROUNDING, 0, d_S)
    num_seeds, mean = len(d_S), float(d_S.mean())
    standard_error = low = high = p = None
    if num_seeds > 1:
        if np.ptp(d_S) > ROUNDING:
            standard_error = float(d_S.std(ddof=1)) / math.sqrt(num_seeds)
            margin = float(t.ppf(1 - ALPHA / 2, num_seeds - 1)) * standard_error
            low, high = mean - margin, mean + margin
            p = 2 * float(t.sf(abs(mean) / standard_error, num_seeds - 1))
        else:
            standard_error = 0.0
            low, high, p = (0.0, 0.0, 1.0) if mean == 0 else (None, None, 2.0 ** (1 - num_seeds))
    wins, losses = int((d_S > 0).sum()), int((d_S < 0).sum())
    return Paired(
        mean=mean,
        standard_error=standard_error,
        low=low,
        high=high,
        p=p,
        num_seeds=num_seeds if has_seeds else 0,
        wins=wins,
        ties=num_seeds - wins - losses,
        losses=losses,
    )


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p values for their number; where there is none, None stays and does not count.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 1979.
    """
    ascending = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(ascending):
        largest = max(largest, min(1.0, (len(ascending) - rank) * p))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True, eq=False)
class Answers:
    """What one arm answered in one cell.

    Attributes:
        paths: One path per image, each once.
        labels: (n,) int64, the index of each image's class.
        is_correct: (n,) bool.
    """

    paths: Sequence[str]
    labels: np.ndarray
    is_correct: np.ndarray

    @staticmethod
    def of(predictions: Predictions, head: str) -> Answers:
        """Return the answers of a head, ties going to the class with the lower index.

        Raises:
            RunError: There is no such head.
        """
        predicted = predictions.log_probabilities(head).argmax(axis=1)
        return Answers(predictions.paths, predictions.labels, predicted == predictions.labels)


def bootstrap_images(
    cells: Sequence[tuple[Answers, Answers]],
    metric: Literal["mean_per_class", "top1"] = "mean_per_class",
    num_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Return the 95 % percentile interval of `resample_images`, or None where fewer than 20 images were scored."""
    effects_R = resample_images(cells, metric, num_resamples, seed)
    if len({path for _, ce in cells for path in ce.paths}) < MIN_IMAGES:
        return None
    low, high = np.percentile(effects_R, [100 * ALPHA / 2, 100 * (1 - ALPHA / 2)])
    return float(low), float(high)


def resample_images(
    cells: Sequence[tuple[Answers, Answers]],
    metric: Literal["mean_per_class", "top1"] = "mean_per_class",
    num_resamples: int = 2000,
    seed: int = 0,
) -> np.ndarray:
    """Draw test images within classes, with replacement, and return the mean effect over cells on each draw.

    An image is one unit however many cells scored it: where it is drawn twice, it counts twice in every cell. Where
    cells scored different images, a cell's class means are linearised about their values (exact where all scored the
    same).

    Deviations from the mean of n images are enlarged by sqrt(n / (n - 1)), or their variance would be (n - 1) / n of
    what it is: half of it at 2 images a class. And so few images do not know how they vary: a class of which a cell
    scored fewer than 5 draws its deviations from those of all images. Without both, two equally good arms would differ
    "for sure" in one case of seven (LOG.md, 2026-11-26).
    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 8 and 13; on the enlargement,
    Rao and Wu, "Resampling inference with complex survey data", JASA 1988.

    Args:
        cells: (arm, ce) for each seed and number of shots.
        metric: What a cell's effect is the difference in. `mean_per_class` is over the classes that the cell scored.
        num_resamples: R.
        seed: Of the draws.

    Returns:
        (R,) arm - ce.

    Raises:
        RunError: The arms of a cell did not score the same images, or an image has two classes.
    """
    assert cells, "no cells to resample"
    differences = [_paired_by_path(arm, ce) for arm, ce in cells]
    index_of: dict[str, int] = {}
    image_parts = [np.array([index_of.setdefault(path, len(index_of)) for path in ce.paths]) for _, ce in cells]
    label_N = _one_label_each(list(index_of), image_parts, [ce.labels for _, ce in cells])
    effect = 0.0
    weight_N, share_N, deviation_N = (np.zeros(len(label_N)) for _ in range(3))
    fewest_C = np.full(label_N.max() + 1, np.inf)
    for (_, ce), images_n, d_n in zip(cells, image_parts, differences):
        num_C = np.bincount(ce.labels, minlength=len(fewest_C))
        in_cell_C = num_C / num_C.sum() if metric == "top1" else (num_C > 0) / (num_C > 0).sum()
        in_cell_C = in_cell_C / len(cells)
        mean_C = np.bincount(ce.labels, d_n, len(fewest_C)) / np.maximum(num_C, 1)
        effect += float(in_cell_C @ mean_C)
        weight_N[images_n] += (in_cell_C / np.maximum(num_C, 1))[ce.labels]
        # A draw moves the class's mean by the mean over the drawn images of their distance to it.
        unbiased_C = in_cell_C / np.sqrt(np.maximum(num_C * (num_C - 1), 1))
        share_N[images_n] += unbiased_C[ce.labels] * (d_n - mean_C[ce.labels])
        fewest_C = np.where(num_C > 0, np.minimum(fewest_C, num_C), fewest_C)
        deviation_N[images_n] += d_n - d_n.mean()
    deviation_N /= np.bincount(np.concatenate(image_parts))
    deviation_N -= deviation_N.mean()

    rng = np.random.default_rng(seed)
    effects_R = np.full(num_resamples, effect)
    for label, number in zip(*np.unique(label_N, return_counts=True)):
        if fewest_C[label] < MIN_OF_CLASS:
            effects_R += rng.choice(deviation_N, (num_resamples, number)) @ weight_N[label_N == label]
        else:
            # Images of equal share are interchangeable, and there are few different ones: draw how often each comes.
            shares, counts = np.unique(share_N[label_N == label], return_counts=True)
            effects_R += rng.multinomial(number, counts / number, num_resamples) @ shares
    return effects_R


def _one_label_each(
    paths: Sequence[str], image_parts: Sequence[np.ndarray], label_parts: Sequence[np.ndarray]
) -> np.ndarray:
    """Return the label (N,) of every image.

    Raises:
        RunError: An image has two.
    """
    images, labels = np.concatenate(image_parts), np.concatenate(label_parts)
    label_N = np.zeros(len(paths), dtype=np.int64)
    label_N[images] = labels
    if (label_N[images] != labels).any():
        path = paths[int(images[(label_N[images] != labels).argmax()])]
        raise RunError(f"`{path}` has different classes in different runs; compare runs on the same data.")
    return label_N


def _paired_by_path(arm: Answers, ce: Answers) -> np.ndarray:
    """Return (n,) is_correct of the arm - that of ce: -1, 0 or 1, in ce's order."""
    row_of = {path: row for row, path in enumerate(arm.paths)}
    others = sorted(row_of.keys() ^ set(ce.paths))
    if others:
        raise RunError(
            f"The arm and `ce` were not scored on the same images: {len(others)} have predictions of one alone, "
            f"{listing([f'`{path}`' for path in others], 3)}; compare runs on the same data and split."
        )
    assert len(arm.paths) == len(ce.paths) == len(row_of) > 0, "an image was scored twice, or none was"
    rows = np.array([row_of[path] for path in ce.paths], dtype=np.int64)
    if (arm.labels[rows] != ce.labels).any():
        path = ce.paths[int((arm.labels[rows] != ce.labels).argmax())]
        raise RunError(f"`{path}` has one class for the arm and another for `ce`; compare runs on the same data.")
    return arm.is_correct[rows].astype(np.float64) - ce.is_correct


def standard_error(right_C: np.ndarray, num_C: np.ndarray) -> float:
    """Return that of a mean per class accuracy, to which a class of few images adds the more.

    Each class is given one more success and one more failure (after Agresti and Coull 1998): two images say little.

    Args:
        right_C: How many images of each class were classified rightly.
        num_C: How many there were; classes without any do not count.
    """
    right, number = right_C[num_C > 0], num_C[num_C > 0]
    share = (right + 1) / (number + 2)
    return float(np.sqrt((share * (1 - share) / number).sum()) / len(number))


def sentence(
    subject: str,
    effect: Effect,
    credit: Mapping[str, float] | None = None,
    controls: Mapping[str, Effect] | None = None,
    scope: str = "",
) -> str:
    """Say in one sentence what came out.

    Args:
        subject: What the arm has and `ce` has not: "text supervision", "`label_smoothing`".
        effect: The arm against `ce`.
        credit: Part ("the text prior") to its share of the mean, a fraction like the mean itself.
        controls: What takes the names' meaning away ("`tes@random-text`") to the effect with them over that; said of
            where something helped.
        scope: What the interval is about, where seeds do not draw independently.
    """
    points, seeds = _points(effect.mean), _seeds(effect.num_seeds)
    said = {
        "helped": f"{subject} helped by {points} points",
        "hurt": f"{subject} hurt by {points} points",
        "no evidence": f"no evidence that {subject} helped: {points} points",
    }[effect.verdict]
    over_images = (effect.bootstrap_low, effect.bootstrap_high)
    shown, name = (
        ((effect.low, effect.high), "95 % CI") if effect.low is not None else (over_images, "95 % CI over images")
    )
    clauses = [f"{said} ({name} {_range(shown)}, {seeds})" if None not in shown else f"{said} ({seeds})"]
    if credit:
        (first, share), *rest = credit.items()
        parts = [f"{_points(share)} of it from {first}", *(f"{_points(share)} from {part}" for part, share in rest)]
        clauses.append(", ".join(parts))
    if controls and effect.verdict == "helped":
        clauses += _against_controls(controls)
    if effect.has_too_few_seeds:
        verb = "is" if effect.num_seeds == 1 else "are"
        clauses.append(f"{seeds} {verb} too few to judge, run it with `--seeds {ADVISED_SEEDS}`")
    elif effect.verdict == "no evidence":
        if None in over_images:
            clauses.append(f"fewer than {MIN_IMAGES} images were scored, so that chance cannot be told")
        elif shown[0] * shown[1] > 0:  # the interval shown excludes 0: say what is missing
            if effect.seeds_agree:
                clauses.append(f"over images the interval is {_range(over_images)}")
            elif effect.p_holm is not None:
                clauses.append(f"p = {effect.p_holm:.3f} after Holm's correction")
    if scope and effect.low is not None:
        clauses.append(scope)
    return "; ".join(clauses)


def _against_controls(controls: Mapping[str, Effect]) -> list[str]:
    """Say whether more helped than what each control leaves; one clause for those that say the same."""
    said: dict[str, list[str]] = {}
    for name, difference in controls.items():
        over_seeds = (difference.low, difference.high)
        low, high = over_seeds if None not in over_seeds else (difference.bootstrap_low, difference.bootstrap_high)
        if low is None or high is None:
            meaning, shown = (
                "whether the names' meaning counts cannot be told from",
                f"{_points(difference.mean)}, one run",
            )
        else:
            meaning = (
                "the names' meaning counts, against" if low > 0 else "the names' meaning is not shown to count, against"
            )
            shown = f"{_points(difference.mean)}, 95 % CI {_range((low, high))}"
        said.setdefault(meaning, []).append(f"{name} ({shown})")
    return [f"{meaning} {' and '.join(names)}" for meaning, names in said.items()]


def judged(low: float, high: float) -> str:
    """Say what the ends of one draw's interval allow to say; an effect over seeds has a `verdict` of its own."""
    return "better here" if low > 0 else "worse here" if high < 0 else "no difference that these images can show"


def _points(fraction: float) -> str:
    """Return "+2.1", "-0.3" or "0.0"."""
    points = round(100 * fraction, 1)
    return f"{points:+.1f}" if points else "0.0"


def _range(interval: tuple[float, float]) -> str:
    return " to ".join(_points(end).lstrip("+") for end in interval)


def _seeds(num_seeds: int) -> str:
    return {0: "one run", 1: "1 seed"}.get(num_seeds, f"{num_seeds} seeds")
