"""Co-Tuning: the relationship against loops and scikit-learn's regression, the loss against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from tes.errors import ConfigError
from tes.models.backbone import SourceHead
from tes.objectives import co_tuning, objectives
from tes.objectives.base import ModelOutput, ObjectiveContext
from tes.objectives.co_tuning import held_out, learn_relationship

N, C, S, F = 60, 4, 6, 5


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def images(num: int = N, seed: int = 0):
    """Features around a centre per class, labels, a source head: float64."""
    draw = np.random.default_rng(seed)
    labels = np.arange(num) % C
    features = 2 * draw.normal(size=(C, F))[labels] + draw.normal(size=(num, F))
    return features, labels, draw.normal(size=(S, F)), draw.normal(size=S)


def make(store: dict | None = None, num: int = N, **settings):
    features, labels, weight, bias = images(num)
    part = objectives.get("co_tuning")
    objective = part(part.Config(**settings))
    head = SourceHead(torch.from_numpy(weight), torch.from_numpy(bias), None)
    objective.setup(ObjectiveContext(F, C, 0, source_head=head, store={} if store is None else store))
    figures = objective.warm_start(torch.from_numpy(features), torch.eye(C).double()[labels])
    return objective, figures


def source_predictions(num: int = N):
    features, labels, weight, bias = images(num)
    return softmax((features @ weight.T + bias) / 1.13), labels


def test_the_direct_relationship_is_the_mean_source_prediction_of_each_class():
    objective, figures = make(relationship="direct")
    p, labels = source_predictions()
    for c in range(C):
        rows = [p[i] for i in range(N) if labels[i] == c]
        np.testing.assert_allclose(objective.relationship_CS[c].numpy(), sum(rows) / len(rows), rtol=1e-10)
    assert figures == {"num_held_out": 0}


def test_the_reverse_relationship_is_scikit_learns_regression_turned_round_by_bayes(monkeypatch):
    monkeypatch.setattr(co_tuning, "INVERSE_PENALTIES", (0.1, 1.0, 10.0))
    p, labels = source_predictions(200)
    found, figures = learn_relationship(torch.from_numpy(p), torch.eye(C).double()[labels], None)
    penalty = figures["inverse_penalty"]
    weight = LogisticRegression(C=penalty, fit_intercept=False, tol=1e-8, max_iter=1000).fit(p, labels).coef_
    marginal = p.mean(axis=0)
    expected = np.zeros((C, S))
    for s in range(S):
        given_s = softmax(figures["scale"] * weight[:, s])
        for c in range(C):
            expected[c, s] = given_s[c] * marginal[s]
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-3, atol=1e-6)
    assert figures["num_held_out"] == 40


def test_the_penalty_and_the_scale_are_the_best_of_the_held_out_images(monkeypatch):
    monkeypatch.setattr(co_tuning, "INVERSE_PENALTIES", (0.1, 1.0, 10.0))
    p, labels = source_predictions(200)
    target = torch.eye(C).double()[labels]
    _, figures = learn_relationship(torch.from_numpy(p), target, "reverse")
    out = held_out(target).numpy()
    scores = {}
    for penalty in (0.1, 1.0, 10.0):
        model = LogisticRegression(C=penalty, fit_intercept=False, tol=1e-8, max_iter=1000).fit(p[~out], labels[~out])
        logits = p[out] @ model.coef_.T
        for scale in np.exp(np.linspace(-2, 4, 200)):
            scores[penalty, scale] = -np.log(softmax(scale * logits)[np.arange(out.sum()), labels[out]]).mean()
    assert figures["held_out_nll"] == pytest.approx(min(scores.values()), abs=1e-3)
    assert figures["inverse_penalty"] == min(scores, key=scores.get)[0]


def test_every_class_keeps_an_image_and_a_class_of_one_holds_none_out():
    labels = np.array([0, 1, 1, 2, 2, 2, 2, 2, 2, 3])
    out = held_out(torch.eye(C)[labels]).numpy()
    assert [int(out[labels == c].sum()) for c in range(C)] == [0, 1, 2, 0]


@pytest.mark.parametrize("num", [C, 2 * C, 5 * C])
def test_with_too_few_images_the_direct_approach_is_taken_and_reverse_refused(num):
    assert make(num=num)[1] == {"num_held_out": 0}
    assert torch.equal(make(num=num)[0].relationship_CS, make(num=num, relationship="direct")[0].relationship_CS)
    with pytest.raises(ConfigError, match="reverse` chooses a penalty on held-out training images"):
        make(num=num, relationship="reverse")


def test_the_loss_and_its_gradients_equal_an_independent_float64_formula():
    objective, _ = make(source_loss_weight=0.7)
    draw = np.random.default_rng(3)
    features, logits, labels = draw.normal(size=(7, F)), draw.normal(size=(7, C)), draw.integers(C, size=7)
    f, v = (torch.from_numpy(x).requires_grad_() for x in (features, logits))
    loss = sum(objective.losses(ModelOutput(f, v), torch.eye(C).double()[labels]).values())
    loss.backward()
    _, _, weight, bias = images()
    p, aim = softmax(features @ weight.T + bias), objective.relationship_CS.numpy()[labels]
    expected = -np.log(softmax(logits)[np.arange(7), labels]).mean() - 0.7 * (aim * np.log(p)).sum(axis=1).mean()
    d_source = 0.7 * (p - aim) / 7
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    np.testing.assert_allclose(f.grad.numpy(), d_source @ weight, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(objective.source_weight_SF.grad.numpy(), d_source.T @ features, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(objective.source_bias_S.grad.numpy(), d_source.sum(axis=0), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("labels", [[0, 1], [2, 2], [0, 1, 1, 3, 3, 3]])
def test_bf16_features_and_tiny_batches_stay_finite(labels):
    objective, _ = make()
    objective.float()
    f = torch.randn(len(labels), F).bfloat16().requires_grad_()
    loss = sum(objective.losses(ModelOutput(f, torch.zeros(len(labels), C)), torch.eye(C)[labels]).values())
    loss.backward()
    assert loss.isfinite() and f.grad.isfinite().all()


def test_the_relationship_is_learned_once_for_all_that_share_a_store(monkeypatch):
    store: dict = {}
    first, figures = make(store)
    monkeypatch.setattr(co_tuning, "learn_relationship", None)  # to learn it again would fail
    again, same = make(store, source_loss_weight=1.0)
    assert torch.equal(first.relationship_CS, again.relationship_CS) and figures == same
    with pytest.raises(TypeError):
        make(store, source_temperature=2.0)
