"""Starts: what a head begins with, and what models say about images that they have not seen."""

from __future__ import annotations

import numpy as np
import torch

from tes.engine.solve import HeadProblem
from tes.engine.start import out_of_fold_logits, random_head

PROBE = HeadProblem(0.3)


def features(num_per_class: int = 10):
    draw = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), num_per_class)
    centres = 3 * draw.normal(size=(3, 8))
    return torch.from_numpy(centres[labels] + draw.normal(size=(len(labels), 8))).float(), torch.from_numpy(labels)


def test_a_random_head_comes_from_its_seed_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    one, same, other = random_head(8, 3, 0), random_head(8, 3, 0), random_head(8, 3, 1)
    assert torch.equal(one.weight_CF, same.weight_CF) and not torch.equal(one.weight_CF, other.weight_CF)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_probe_fits_the_features_it_was_solved_on():
    x, labels = features()
    target = torch.nn.functional.one_hot(labels, 3)
    assert (PROBE.solve(x, target).head.logits(x).argmax(dim=1) == labels).all()


def test_a_wrong_label_is_doubted_by_models_that_have_not_seen_it():
    x, labels = features(30)
    planted = labels.clone()
    planted[0] = 2
    logits, is_judged = out_of_fold_logits(PROBE, x, planted, np.arange(len(x)), 3)
    assert is_judged.all() and logits[0].argmax() == 0
    assert (logits.argmax(dim=1) == labels).float().mean() > 0.9


def test_copies_of_an_image_share_a_fold_so_that_none_vouches_for_another():
    x, labels = features()
    copies = [0, 1, 2, 3, 4]
    x[copies] = 30 * torch.ones(8)  # an image like no other, five times, with a label of its own making
    units = np.arange(len(x))
    apart, _ = out_of_fold_logits(PROBE, x, labels, units, 3)
    units[copies] = 0
    together, is_judged = out_of_fold_logits(PROBE, x, labels, units, 3)
    assert (apart[copies].argmax(dim=1) == 0).all()
    own = together[copies].softmax(dim=1)[:, 0]
    assert (own < apart[copies].softmax(dim=1)[:, 0]).all() and is_judged.all()


def test_images_that_are_their_class_alone_are_not_judged():
    x, labels = features(1)
    _, is_judged = out_of_fold_logits(PROBE, x, labels, np.arange(3), 3)
    assert not is_judged.any()  # one fold: no image is left to learn from
    x, labels = features()
    labels[labels == 2] = 1
    labels[7] = 2  # of class 2 there is one image, and of class 0 there is one unit
    units = np.arange(len(x))
    units[labels == 0] = 0
    _, is_judged = out_of_fold_logits(PROBE, x, labels, units, 3)
    assert torch.equal(is_judged, labels == 1)
