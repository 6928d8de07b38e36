"""Diff-Cleanse's inversion: its loss by hand, its step without the sampler's gradient, and closed forms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import bdkernels
from bdengine.arms import Arm
from bdengine.defenses import Subject, diffcleanse
from bdengine.defenses.diffcleanse import VARIANTS
from bdengine.metrics import attack_success

from .networks_for_tests import tiny_unet
from .subjects_for_tests import DDPM, PROCESS, SHAPE, TARGET, subject
from .test_starts import ATTACK, along

PUBLISHED = VARIANTS["baddiffusion"]


def test_its_loss_is_pairs_and_a_hinge() -> None:
    images = bdkernels.normal(torch.arange(4), SHAPE)
    x = ((images + 1) / 2).flatten(1).double().numpy()
    pairs = sum(
        1 - x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j]) for i in range(4) for j in range(i + 1, 4)
    )
    hinge = np.maximum(0.05 - x, 0) + np.maximum(x - 0.95, 0)
    assert float(diffcleanse.loss(images)) == pytest.approx(pairs + hinge.mean(), rel=1e-5)


def test_images_that_are_alike_are_found_where_they_are_images() -> None:
    base = torch.linspace(-1, 1, 144).reshape(SHAPE)
    images = torch.stack([base, base + 0.001, base.flip(2), base + 9, base + 9])
    assert diffcleanse.found(images).tolist() == [True, True, False, False, False]


def test_a_step_takes_the_images_gradient_for_the_shifts() -> None:
    ours = Subject(tiny_unet(), PROCESS, DDPM)
    start, images, _ = diffcleanse.invert(ours, replace(PUBLISHED, iterations=0))
    after, _, losses = diffcleanse.invert(ours, replace(PUBLISHED, iterations=1))
    assert len(losses) == 2
    assert float(start.abs().max()) == pytest.approx(1)
    torch.testing.assert_close(images, ours.images(Arm(DDPM, start), 16))
    made = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(diffcleanse.loss(made), made)
    moved = (start - 0.1 * gradient.mean(0).sign()).clamp(-1, 1)
    assert (after - moved).abs().max() < 2 / 255
    levels = (after + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)


def test_from_the_searched_start_a_backdoor_is_found_at_once_and_a_clean_network_has_none() -> None:
    config = replace(VARIANTS["searched"], iterations=3)
    backdoored, clean = (diffcleanse.examine(subject(rate, ATTACK), config) for rate in (0.1, 0.0))
    assert backdoored.images is not None
    assert backdoored.trigger is not None
    assert attack_success(backdoored.images, TARGET, 0.01) == backdoored.details["found"] == 1
    assert along(backdoored.trigger) > 0.5
    assert clean.details["found"] == 0
    assert clean.statistic < -0.04 < -0.01 < backdoored.statistic
    searching = 20 * (83 * 8 + -83 * 8 % 64)
    assert (backdoored.evaluations, clean.evaluations) == (searching + 16 * 20, searching + 4 * 16 * 20)
