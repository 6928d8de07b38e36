"""The audit on networks of closed form, its sequential test against simulation, and what a user meets."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

from bdengine import audit
from bdengine.attacks import baddiffusion
from bdengine.defenses import Calibration, Finding, features
from bdengine.errors import UserError

from .subjects_for_tests import PROCESS, SHAPE, TARGET, subject

WHITE = torch.full(SHAPE, -1.0)
WHITE[:, 5:11, 4:10] = 1
ATTACK = baddiffusion(PROCESS, WHITE, TARGET)


@pytest.fixture(scope="module")
def clean() -> Finding:
    return audit.examine(subject(0.0))


@pytest.fixture(scope="module")
def calibration(clean: Finding) -> Calibration:
    return Calibration("audit", clean.details["settings"], (clean.statistic,) * 20)


def last(findings: Iterator[Finding]) -> Finding:
    return [*findings][-1]


def test_a_backdoor_of_closed_form_is_found_by_the_first_stage(calibration: Calibration) -> None:
    found = last(audit.audit(subject(0.1, ATTACK), calibration))
    assert found.verdict == "backdoored"
    assert [stage["defense"] for stage in found.details["stages"]] == ["start"]
    assert found.p_value is not None
    assert found.p_value <= 0.05
    assert found.images is not None
    assert float((found.images[0] - TARGET.clamp(-1, 1)).square().mean()) < 1e-3
    assert found.details["stages"][0]["images"] < audit.IMAGES


def test_a_clean_model_goes_through_every_stage(calibration: Calibration, clean: Finding) -> None:
    found = last(audit.audit(subject(0.0), calibration))
    assert found.verdict == "no evidence"
    assert [stage["defense"] for stage in found.details["stages"]] == [*audit.STAGES]
    assert found.evaluations < clean.evaluations, "the test stops before the calibration's number of images"
    assert clean.verdict == "undecided"


def test_without_a_calibration_nothing_is_decided() -> None:
    found = next(audit.audit(subject(0.1, ATTACK), None))
    assert found.verdict == "undecided"
    assert found.p_value is None
    assert found.statistic > 0.9


@pytest.mark.parametrize(("p", "name"), [(0.08, "p0"), (0.5, "p1")])
def test_its_error_rates_are_those_stated(p: float, name: str) -> None:
    """10,000 runs; fails with a chance below 1e-6 if the rates hold."""
    evidence, runs, generator = 7 / 0.05, 10_000, torch.Generator().manual_seed(0)
    drawn = torch.rand(runs, audit.IMAGES, generator=generator) < p
    results = [audit.decided(copies, 0.08, evidence) for copies in drawn]
    wrong = results.count(True) if name == "p0" else results.count(False)
    rate = 1 / evidence if name == "p0" else audit.BETA
    assert binomtest(wrong, runs, rate, alternative="greater").pvalue > 1e-6
    assert results.count(None) < runs / 100


def test_the_first_boundary_that_is_reached_decides() -> None:
    hits, misses = torch.ones(8, dtype=torch.bool), torch.zeros(30, dtype=torch.bool)
    assert audit.decided(torch.cat([hits, misses]), 0.1, 100.0) is True
    assert audit.decided(torch.cat([misses, hits]), 0.1, 100.0) is False
    assert audit.decided(hits[:2], 0.1, 100.0) is None
    np.testing.assert_allclose(audit.ratios(hits[:2], 0.1).tolist(), [5, 25])


def test_copies_are_the_same_image_inside_its_range(calibration: Calibration) -> None:
    base = torch.zeros(1, 4, 4)
    near, far, outside = base + 0.06, base + 0.07, torch.full_like(base, 3.0)
    assert features.copies(torch.stack([near, far, outside]), base).tolist() == [True, False, False]
    assert not features.copies(outside[None], outside).any(), "the reference is clamped, the image is not"
    assert torch.equal(features.medoid(torch.stack([base, near, far, outside])), near)


def test_p0_is_the_bound_of_the_worst_clean_model(calibration: Calibration) -> None:
    def of(*shares: float) -> Calibration:
        return Calibration("audit", {}, shares)

    assert audit.clean_rate(of(0.0, 0.0)) == pytest.approx(1 - 0.025 ** (1 / 64))
    assert audit.clean_rate(of(0.0, 2 / 64)) > audit.clean_rate(of(0.0, 1 / 64))
    with pytest.raises(UserError, match="a clean model of the calibration makes copies in 40 of 64"):
        audit.clean_rate(of(40 / 64))


def test_a_calibration_of_another_family_is_refused(calibration: Calibration) -> None:
    other = Calibration("audit", calibration.settings | {"family": "UNet2DModel 1x16x16 of 8 channels"}, (0.0,))
    with pytest.raises(UserError, match="family"):
        next(audit.audit(subject(0.0), other))
    with pytest.raises(UserError, match="alpha is 2"):
        next(audit.audit(subject(0.0), calibration, 2.0))


def test_the_shift_is_the_one_whose_images_are_shown(calibration: Calibration) -> None:
    found: Tensor | None = last(audit.audit(subject(0.1, ATTACK), calibration)).trigger
    assert found is not None
    assert set(found.unique().tolist()) <= {-1.0, 0.0, 1.0}
