"""The text prior: rows predicted from names, against the formula written out, and the controls held against it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tes.engine import prior
from tes.engine.prior import predict_rows
from tes.text.controls import derangement


def material(num_source: int = 12, num_classes: int = 5, num_dimensions: int = 7, num_features: int = 9):
    draw = np.random.default_rng(0)
    source, target = draw.normal(size=(num_source, num_dimensions)), draw.normal(size=(num_classes, num_dimensions))
    weight = 4 * draw.normal(size=(num_source, num_features)) + 1
    return [torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True)) for rows in (target, source)] + [
        torch.from_numpy(weight)
    ]


def test_the_rows_are_those_of_the_kernel_regression():
    target, source, weight = material()
    rows = predict_rows(target, source, weight, gamma=5.0, rho=0.03).numpy()
    mean = source.numpy().mean(axis=0)
    a = [row / np.sqrt(row @ row) for row in source.numpy() - mean]
    b = [row / np.sqrt(row @ row) for row in target.numpy() - mean]
    w = weight.numpy() - weight.numpy().mean(axis=0)
    w = w / np.mean([np.sqrt(row @ row) for row in w])
    inner = np.array([[np.exp(5 * (p @ q - 1)) for q in a] for p in a]) + 0.03 * np.eye(len(a))
    outer = np.array([[np.exp(5 * (p @ q - 1)) for q in a] for p in b])
    expected = outer @ np.linalg.inv(inner) @ w
    expected = expected - expected.mean(axis=0)
    expected = np.array([row / np.sqrt(row @ row) for row in expected])
    np.testing.assert_allclose(rows, expected, rtol=1e-8, atol=1e-10)


def test_a_name_of_the_source_gets_nearly_its_own_row_back():
    _, source, weight = material()
    rows = predict_rows(source, source, weight, gamma=5.0, rho=1e-6)
    own = weight - weight.mean(dim=0)
    assert torch.nn.functional.cosine_similarity(rows, own).min() > 0.999


def test_equal_names_give_rows_that_say_nothing():
    target, source, weight = material()
    assert torch.equal(predict_rows(target[:1].expand(5, -1), source, weight, 5.0, 0.03), torch.zeros(5, 9).double())


def test_lookup_copies_the_nearest_source_row():
    _, source, weight = material()
    rows = predict_rows(source[[3, 1, 8]], source, weight, 5.0, 0.03, control="lookup")
    own = (weight - weight.mean(dim=0))[[3, 1, 8]]
    own = own - own.mean(dim=0)
    assert torch.allclose(rows, own / own.norm(dim=1, keepdim=True))


def test_permuted_gives_every_class_the_row_of_another():
    target, source, weight = material()
    own = predict_rows(target, source, weight, 5.0, 0.03)
    moved = predict_rows(target, source, weight, 5.0, 0.03, control="permuted", seed=4)
    same = (moved[:, None] == own[None]).all(dim=2)
    assert same.sum() == 5 and not same.diagonal().any()


@pytest.mark.parametrize("number", [2, 3, 10, 101])
def test_a_derangement_has_no_fixed_point_and_comes_from_its_seed(number):
    order = derangement(number, 0)
    assert sorted(order) == list(range(number)) and (order != np.arange(number)).all()
    assert (order == derangement(number, 0)).all()


def test_of_very_many_source_classes_the_nearest_to_the_classes_decide(monkeypatch):
    target, source, weight = material(num_source=40)
    full = predict_rows(target, source, weight, 5.0, 0.03)
    monkeypatch.setattr(prior, "MAX_SOURCE", 30)
    few = predict_rows(target, source, weight, 5.0, 0.03)
    assert torch.nn.functional.cosine_similarity(few, full).min() > 0.9
