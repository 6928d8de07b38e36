"""The search for a start: what it tries, what it keeps, and what an inversion from there finds in networks of closed form."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from bdengine.arms import Arm
from bdengine.attacks import baddiffusion
from bdengine.defenses import Subject, elijah, features, purediffusion, starts, terd
from bdengine.metrics import attack_success
from bdengine.oracle import Exploding, Gaussian, Oracle
from bdengine.solvers import Nodes, score_sde

from .subjects_for_tests import BACKGROUND, DDPM, PIXELS, PROCESS, SHAPE, TARGET, cosine, subject

WHITE = torch.full(SHAPE, -1.0)
WHITE[:, 5:11, 4:10] = 1
ATTACK = baddiffusion(PROCESS, WHITE, TARGET)
R = ATTACK.stamp + BACKGROUND * ATTACK.mask
"""Of a white box, whose side the published start is not on: that lies at 0.24 R in the mean, and the wall at 0.5 R."""


def test_it_tries_the_background_and_squares_on_it() -> None:
    shifts = starts.candidates(subject(0.0))
    assert len(shifts) == 1 + 2 * (16 + 9 + 16)
    assert len({tuple(s.flatten().tolist()) for s in shifts}) == len(shifts)
    assert torch.equal(shifts[0], torch.full(SHAPE, -1.0))
    for shift in shifts[1:]:
        inside = (shift[0] > -1).nonzero()
        low, high = inside.min(0).values, inside.max(0).values + 1
        assert (high - low).tolist() in ([3, 3], [6, 6], [9, 9])
        assert len(inside) == (high - low).prod()
        assert shift[0, low[0], low[1]] in (0, 1)


def test_a_variance_exploding_models_background_is_0() -> None:
    sigmas = np.geomspace(0.01, 380, 10)
    data = [(1.0, Gaussian(torch.full((1, 4, 4), 0.5), 0.1 * torch.eye(16)))]
    oracle = Oracle(Exploding(sigmas), data, prediction="score")
    ours = Subject(oracle, None, score_sde(Nodes.exploding(sigmas[::-1].copy())))  # type: ignore[arg-type]
    shifts = starts.candidates(ours)
    assert shifts.unique().tolist() == [0, 0.5, 1]
    assert starts.images_from(ours, shifts[:2], 3).shape == (2, 3, 1, 4, 4)


def test_its_images_are_the_models_own_from_the_shifted_noise() -> None:
    ours, shifts = subject(0.1, ATTACK), torch.stack([WHITE, 0 * WHITE])
    for shift, images in zip(shifts, starts.images_from(ours, shifts, 4), strict=True):
        torch.testing.assert_close(images, ours.images(Arm(DDPM, shift), 4))


def along(tau: Tensor) -> float:
    """How far along the trigger, as a share of it: poisoned above 0.5, clean below."""
    return float((tau * R).sum() / R.square().sum())


def test_the_published_start_misses_a_white_box_and_the_searched_one_finds_it() -> None:
    """The searched square is off by a pixel; on the way to the trigger, where Elijah's objective is 0, it stops at the wall."""
    ours = subject(0.1, ATTACK)
    start = starts.searched(ours)
    assert along(start) > 0.7
    assert attack_success(ours.images(Arm(DDPM, start), 16), TARGET, 0.01) == 1
    missed, found = (elijah.examine(ours, elijah.VARIANTS[name]) for name in ("baddiffusion", "searched"))
    assert missed.trigger is not None
    assert found.trigger is not None
    assert abs(cosine(missed.trigger, R)) < 4 / PIXELS**0.5  # 4 deviations of a random direction's
    assert cosine(found.trigger, R) > 0.9
    assert along(missed.trigger) < 0.1 < 0.5 < along(found.trigger)
    assert found.evaluations == 100 * 100 + 20 * 16 + 20 * (83 * 8 + -83 * 8 % 64)


def test_purediffusion_finds_it_from_there_too() -> None:
    attack = baddiffusion(PROCESS, WHITE, TARGET, "exact", DDPM)
    found = purediffusion.examine(subject(0.1, attack), purediffusion.VARIANTS["searched"])
    assert found.trigger is not None
    assert cosine(found.trigger, R) > 0.98
    assert found.details["uniformity"] < 1e-4


def test_terd_stays_on_the_side_that_it_starts_on() -> None:
    for name, poisoned in (("surrogate", False), ("searched", True)):
        found = terd.examine(subject(0.1, ATTACK), replace(terd.VARIANTS[name], surrogate=20))
        assert found.trigger is not None
        assert found.images is not None
        assert (along(found.trigger) > 0.5) == poisoned
        assert attack_success(found.images, TARGET, 0.01) == poisoned


@pytest.mark.parametrize("name", ["elijah", "purediffusion"])
def test_in_a_clean_network_an_inversion_from_there_finds_nothing(name: str) -> None:
    module = {"elijah": elijah, "purediffusion": purediffusion}[name]
    found = module.examine(subject(0.0), module.VARIANTS["searched"])
    assert found.trigger is not None
    assert found.trigger.norm() < 0.3 * R.norm()
    assert found.statistic < -0.04


def test_images_outside_the_range_are_no_images() -> None:
    inside = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4).expand(3, -1, -1, -1)
    assert features.excess(inside) == 0
    away = torch.cat([inside + 4, inside[:1]])
    outside = ((inside[0] + 4 - 1) / 2).square().mean().sqrt()
    assert features.excess(away) == pytest.approx(0.75 * float(outside), rel=1e-6)
    assert features.unlike(inside + 4) == features.excess(inside + 4) > 1
