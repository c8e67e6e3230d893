"""Bi-tuning against loops over lists of keys, over several steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tes.objectives import objectives
from tes.objectives.base import ModelOutput, ObjectiveContext

C, F, P = 5, 6, 3
BATCHES = ([0, 1, 1, 1, 2], [1, 1], [3, 3, 3, 3, 3], [0, 2, 1, 3, 4], [4, 1, 1, 0, 2])


def make(**settings):
    part = objectives.get("bi_tuning")
    objective = part(part.Config(projection_dim=P, **settings))
    objective.setup(ObjectiveContext(F, C, seed=0))
    return objective.double()


def batch(labels, seed):
    draw = np.random.default_rng(seed)
    shapes = {"f": (len(labels), F), "keys": (len(labels), F), "v": (len(labels), C), "w": (C, F), "b": (C,)}
    return {name: draw.normal(size=shape) for name, shape in shapes.items()}


def output(arrays):
    tensors = {name: torch.from_numpy(x).requires_grad_(name != "keys") for name, x in arrays.items()}
    weights = {"head.weight": tensors["w"], "head.bias": tensors["b"]}
    return ModelOutput(tensors["f"], tensors["v"], weights, tensors["keys"])


def unit(x):
    return x / np.linalg.norm(x)


def naive(arrays, labels, queue, projector, key_projector, tau):
    """CCE and CCL of a batch, image by image; `queue` holds, for every class, a list of (h, z)."""
    cce = ccl = 0.0
    for i, y in enumerate(labels):
        h, w = unit(np.append(arrays["f"][i], 1)), unit(np.append(arrays["w"][y], arrays["b"][y]))
        z = unit(projector[0] @ arrays["f"][i] + projector[1])
        key_z = unit(key_projector[0] @ arrays["keys"][i] + key_projector[1])
        everything = [(y, h, key_z), *((c, *key) for c in range(C) for key in queue[c])]
        for which, query in ((1, w), (2, z)):
            exponentials = [np.exp(query @ key[which] / tau) for key in everything]
            terms = [-np.log(e / sum(exponentials)) for key, e in zip(everything, exponentials) if key[0] == y]
            if which == 1:
                cce += np.mean(terms) / len(labels)
            else:
                ccl += np.mean(terms) / len(labels)
    return cce, ccl


@pytest.mark.parametrize("size", [1, 3, 40])
def test_the_losses_equal_a_loop_over_lists_of_keys_step_after_step(size):
    objective = make(queue_size=size, temperature=0.3, momentum=0.6, contrastive_loss_weight=0.5)
    queue: dict = {c: [] for c in range(C)}
    followed = [p.detach().numpy().copy() for p in objective.key_projector.parameters()]
    for step, labels in enumerate(BATCHES):
        arrays = batch(labels, step)
        losses = objective.losses(output(arrays), torch.eye(C).double()[labels])
        live = [p.detach().numpy().copy() for p in objective.projector.parameters()]
        cce, ccl = naive(arrays, labels, queue, live, followed, 0.3)
        assert losses["cce_loss"].item() == pytest.approx(0.5 * cce, rel=1e-10)
        assert losses["ccl_loss"].item() == pytest.approx(0.5 * ccl, rel=1e-10)
        for i, y in enumerate(labels):
            key_z = unit(arrays["keys"][i] @ followed[0].T + followed[1])
            queue[y] = [*queue[y], (unit(np.append(arrays["keys"][i], 1)), key_z)][-size:]
        with torch.no_grad():
            for p in objective.projector.parameters():  # the optimiser's step
                p.add_(0.1 * (step + 1))
        objective.after_step()
        followed = [0.6 * old + 0.4 * (new + 0.1 * (step + 1)) for old, new in zip(followed, live)]


def test_a_queue_that_is_empty_leaves_each_image_its_own_key_alone():
    losses = make().losses(output(batch([0, 1, 2], 0)), torch.eye(C).double()[:3])
    assert losses["cce_loss"].item() == pytest.approx(0, abs=1e-12)
    assert losses["ccl_loss"].item() == pytest.approx(0, abs=1e-12)


def test_gradients_reach_the_features_and_the_projector_but_neither_keys_nor_prototypes():
    objective = make()
    for step, labels in enumerate(BATCHES):
        objective.losses(output(batch(labels, step)), torch.eye(C).double()[labels])
        objective.after_step()
    out = output(batch([0, 1, 2], 9))
    losses = objective.losses(out, torch.eye(C).double()[:3])
    losses["cce_loss"].backward(retain_graph=True)
    assert out.features_BF.grad.abs().sum() > 0 and out.weights["head.weight"].grad is None
    assert all(p.grad is None for p in objective.parameters())
    losses["ccl_loss"].backward()
    assert objective.projector.weight.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in objective.key_projector.parameters())
    assert not objective.queue_CKD.requires_grad


def test_micro_batches_see_the_queue_of_the_whole_batch_and_leave_the_same_one():
    whole, parts = make(queue_size=3), make(queue_size=3)
    for step, labels in enumerate(BATCHES):
        arrays, total = batch(labels, step), 0.0
        expected = sum(whole.losses(output(arrays), torch.eye(C).double()[labels]).values())
        for part in np.array_split(np.arange(len(labels)), 2):
            some = {name: x[part] if name in ("f", "keys", "v") else x for name, x in arrays.items()}
            losses = parts.losses(output(some), torch.eye(C).double()[[labels[i] for i in part]])
            total += sum(losses.values()).item() * len(part) / len(labels)
        assert total == pytest.approx(expected.item(), rel=1e-10)
        whole.after_step(), parts.after_step()
    assert torch.equal(whole.queue_CKD, parts.queue_CKD) and torch.equal(whole.num_seen_C, parts.num_seen_C)


@pytest.mark.parametrize("labels", [[0, 1], [2, 2], [0, 1, 2, 3, 4], [3] * 50])
def test_bf16_features_tiny_batches_and_classes_of_one_stay_finite(labels):
    objective = make().float()
    for step in range(3):
        arrays = {name: torch.from_numpy(x).float() for name, x in batch(labels, step).items()}
        f, keys = arrays["f"].bfloat16().requires_grad_(), arrays["keys"].bfloat16()
        out = ModelOutput(f, arrays["v"], {"head.weight": arrays["w"], "head.bias": arrays["b"]}, keys)
        loss = sum(objective.losses(out, torch.eye(C)[labels]).values())
        loss.backward()
        objective.after_step()
        assert loss.isfinite() and f.grad.isfinite().all()


def test_the_projector_comes_from_the_seed_and_neither_copy_nor_queue_is_a_saved_buffer():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = make(), make()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.projector.weight, second.projector.weight)
    assert torch.equal(first.projector.weight, first.key_projector.weight)
    assert not {"queue_CKD", "num_seen_C"} & first.state_dict().keys()
