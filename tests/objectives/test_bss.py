"""Batch spectral shrinkage against NumPy's singular value decomposition, and where it could break."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tes.objectives import objectives
from tes.objectives.base import ModelOutput

C = 4


def losses(features: torch.Tensor, **settings):
    part = objectives.get("bss")
    logits = torch.zeros(len(features), C, dtype=features.dtype)
    target = torch.eye(C)[torch.arange(len(features)) % C]
    return part(part.Config(**settings)).losses(ModelOutput(features, logits), target)


@pytest.mark.parametrize(("shape", "k"), [((6, 9), 1), ((9, 6), 3), ((5, 8), 50)])
def test_the_penalty_and_its_gradient_equal_numpys_decomposition(shape, k):
    features = np.random.default_rng(0).normal(size=shape)
    u, sigma, vt = np.linalg.svd(features, full_matrices=False)
    f = torch.from_numpy(features).requires_grad_()
    found = losses(f, eta=0.3, num_values=k)
    sum(found.values()).backward()
    smallest = np.argsort(sigma)[:k]
    assert found["spectral_loss"].item() == pytest.approx(0.3 * (sigma[smallest] ** 2).sum(), rel=1e-10)
    assert found["vision_loss"].item() == pytest.approx(np.log(C))
    expected = sum(0.3 * 2 * sigma[i] * np.outer(u[:, i], vt[i]) for i in smallest)
    np.testing.assert_allclose(f.grad.numpy(), expected, rtol=1e-8, atol=1e-12)


def test_a_singular_value_far_below_the_largest_keeps_its_digits_in_float32():
    draw = np.random.default_rng(1)
    (u, _), (v, _) = (np.linalg.qr(draw.normal(size=(n, 5))) for n in (5, 20))
    features = torch.from_numpy((u * [100.0, 50, 10, 1, 0.01]) @ v.T).float()
    assert losses(features, eta=1.0)["spectral_loss"].item() == pytest.approx(1e-4, rel=0.02)


@pytest.mark.parametrize(
    "features",
    [
        torch.ones(6, 8), torch.zeros(6, 8), torch.eye(6, 8), torch.randn(2, 8), torch.ones(2, 8),
        torch.randn(6, 8).bfloat16(),
    ],
    ids=["one direction", "all zero", "all equal values", "two images", "two equal images", "bf16"],
)  # fmt: skip
def test_loss_and_gradient_stay_finite(features):
    f = features.clone().requires_grad_()
    loss = sum(losses(f, num_values=2).values())
    loss.backward()
    assert loss.isfinite() and f.grad.isfinite().all()


def test_features_that_are_not_finite_give_a_loss_that_is_not_and_no_other_error():
    features = torch.randn(6, 8)
    features[2, 3] = torch.inf
    loss = losses(features.requires_grad_())["spectral_loss"]
    loss.backward()
    assert not loss.isfinite()
