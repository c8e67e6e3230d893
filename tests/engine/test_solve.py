"""The solved head: the optimum of the stated problem, and the same function after folding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tes.engine.solve import SCALE, HeadProblem, Prior, Standardizer


def problem(num_images: int, num_features: int, num_classes: int, seed: int = 0):
    draw = np.random.default_rng(seed)
    labels = np.arange(num_images) % num_classes
    centres = draw.normal(size=(num_classes, num_features))
    features = 3 + 2 * (centres[labels] + draw.normal(size=(num_images, num_features)))
    soft = 0.9 * np.eye(num_classes)[labels] + 0.1 * draw.dirichlet(np.ones(num_classes), size=num_images)
    return torch.from_numpy(features).float(), torch.from_numpy(soft)


@pytest.mark.parametrize("shape", [(60, 8, 4), (12, 40, 4)], ids=["more images than features", "fewer"])
def test_the_gradient_of_the_stated_problem_vanishes_at_the_solution(shape):
    features, soft = problem(*shape)
    penalty = 0.3
    head = HeadProblem(penalty).solve(features, soft).head
    # Undo the folding, and take the gradient of (1/N) Σ CE + (penalty/N) ‖V‖² in NumPy.
    x = features.double().numpy()
    mean = x.mean(axis=0)
    radius = np.linalg.norm(x - mean, axis=1).mean()
    x = SCALE * (x - mean) / radius
    v = head.weight_CF.double().numpy() * radius / SCALE
    b = head.bias_C.double().numpy() + head.weight_CF.double().numpy() @ mean
    z = x @ v.T + b
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    residual = (p - soft.numpy()) / len(x)
    assert np.abs(residual.T @ x + 2 * penalty / len(x) * v).max() < 2e-5
    assert np.abs(residual.sum(axis=0)).max() < 2e-6


def test_hard_targets_agree_with_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, _ = problem(80, 6, 4)
    labels = np.arange(80) % 4
    target = torch.nn.functional.one_hot(torch.from_numpy(labels), 4).double()
    head = HeadProblem(0.3).solve(features, target).head
    x = Standardizer.fit(features)(features).numpy()
    # scikit-learn minimises C Σ CE + ½ ‖V‖²: C = 1 / (2 · penalty).
    other = linear_model.LogisticRegression(C=1 / 0.6, tol=1e-10, max_iter=10000).fit(x, labels)
    got = head.logits(features).double().softmax(dim=1).numpy()
    np.testing.assert_allclose(got, other.predict_proba(x), atol=2e-4)


@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_class_weights_agree_with_scikit_learn_and_their_scale_does_not_matter(scale):
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, _ = problem(80, 6, 3)
    labels = np.repeat(np.arange(3), (60, 15, 5))
    target = torch.nn.functional.one_hot(torch.from_numpy(labels), 3).double()
    weights = 80 / (3 * np.array([60, 15, 5]))
    weighted = HeadProblem(0.3, class_weight_C=torch.from_numpy(scale * weights))
    head = weighted.solve(features, target).head
    x = Standardizer.fit(features)(features).numpy()
    other = linear_model.LogisticRegression(C=1 / 0.6, class_weight="balanced", tol=1e-10, max_iter=10000)
    got = head.logits(features).double().softmax(dim=1).numpy()
    np.testing.assert_allclose(got, other.fit(x, labels).predict_proba(x), atol=2e-4)
    scaled = weighted.solve(features, target, target).head  # the best scale of the minimum is 1, by the same weights
    assert torch.allclose(scaled.weight_CF, head.weight_CF, rtol=1e-2, atol=1e-3)


def test_the_folded_head_gives_the_logits_of_the_unfolded_one():
    features, _ = problem(50, 10, 3)
    standardize = Standardizer.fit(features)
    draw = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(3, 10, generator=draw, dtype=torch.double), torch.randn(3, generator=draw).double()
    unfolded = standardize(features) @ weight.T + bias
    folded = standardize.fold(weight, bias).logits(features)
    assert (folded.double() - unfolded).abs().max() < 1e-5 * max(1.0, unfolded.abs().max().item())


def test_the_same_problem_gives_the_same_bytes():
    features, soft = problem(30, 50, 4)
    first, second = (HeadProblem(0.3).solve(features, soft).head for _ in range(2))
    assert torch.equal(first.weight_CF, second.weight_CF) and torch.equal(first.bias_C, second.bias_C)


def unit_rows(num_classes: int, num_features: int) -> torch.Tensor:
    rows = torch.randn(num_classes, num_features, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("shape", [(60, 8, 4), (12, 40, 4)], ids=["more images than features", "fewer"])
@pytest.mark.parametrize("form", ["joint", "per_class"])
def test_trust_in_a_prior_minimises_the_stated_problem(shape, form):
    features, soft = problem(*shape)
    num_images, num_classes, penalty, kappa = shape[0], shape[2], 0.3, 0.2
    rows = unit_rows(num_classes, shape[1])
    solved = HeadProblem(penalty, Prior(rows, form, kappa)).solve(features, soft, tolerance=1e-8)
    # The stated objective in NumPy, as a function of α, V and b: no small step may lower it.
    standardize = Standardizer.fit(features)
    x, p = standardize(features).numpy(), rows.numpy()
    alpha = solved.trust_C.double().numpy()
    w = solved.head.weight_CF.double().numpy() * float(standardize.radius) / SCALE
    b = solved.head.bias_C.double().numpy() + solved.head.weight_CF.double().numpy() @ standardize.mean_F.numpy()
    v = w - alpha[:, None] * p

    def value(alpha, v, b):
        z = x @ (alpha[:, None] * p + v).T + b
        fit = -(soft.numpy() * (z - np.logaddexp.reduce(z, axis=1, keepdims=True))).sum(axis=1).mean()
        mean = best_common(alpha)
        cost = kappa * (((alpha - mean) ** 2).sum() / num_classes + mean**2)
        return fit + penalty * ((v**2).sum() / num_images + cost)

    def best_common(alpha):
        # joint: α is one number. per class: given α, the ᾱ that costs least minimises Σ (α_c - ᾱ)² + C ᾱ².
        return alpha.mean() if form == "joint" else alpha.mean() / 2

    at_solution = value(alpha, v, b)
    draw = np.random.default_rng(1)
    for size in (1e-2, 1e-3):
        for _ in range(30):
            step = draw.normal(size=num_classes) if form == "per_class" else np.full(num_classes, draw.normal())
            moved = value(alpha + size * step, v, b)
            moved_v = value(alpha, v + size * draw.normal(size=v.shape), b)
            moved_b = value(alpha, v, b + size * draw.normal(size=b.shape))
            assert min(moved, moved_v, moved_b) > at_solution - 1e-7
    if form == "joint":
        assert np.ptp(alpha) == 0


@pytest.mark.parametrize("form", [None, "joint", "per_class"])
def test_a_softer_reference_sets_the_direction_and_the_labels_set_the_scale(form):
    features, soft = problem(60, 8, 4)
    hard = torch.nn.functional.one_hot(torch.arange(60) % 4, 4).double()
    rows = unit_rows(4, 8)
    solver = HeadProblem(0.3, None if form is None else Prior(rows, form, 0.2))
    plain, scaled = solver.solve(features, soft), solver.solve(features, soft, hard)
    ratio = scaled.head.weight_CF / plain.head.weight_CF
    assert ratio.mean() > 1.01, "a softened target makes a head too doubtful"
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=0)
    # The stated problem for the labels in NumPy, along the ray through the head: it is lowest at the head itself.
    standardize = Standardizer.fit(features)
    alpha = np.zeros(4) if form is None else scaled.trust_C.double().numpy()
    whole = scaled.head.weight_CF.double().numpy() * float(standardize.radius) / SCALE
    v = whole - alpha[:, None] * rows.numpy()
    logits = scaled.head.logits(features).double().numpy()
    common = alpha.mean() if form == "joint" else alpha.mean() / 2
    price = 0.3 * ((v**2).sum() / 60 + 0.2 * (((alpha - common) ** 2).mean() + common**2))

    def cost(scale):
        z = scale * logits
        fit = -(hard.numpy() * (z - np.logaddexp.reduce(z, axis=1, keepdims=True))).sum(axis=1).mean()
        return fit + scale**2 * price

    assert cost(1) < min(cost(0.99), cost(1.01))


def test_a_start_without_corrections_keeps_the_priors_directions():
    features, soft = problem(60, 8, 4)
    rows = unit_rows(4, 8)
    solved = HeadProblem(0.3, Prior(rows, "per_class"), corrects=False).solve(features, soft)
    cosines = torch.nn.functional.cosine_similarity(solved.head.weight_CF.double(), rows).abs()
    assert torch.allclose(cosines, torch.ones(4).double(), atol=1e-6)


def test_without_a_label_the_prior_is_the_head():
    pool, _ = problem(30, 8, 4)
    rows = unit_rows(4, 8)
    solved = HeadProblem(0.3, Prior(rows, zero_shot_trust=0.7)).without_labels(pool)
    expected = 0.7 * Standardizer.fit(pool)(pool) @ rows.T
    assert torch.allclose(solved.head.logits(pool).double(), expected, atol=1e-4)
    assert torch.equal(solved.trust_C, torch.full((4,), 0.7))


def test_a_prior_that_is_right_is_trusted_and_one_that_is_wrong_is_not():
    features, soft = problem(40, 30, 4)
    truth = HeadProblem(0.3).solve(*problem(400, 30, 4)).head.weight_CF.double()
    truth = torch.nn.functional.normalize(truth - truth.mean(dim=0), dim=1)
    right = HeadProblem(0.3, Prior(truth)).solve(features, soft).trust_C.mean()
    wrong = HeadProblem(0.3, Prior(unit_rows(4, 30))).solve(features, soft).trust_C.mean()
    assert right > 2 * wrong.abs()
