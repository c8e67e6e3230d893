"""The solved head: the optimum of the stated problem, and the same function after folding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tes.engine.solve import SCALE, HeadProblem, Standardizer


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
