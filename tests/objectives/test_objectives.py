"""The objectives against formulas written out in NumPy, float64, with gradients by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tes.config import load_config
from tes.errors import ConfigError
from tes.models.backbone import SourceHead
from tes.objectives import objectives, text_objective
from tes.objectives.base import ModelOutput, Objective, ObjectiveContext
from tes.objectives.static_text import matching_temperature
from tes.settle import check_needs

B, C, F, D = 6, 5, 7, 4


def settled(name: str, **settings):
    config = objectives.get(name).Config(**settings)
    return config.model_copy(update={key: value for key, (value, _) in config.decide("all").items()})


def make(name: str, text: np.ndarray | None = None, seed: int = 0, **settings):
    part = objectives.get(name)
    objective = part(settled(name, **settings))
    rows = None if text is None else torch.from_numpy(text)
    start = weights() if "trainable_backbone" in part.needs else None
    source = SourceHead(torch.ones(3, F), torch.zeros(3), None) if "source_head" in part.needs else None
    objective.setup(ObjectiveContext(F, C, seed, rows, source, start_weights=start))
    if "pretrained_features" in part.needs:
        features, target, _ = fixed_features()
        objective.warm_start(features, target)
    return objective


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """The weights of a network with two layers and a head, as the learner names them: float64."""
    draw = np.random.default_rng(seed)
    shapes = {"backbone.a.weight": (3, 2, 2), "backbone.a.bias": (3,), "head.weight": (C, F), "head.bias": (C,)}
    return {name: torch.from_numpy(draw.normal(size=shape)) for name, shape in shapes.items()}


def batch(seed: int = 0):
    draw = np.random.default_rng(seed)
    features, logits = draw.normal(size=(B, F)), draw.normal(size=(B, C))
    labels = draw.integers(C, size=B)
    return features, logits, np.eye(C)[labels]


def text_rows(seed: int = 1) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(C, D))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def naive_tes(features, logits, target, text, projection, lambda_v, lambda_t, tau, guess=None):
    """Loss and its gradients with respect to logits, features and the projection, written out."""
    w1, b1, gamma, beta, w2, b2 = projection
    a = features @ w1.T + b1
    mean, var = a.mean(axis=0), a.var(axis=0)
    normal = (a - mean) / np.sqrt(var + 1e-5)
    n = gamma * normal + beta
    r = np.maximum(n, 0)
    z = r @ w2.T + b2
    norm = np.linalg.norm(z, axis=1, keepdims=True)
    u = z / norm
    t = u @ text.T / tau
    q = (1 - lambda_v) * target + lambda_v * (softmax(t) if guess is None else guess)
    vision = text_loss = 0.0
    for i in range(len(features)):
        for c in range(text.shape[0]):
            vision -= q[i, c] * np.log(softmax(logits)[i, c]) / len(features)
            text_loss -= target[i, c] * np.log(softmax(t)[i, c]) / len(features)
    d_logits = (softmax(logits) - q) / len(features)
    d_t = lambda_t * (softmax(t) - target) / len(features)
    d_u = d_t @ text / tau
    d_z = (d_u - u * (u * d_u).sum(axis=1, keepdims=True)) / norm
    d_w2 = d_z.T @ r
    d_n = (d_z @ w2) * (n > 0)
    d_normal = d_n * gamma
    d_a = (d_normal - d_normal.mean(axis=0) - normal * (d_normal * normal).mean(axis=0)) / np.sqrt(var + 1e-5)
    return vision + lambda_t * text_loss, d_logits, d_a @ w1, d_w2, d_a.T @ features


@pytest.mark.parametrize(("lambda_v", "lambda_t", "tau"), [(0.2, 0.4, 0.03), (0.5, 1.0, 0.1), (1.0, 0.3, 0.5)])
def test_loss_and_gradients_equal_an_independent_float64_formula(lambda_v, lambda_t, tau):
    text = text_rows()
    objective = make("tes", text, text_target_weight=lambda_v, text_loss_weight=lambda_t, temperature=tau).double()
    objective.text_head.class_text_CD = torch.from_numpy(text)
    features, logits, target = batch()
    f, v = (torch.from_numpy(x).requires_grad_() for x in (features, logits))
    loss = sum(objective.losses(ModelOutput(f, v), torch.from_numpy(target)).values())
    loss.backward()
    linear1, norm, _, linear2 = objective.text_head.projection
    parameters = [p.detach().numpy() for p in (*linear1.parameters(), *norm.parameters(), *linear2.parameters())]
    expected, d_logits, d_features, d_w2, d_w1 = naive_tes(
        features, logits, target, text, parameters, lambda_v, lambda_t, tau
    )
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    for got, want in ((v, d_logits), (f, d_features), (linear2.weight, d_w2), (linear1.weight, d_w1)):
        np.testing.assert_allclose(got.grad.numpy(), want, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("tau_s", [0.07, 0.6, None])
def test_static_text_has_one_soft_label_per_class_and_is_tes_otherwise(tau_s):
    text = text_rows()
    settings = {"text_target_weight": 0.4, "text_loss_weight": 0.7, "temperature": 0.2}
    objective = make("static_text", text, static_temperature=tau_s, **settings).double()
    objective.text_head.class_text_CD = torch.from_numpy(text)
    objective.soft_CC = torch.from_numpy(softmax(text @ text.T / (tau_s or 0.2)))
    assert np.allclose(make("static_text", text, static_temperature=tau_s, **settings).soft_CC, objective.soft_CC)
    features, logits, target = batch()
    f, v = (torch.from_numpy(x).requires_grad_() for x in (features, logits))
    loss = sum(objective.losses(ModelOutput(f, v), torch.from_numpy(target)).values())
    loss.backward()
    linear1, norm, _, linear2 = objective.text_head.projection
    parameters = [p.detach().numpy() for p in (*linear1.parameters(), *norm.parameters(), *linear2.parameters())]
    guess = np.stack([softmax((row @ text.T / (tau_s or 0.2))[None])[0] for row in text[target.argmax(axis=1)]])
    expected, d_logits, d_features, d_w2, d_w1 = naive_tes(
        features, logits, target, text, parameters, 0.4, 0.7, 0.2, guess
    )
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    for got, want in ((v, d_logits), (f, d_features), (linear2.weight, d_w2), (linear1.weight, d_w1)):
        np.testing.assert_allclose(got.grad.numpy(), want, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("tau", [0.1, 0.3])
def test_the_static_labels_are_as_uncertain_as_those_of_the_fitted_text_head(tau):
    features, target, text = fixed_features(57)  # classes of different size
    objective = on_features("static_text", {}, text, features, target, temperature=tau)
    tes = on_features("tes", {}, text, features, target, temperature=tau)
    figures = objective.fit_features(features, target)
    tes.fit_features(features, target)
    p = softmax(tes.text_head(features).detach().numpy().astype("float64"))
    static = target.numpy() @ softmax((text @ text.T).numpy().astype("float64") / figures["static_temperature"])
    entropies = [-(x * np.log(x)).sum(axis=1).mean() for x in (p, static)]
    assert entropies[0] > 0.01 and entropies[1] == pytest.approx(entropies[0], rel=1e-5)


def test_an_entropy_out_of_reach_clamps_the_temperature():
    rows, share = torch.tensor([[1.0, 0], [1, 0], [0, 1]]), torch.tensor([0.5, 0.5, 0])
    assert matching_temperature(rows, share, 0.1) == pytest.approx(1e-4, rel=1e-6)  # equal rows: log 2 at least
    assert matching_temperature(rows, share, 2.0) == pytest.approx(1e4, rel=1e-6)  # log 3 at most


@pytest.mark.parametrize("tau", [0.03, 0.5])
def test_text_ce_is_the_text_loss_alone_and_predicts_with_the_text_head(tau):
    text = text_rows()
    objective = make("text_ce", text, temperature=tau).double()
    objective.text_head.class_text_CD = torch.from_numpy(text)
    features, logits, target = batch()
    f = torch.from_numpy(features).requires_grad_()
    out = ModelOutput(f, torch.from_numpy(logits))
    losses = objective.losses(out, torch.from_numpy(target))
    losses["text_loss"].backward()
    linear1, norm, _, linear2 = objective.text_head.projection
    parameters = [p.detach().numpy() for p in (*linear1.parameters(), *norm.parameters(), *linear2.parameters())]
    of_tes, _, d_features, d_w2, d_w1 = naive_tes(features, logits, target, text, parameters, 0.0, 1.0, tau)
    of_vision = -np.log(softmax(logits)[target == 1]).mean()
    assert losses.keys() == {"text_loss"}
    assert losses["text_loss"].item() == pytest.approx(of_tes - of_vision, rel=1e-6)
    for got, want in ((f, d_features), (linear2.weight, d_w2), (linear1.weight, d_w1)):
        np.testing.assert_allclose(got.grad.numpy(), want, rtol=1e-6, atol=1e-10)
    assert objective.heads(out).keys() == {"text"} and objective.default_head == "text"


def test_no_gradient_flows_from_the_softened_target_into_the_projection():
    objective = make("tes", text_rows().astype("float32"), text_target_weight=0.5, text_loss_weight=0.0)
    features, logits, target = (torch.from_numpy(x).float() for x in batch())
    features.requires_grad_()
    objective.losses(ModelOutput(features, logits.requires_grad_()), target)["vision_loss"].backward()
    assert logits.grad.abs().sum() > 0
    assert features.grad is None
    assert all(parameter.grad is None for parameter in objective.text_head.projection.parameters())


def test_weights_of_zero_give_plain_cross_entropy_bit_for_bit():
    tes = make("tes", text_rows().astype("float32"), text_target_weight=0.0, text_loss_weight=0.0)
    ce = make("ce")
    features, logits, target = (torch.from_numpy(x).float() for x in batch())
    grads = []
    for objective in (tes, ce):
        v = logits.clone().requires_grad_()
        loss = sum(objective.losses(ModelOutput(features, v), target).values())
        loss.backward()
        grads.append((loss.detach(), v.grad))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])


def test_label_smoothing_equals_pytorchs():
    objective = make("label_smoothing", smoothing=0.1)
    features, logits, target = (torch.from_numpy(x) for x in batch())
    loss = objective.losses(ModelOutput(features, logits), target)["vision_loss"]
    expected = torch.nn.functional.cross_entropy(logits, target.argmax(dim=1), label_smoothing=0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_l2_sp_equals_an_independent_float64_formula():
    objective = make("l2_sp", alpha=0.3, beta=0.07)
    start, live = weights(0), {name: weight.requires_grad_() for name, weight in weights(1).items()}
    features, logits, target = batch()
    v = torch.from_numpy(logits).requires_grad_()
    loss = sum(objective.losses(ModelOutput(torch.from_numpy(features), v, live), torch.from_numpy(target)).values())
    loss.backward()
    moved = {name: live[name].detach().numpy() - start[name].numpy() for name in live if name[0] == "b"}
    expected = -np.log(softmax(logits)[target == 1]).mean()
    expected += 0.15 * sum(float((part**2).sum()) for part in moved.values())
    expected += 0.035 * sum(entry**2 for entry in live["head.weight"].flatten().tolist())
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    for name, part in moved.items():
        np.testing.assert_allclose(live[name].grad.numpy(), 0.3 * part, rtol=1e-6)
    np.testing.assert_allclose(live["head.weight"].grad.numpy(), 0.07 * live["head.weight"].detach().numpy(), rtol=1e-6)
    assert live["head.bias"].grad is None
    np.testing.assert_allclose(v.grad.numpy(), (softmax(logits) - target) / B, rtol=1e-6)


def test_l2_sp_where_it_starts_with_a_head_of_zeros_is_cross_entropy():
    features, logits, target = (torch.from_numpy(x) for x in batch())
    live = weights() | {"head.weight": torch.zeros(C, F)}
    loss = sum(make("l2_sp").losses(ModelOutput(features, logits, live), target).values())
    assert torch.equal(loss, make("ce").losses(ModelOutput(features, logits), target)["vision_loss"])


def test_own_parameters_come_from_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second, other = (make("tes", text_rows(), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.text_head.projection[0].weight, second.text_head.projection[0].weight)
    assert not torch.equal(first.text_head.projection[0].weight, other.text_head.projection[0].weight)


def test_fitting_the_projection_to_features_makes_text_logits_follow_the_labels():
    draw = np.random.default_rng(0)
    labels = np.arange(60) % C
    features = torch.from_numpy(draw.normal(size=(C, F))[labels] + 0.3 * draw.normal(size=(60, F))).float()
    target = torch.nn.functional.one_hot(torch.from_numpy(labels), C).float()
    objective = make("tes", text_rows().astype("float32"), fit_steps=150)
    before = objective.eval().text_head(features).argmax(dim=1)
    figures = objective.fit_features(features, target)
    after = objective.text_head(features).argmax(dim=1)
    accuracy = [(found == torch.from_numpy(labels)).float().mean().item() for found in (before, after)]
    assert accuracy[0] < 0.6 < 0.9 < accuracy[1]
    reference = objective.reference(ModelOutput(features, features), target)
    expected = -reference[torch.arange(60), torch.from_numpy(labels)].log().mean().item()
    assert figures["kl_label_to_reference"] == pytest.approx(expected, rel=1e-4)


def test_permuted_rows_give_every_class_anothers_row_by_the_seed():
    text = text_rows().astype("float32")
    for seed in range(20):
        one, same = (make("tes", text, seed=seed, text_rows="permuted").rows_CD for _ in range(2))
        assert torch.equal(one, same)
        distance = (one[:, None] - torch.from_numpy(text)[None]).abs().sum(dim=2)
        origin = distance.argmin(dim=1)
        assert torch.equal(distance.min(dim=1).values, torch.zeros(C)) and sorted(origin.tolist()) == list(range(C))
        assert not (origin == torch.arange(C)).any()


def test_random_rows_are_unit_vectors_by_the_seed_and_know_nothing_of_the_text():
    text = text_rows().astype("float32")
    first, same, other = (make("tes", text, seed=seed, text_rows="random").rows_CD for seed in (0, 0, 1))
    elsewhere = make("tes", text[::-1].copy(), seed=0, text_rows="random").rows_CD
    assert torch.equal(first, same) and torch.equal(first, elsewhere) and not torch.equal(first, other)
    assert torch.allclose(first.norm(dim=1), torch.ones(C)) and first.shape == text.shape


def test_the_controls_are_presets_of_tes():
    def settings(preset):
        return load_config(flags={"data.source": "x", "objective": f"tes@{preset}"}).objective.model_dump()

    plain = load_config(flags={"data.source": "x", "objective": "tes"}).objective.model_dump()
    for preset, changed in {
        "permuted-text": {"text_rows": "permuted"},
        "random-text": {"text_rows": "random"},
        "no-vision-target": {"text_target_weight": 0},
        "frozen-projection": {"train_projection": False, "text_loss_weight": 0},
    }.items():
        assert settings(preset) == plain | changed | {"preset": preset}


def test_a_frozen_projection_has_no_gradient_and_stays_in_eval_mode():
    features, target, text = fixed_features()
    objective = on_features("tes", {}, text, features, target, train_projection=False, warm_projection=False)
    objective.warm_start(features, target)
    before = {name: tensor.clone() for name, tensor in objective.text_head.state_dict().items()}
    objective.train()
    features, logits = features.clone().requires_grad_(), torch.randn(60, C, requires_grad=True)
    sum(objective.losses(ModelOutput(features, logits), target).values()).backward()
    assert objective.training and not any(module.training for module in objective.text_head.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in objective.text_head.state_dict().items())
    assert all(parameter.grad is None for parameter in objective.parameters())
    assert logits.grad.abs().sum() > 0


def fixed_features(num_images: int = 60):
    """Features around a centre per class, one-hot targets, text rows: float32."""
    draw = np.random.default_rng(0)
    labels = np.arange(num_images) % C
    features = draw.normal(size=(C, F))[labels] + 0.3 * draw.normal(size=(num_images, F))
    return (torch.from_numpy(x.astype("float32")) for x in (features, np.eye(C)[labels], text_rows()))


def on_features(name: str, store: dict, text, features, target, seed: int = 0, **settings):
    part = objectives.get(name)
    objective = part(settled(name, **settings))
    context = ObjectiveContext(F, C, seed, text, features_NF=features, target_NC=target, store=store)
    objective.setup(context)
    return objective


def test_the_fit_of_h_leaves_no_gradient_behind_for_the_first_step_to_add_to():
    features, target, text = fixed_features()
    objective = on_features("tes", {}, text, features, target)
    objective.warm_start(features, target)
    assert all(parameter.grad is None for parameter in objective.parameters())


def test_h_is_fitted_once_for_all_that_share_a_store(monkeypatch):
    features, target, text = fixed_features()
    store: dict = {}
    first = on_features("tes", store, text, features, target)
    first.fit_features(features, target)
    assert len(store) == 1
    monkeypatch.setattr(text_objective, "fit_text_head", None)  # to fit again would fail
    for name in ("tes", "text_ce"):
        again = on_features(name, store, text.clone(), features.clone(), target.clone())
        again.warm_start(features.clone(), target.clone())
        expected = first.text_head.state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in again.text_head.state_dict().items())
        assert not again.text_head.training


@pytest.mark.parametrize("changed", ["features", "target", "text", "seed", "temperature", "fit_steps", "fit_penalty"])
def test_h_is_fitted_anew_to_anything_else(changed):
    features, target, text = fixed_features()
    store: dict = {}
    on_features("tes", store, text, features, target).fit_features(features, target)
    settings = {"temperature": 0.2, "fit_steps": 3, "fit_penalty": 0.2, "seed": 1}
    features = features + 1e-3 if changed == "features" else features
    target = target.roll(1, dims=1) if changed == "target" else target
    text = text.flip(0) if changed == "text" else text
    other = on_features("tes", store, text, features, target, **{k: v for k, v in settings.items() if k == changed})
    other.fit_features(features, target)
    assert len(store) == 2


@pytest.mark.parametrize("name", objectives.names())
def test_what_a_search_draws_for_an_objective_are_settings_of_its_own(name):
    config = objectives.get(name).Config
    for key, range_ in config.search.items():
        field = key.removeprefix("objective.")
        default = getattr(settled(name), field)
        assert range_.low <= default <= range_.high and (range_.low > 0 or not range_.log)
        assert all(config(**{field: value}) for value in (range_.low, range_.high))


@pytest.mark.parametrize("name", objectives.names())
def test_every_objective_keeps_the_contract(name):
    text = text_rows().astype("float32") if "class_text" in objectives.get(name).needs else None
    objective = make(name, text)
    features, logits, target = (torch.from_numpy(x).float() for x in batch())
    live = {key: w.float() for key, w in weights().items()} if "trainable_backbone" in objective.needs else None
    keys = features.flip(1) if "two_views" in objective.needs else None
    out = ModelOutput(features.requires_grad_(), logits.requires_grad_(), live, keys)
    losses = objective.losses(out, target)
    assert all(torch.isfinite(loss) and loss.ndim == 0 for loss in losses.values())
    sum(losses.values()).backward()
    objective.after_step()
    assert (logits if objective.default_head == "vision" else features).grad.abs().sum() > 0
    reference = objective.reference(out, target)
    assert torch.allclose(reference.sum(dim=1), torch.ones(B)) and not reference.requires_grad
    assert objective.default_head in objective.heads(out)
    assert all(head.shape == (B, C) for head in objective.heads(out).values())


@pytest.mark.parametrize("name", objectives.names())
def test_class_weights_multiply_each_examples_cross_entropies_by_its_labels_weight(name):
    def losses(weight_C):
        objective = make(name, text_rows()).double()
        objective.class_weight_C = None if weight_C is None else torch.as_tensor(weight_C, dtype=torch.float64)
        features, logits, target = (torch.from_numpy(part) for part in batch())
        keys = features.flip(1) if "two_views" in objective.needs else None
        return objective.losses(ModelOutput(features, logits, weights(), keys), target)

    weight_C = np.linspace(0.5, 2, C)
    plain, ones, weighted = losses(None), losses(np.ones(C)), losses(weight_C)
    parts = [losses(row) for row in np.eye(C)]
    cross_entropies = {"vision_loss", "text_loss", "source_loss"} & plain.keys()
    assert cross_entropies
    for loss in cross_entropies:
        assert ones[loss].item() == pytest.approx(plain[loss].item())
        expected = sum(weight * part[loss].item() for weight, part in zip(weight_C, parts))
        assert weighted[loss].item() == pytest.approx(expected)
        assert weighted[loss].item() != pytest.approx(plain[loss].item()) or plain[loss].item() == 0


def test_an_unknown_objective_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="Did you mean `tes`"):
        objectives.get("tess")


@pytest.mark.parametrize("name", objectives.names())
def test_the_loss_of_a_mixed_target_is_the_mixture_of_the_losses(name):
    """Every loss is a cross-entropy to what is affine in the target, so that mixup's two forms are one."""
    if "two_views" in objectives.get(name).needs:
        pytest.skip("refuses mixed images")
    objective = make(name, text_rows()).double()
    features, logits, one = (torch.from_numpy(part) for part in batch())
    other, out = one.roll(1, 0), ModelOutput(features, logits, weights())
    share = 0.3
    got, first, second = (objective.losses(out, y) for y in (share * one + (1 - share) * other, one, other))
    assert not torch.equal(one, other)
    for loss in got:
        assert got[loss].item() == pytest.approx((share * first[loss] + (1 - share) * second[loss]).item(), rel=1e-6)


def test_an_objective_that_asks_for_what_nobody_brings_is_refused_where_it_is_defined():
    with pytest.raises(ConfigError, match="time is none of class_text"):
        type("Patient", (Objective,), {"needs": frozenset({"time"})})
    with pytest.raises(ConfigError, match="`audio` is none of vision, text"):
        type("Heard", (Objective,), {"default_head": "audio"})
    taught = type("Taught", (Objective,), {"needs": frozenset({"frozen_teacher"})})
    with pytest.raises(ConfigError, match="needs a frozen teacher"):
        check_needs(load_config(flags={"data.source": "photos"}), taught)
