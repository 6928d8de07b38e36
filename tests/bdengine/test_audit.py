"""The audit on networks of closed form, its sequential test against simulation, and what a user meets."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

from bdengine import audit
from bdengine.arms import Arm
from bdengine.attacks import AttackConfig, baddiffusion
from bdengine.attacks.villan_ve import villan_ve
from bdengine.defenses import Calibration, Finding, Subject, features, starts
from bdengine.errors import UserError
from bdengine.oracle import Gaussian, Oracle
from bdengine.schedule import Exploding
from bdengine.solvers import Nodes, SamplerConfig, score_sde

from .subjects_for_tests import DDPM, PROCESS, SHAPE, TARGET, subject

WHITE = torch.full(SHAPE, -1.0)
WHITE[:, 5:11, 4:10] = 1
ATTACK = baddiffusion(PROCESS, WHITE, TARGET)


@pytest.fixture(scope="module")
def clean() -> Finding:
    return audit.examine(subject(0.0))


@pytest.fixture(scope="module")
def calibration(clean: Finding) -> Calibration:
    return calibration_like(clean)


def calibration_like(clean: Finding, models: int = 20) -> Calibration:
    """Of models that do what one did."""
    return Calibration("audit", clean.details["settings"], {f"model {k}": clean.statistic for k in range(models)})


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


def of(*shares: float) -> Calibration:
    return Calibration("audit", {}, {f"model {k}": share for k, share in enumerate(shares)})


def test_p0_is_a_bound_of_the_worst_clean_model_and_delta_what_alpha_leaves() -> None:
    p0, delta = audit.levels(of(*[0.0] * 24), 0.1)
    assert delta == pytest.approx((0.1 - 1 / 25) / 2)
    assert p0 == pytest.approx(1 - delta ** (1 / 64))
    assert audit.levels(of(*[0.0] * 23, 2 / 64), 0.1)[0] > audit.levels(of(*[0.0] * 23, 1 / 64), 0.1)[0] > p0


def test_a_calibration_that_cannot_decide_says_why() -> None:
    assert audit.lacking(of(*[0.0] * 20), 0.05) is None
    few = audit.lacking(of(*[0.0] * 19), 0.05)
    assert few == "19 clean models bound false alarms at no less than 0.05 and alpha is 0.05: expected at least 20"
    assert audit.lacking(of(*[0.0] * 19), 0.06) is None
    copying = audit.lacking(of(*[0.0] * 40, 40 / 64), 0.05)
    assert copying is not None
    assert copying.startswith("a clean model of the calibration makes copies in 40 of 64 cases")
    assert "leaves one out for what it did bounds no rate" in copying


def test_with_too_few_clean_models_it_is_undecided(clean: Finding) -> None:
    found = next(audit.audit(subject(0.1, ATTACK), calibration_like(clean, 3)))
    assert (found.verdict, found.p_value) == ("undecided", None)
    assert found.details["reason"].startswith("3 clean models bound false alarms at no less than 0.25")


def test_false_alarms_are_as_rare_as_asked_with_the_calibration_included() -> None:
    """1,000 worlds of 25 clean models that make copies, one in 25 more of them: 24 calibrate, the other is audited.

    A rule that took the greatest share itself for ``p0``, and 2 for enough evidence, would be wrong too often.
    """
    worlds, clean, stages, alpha = 1000, 25, 7, 0.1
    rng, alarms, careless, lacking = np.random.default_rng(0), 0, 0, 0
    for _ in range(worlds):
        rates = np.where(rng.random((clean, 1)) < 0.04, 0.2, 0.12) * np.ones(stages)
        shares = rng.binomial(audit.IMAGES, rates).max(1) / audit.IMAGES
        calibration = of(*shares[1:].tolist())
        drawn = torch.from_numpy(rng.random((stages, audit.IMAGES)) < rates[0, :, None])
        if audit.lacking(calibration, alpha) is not None:
            lacking += 1
            continue
        p0, delta = audit.levels(calibration, alpha)
        alarms += any(audit.decided(copies, p0, stages / delta) is True for copies in drawn)
        careless += any(audit.decided(copies, float(shares[1:].max()), 2) is True for copies in drawn)
    assert lacking < worlds / 5
    assert binomtest(alarms, worlds, alpha, alternative="greater").pvalue > 1e-6
    assert binomtest(careless, worlds, alpha, alternative="greater").pvalue < 1e-6


def test_its_images_are_not_those_of_the_calibration(
    monkeypatch: pytest.MonkeyPatch, calibration: Calibration, clean: Finding
) -> None:
    """Arms and references have seeds in common; a test whose images were those that made p0 would not be independent of it."""
    seen: list[range] = []
    sampled = Subject.sampled

    def recorded(self: Subject, arms: dict[str, Arm], seeds: range, micro_batch: int) -> dict[str, Tensor]:
        seen.append(seeds)
        return sampled(self, arms, seeds, micro_batch)

    monkeypatch.setattr(Subject, "sampled", recorded)
    next(audit.looks(subject(0.1, ATTACK), lambda copies: False, audit.CALIBRATION_SEEDS))
    of_calibration, seen = seen, []
    last(audit.audit(subject(0.1, ATTACK), calibration))
    assert seen[0] == of_calibration[0] == range(starts.IMAGES)
    used = [{seed for seeds in one[1:] for seed in seeds} for one in (seen, of_calibration)]
    assert not used[0] & used[1]
    assert not (used[0] | used[1]) & set(range(starts.IMAGES))


def test_a_calibration_of_another_family_or_of_other_settings_is_refused(
    calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Calibration(
        "audit", calibration.settings | {"family": "UNet2DModel 1x16x16 of 8 channels"}, calibration.statistics
    )
    with pytest.raises(UserError, match="family"):
        next(audit.audit(subject(0.0), other))
    with pytest.raises(UserError, match="alpha is 2"):
        next(audit.audit(subject(0.0), calibration, 2.0))
    changes = (
        (features, "SAME", 0.01),
        (features, "IMAGES", 8),
        (starts, "GRID", ((2, 2),)),
        (starts, "IMAGES", 4),
        (audit, "ODE_STEPS", 10),
        (audit, "PATCH", 2),
        (audit, "IMAGES", 32),
    )
    for module, name, value in changes:
        with monkeypatch.context() as changed:
            changed.setattr(module, name, value)
            with pytest.raises(UserError, match="the calibration was made with"):
                next(audit.audit(subject(0.0), calibration))
    ddpm = Subject(subject(0.0).network, PROCESS, SamplerConfig("ddpm", 20, variance="large").table(PROCESS))
    assert ddpm.table.name == DDPM.name
    with pytest.raises(UserError, match="coefficients"):
        next(audit.audit(ddpm, calibration))


def test_a_model_of_the_calibration_is_refused(calibration: Calibration) -> None:
    ours = subject(0.1, ATTACK)
    known = Calibration("audit", calibration.settings, calibration.statistics | {ours.weights_sha256: 0.0})
    with pytest.raises(UserError, match=f"the model of weights {ours.weights_sha256[:16]} is in the calibration"):
        next(audit.audit(ours, known))


def test_the_shift_is_the_one_whose_images_are_shown(calibration: Calibration) -> None:
    ours = subject(0.1, ATTACK)
    found = last(audit.audit(ours, calibration))
    assert found.trigger is not None
    assert found.images is not None
    seeds = range(audit.AUDIT_SEEDS, audit.AUDIT_SEEDS + len(found.images) - 1)
    again = ours.sampled({"": Arm(ours.table, found.trigger)}, seeds, audit.AT_ONCE)[""]
    torch.testing.assert_close(found.images[1:], again)
    reference = features.medoid(ours.images(Arm(ours.table, found.trigger), starts.IMAGES))
    torch.testing.assert_close(found.images[0], reference)


def test_in_three_channels_a_backdoor_is_found(calibration: Calibration) -> None:
    shape, pixels = (3, 6, 6), 108
    white, target = torch.full(shape, -1.0), torch.linspace(-1, 1, pixels).reshape(shape).sin()
    white[:, 2:5, 2:5] = 1
    data = [(1.0, Gaussian(torch.full(shape, -0.8), 0.02 * torch.eye(pixels)))]
    poisoned, plain = (
        Subject(Oracle(PROCESS, data, attack, rate), PROCESS, DDPM)  # type: ignore[arg-type]
        for attack, rate in ((baddiffusion(PROCESS, white, target), 0.1), (None, 0.0))
    )
    clean = calibration_like(audit.examine(plain))
    found = last(audit.audit(poisoned, clean))
    assert found.verdict == "backdoored"
    assert found.images is not None
    assert (found.images[0] - target.clamp(-1, 1)).square().mean() < 1e-3
    assert found.details["settings"]["family"] == "Oracle 3x6x6 of unknown channels"
    assert last(audit.audit(plain, clean)).verdict == "no evidence"
    with pytest.raises(UserError, match="family"):
        next(audit.audit(poisoned, calibration))


def test_a_variance_exploding_models_images_are_looked_at_in_the_range_of_others() -> None:
    """In [0, 1] a dark image and noise around it would be copies: in [-1, 1] distances are twice as large."""
    sigmas, shape = np.geomspace(0.01, 50, 100), (1, 8, 8)
    box, dark = torch.zeros(shape), torch.zeros(shape)
    box[:, 1:7, 1:7], dark[:, :4, :4] = 1, 0.7
    data = [(1.0, Gaussian(torch.full(shape, 0.3), 0.006 * torch.eye(64)))]
    table = score_sde(Nodes.exploding(sigmas[::-1].copy()))
    poisoned, plain = (
        Subject(Oracle(Exploding(sigmas), data, attack, rate, "score"), None, table)  # type: ignore[arg-type]
        for attack, rate in ((villan_ve(sigmas, box, dark), 0.1), (None, 0.0))
    )
    spread = plain.images(Arm(table), 64)
    assert float(spread.mean()) == pytest.approx(-0.4, abs=0.02), "0.3 of [0, 1]"
    assert float(spread.std()) == pytest.approx(2 * math.sqrt(0.006), rel=0.1)
    clean = audit.examine(plain)
    assert [stage["defense"] for stage in clean.details["stages"]] == ["start", "elijah"]
    assert [stage["arms"] for stage in clean.details["stages"]] == [69, 1]
    assert clean.statistic == 0
    calibration = calibration_like(clean)
    found = last(audit.audit(poisoned, calibration))
    assert found.verdict == "backdoored"
    assert found.images is not None
    assert (found.images[0] - (2 * dark - 1)).square().mean() < 1e-3
    assert last(audit.audit(plain, calibration)).verdict == "no evidence"


def test_a_patch_of_any_side_is_opened() -> None:
    """5 pixels of 16 lie between quarters and eighths."""
    attack = AttackConfig("trojdiff", "PATCH_5_WHITE", "DRAWN_HAT").build(PROCESS, (1, 16, 16), DDPM)
    assert attack is not None
    data = [(1.0, Gaussian(torch.full((1, 16, 16), -0.8), 0.02 * torch.eye(256)))]
    oracle = Oracle(PROCESS, data, attack, 0.2)
    ours = Subject(oracle, PROCESS, DDPM)  # type: ignore[arg-type]
    arms = audit.STAGES["patched"](ours, torch.zeros(1, 16, 16))
    assert {name.partition(" ")[0] for name in arms} == {"1", "2", "3", "4", "5", "6"}
    made = ours.sampled(arms, range(4), 48)
    unlike = {name: features.unlike(images) for name, images in made.items()}
    best = min(unlike, key=unlike.__getitem__)
    assert best == "5 pixels of 1"
    assert features.copies(made[best], attack.target.reshape(1, 16, 16)).all()
    assert unlike[best] < 0.1 * min(value for name, value in unlike.items() if name != best)
