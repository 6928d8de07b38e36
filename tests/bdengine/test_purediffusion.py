"""PureDiffusion: its sampler, its losses against plain torch, and what it finds in networks known in closed form."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import bdkernels
from bdengine.arms import Arm
from bdengine.attacks import baddiffusion, departure
from bdengine.attacks.baddiffusion import rho
from bdengine.defenses import Subject, purediffusion
from bdengine.defenses.purediffusion import VARIANTS, Objective, amplify, following
from bdengine.errors import UserError
from bdengine.metrics import attack_success
from bdkernels import Step
from bdkernels import noise as contract

from .networks_for_tests import tiny_unet
from .subjects_for_tests import ATTACK, DDPM, PIXELS, PROCESS, TARGET, R, cosine, subject

PUBLISHED = VARIANTS["baddiffusion"]
SHIFT = 1 - np.sqrt(PROCESS.alpha_bar)


@pytest.mark.parametrize("steps", [10, 20])
def test_its_sampler_follows_the_published_backdoor_and_keeps_clean_marginals(steps: int) -> None:
    table = following(PROCESS, steps, rho(PROCESS))
    # 1e-3 of the trigger is left in the image: rho_t itself, which is exact for single timesteps, leaves it at the last.
    assert np.abs(departure(PROCESS, table, SHIFT, rho(PROCESS))).max() < 2e-3
    t = table.timesteps.astype(int)
    s, after = PROCESS.s[t], np.append(PROCESS.s[t[1:]], 0.0)
    kept = table.rows[:, Step.P] * s + table.rows[:, Step.S]
    np.testing.assert_allclose(kept**2 + table.rows[:, Step.Z] ** 2, after**2, atol=1e-12)
    np.testing.assert_allclose(np.cumprod(table.rows[:, Step.P])[-1], PROCESS.alpha_bar[999] ** -0.5)


@pytest.mark.parametrize("variant", ["baddiffusion", "ode"])
def test_its_losses_are_those_of_a_few_lines_of_torch(variant: str) -> None:
    network, config = tiny_unet(), replace(VARIANTS[variant], batch=4)
    ours = Objective(Subject(network, PROCESS, DDPM), config)
    tau = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8).requires_grad_()
    shift, consistency = ours(tau, 3)
    (found,) = torch.autograd.grad(shift + consistency, tau)

    c = {"baddiffusion": 1, "ode": 2}[variant] * rho(PROCESS)
    seeds = contract.sample_seeds(0, np.arange(12, 16))
    x = torch.from_numpy(contract.normal(seeds, (1, 8, 8))) + tau
    distances = []
    for k, t in enumerate(range(999, 0, -100)):
        m = network(x, torch.tensor(t))
        distances.append((m.mean(0) - float(c[t]) * tau[0]).abs().mean())
        alpha, s, shift_now = PROCESS.alpha_bar[t] ** 0.5, PROCESS.s[t], SHIFT[t]
        alpha_then, s_then = (PROCESS.alpha_bar[t - 100] ** 0.5, PROCESS.s[t - 100]) if t > 100 else (1.0, 0.0)
        a = alpha_then / alpha
        kept = min(max(a * s - (a * shift_now - (1 - alpha_then)) / c[t], -s_then), s_then)
        z = torch.from_numpy(contract.normal(seeds, (1, 8, 8), k, bdkernels.STREAM_STEP))
        x = a * x + (kept - a * s) * m + (s_then**2 - kept**2) ** 0.5 * z
    expected = torch.stack(distances).mean(), x.var(0).mean()
    (gradient,) = torch.autograd.grad(expected[0] + expected[1], tau)
    assert float(shift.detach()) == pytest.approx(float(expected[0].detach()), rel=1e-4)
    assert float(consistency.detach()) == pytest.approx(float(expected[1].detach()), rel=1e-3)
    assert (found - gradient).norm() < 1e-2 * gradient.norm()


@pytest.mark.parametrize("variant", ["baddiffusion", "exact"])
def test_it_recovers_the_trigger_of_a_backdoor(variant: str) -> None:
    """To within a step and a half of Adam in the mean: 0.15 a pixel where the trigger is 0.75 in the mean square."""
    attack = ATTACK if variant == "baddiffusion" else baddiffusion(PROCESS, ATTACK.trigger, TARGET, "exact", DDPM)
    found = purediffusion.examine(subject(0.1, attack), VARIANTS[variant])
    assert found.trigger is not None
    assert found.images is not None
    assert cosine(found.trigger, R) > 0.98
    assert (found.trigger - R).norm() / R.norm() < 0.2
    assert found.evaluations == 100 * 16 * 10 + 20 * 16
    if variant == "baddiffusion":
        assert attack_success(found.images, TARGET, 0.01) == 1
        assert found.details["uniformity"] < 1e-5


def test_it_finds_nothing_in_a_clean_network() -> None:
    found = purediffusion.examine(subject(0.0), PUBLISHED)
    assert found.trigger is not None
    assert abs(cosine(found.trigger, R)) < 4 / PIXELS**0.5  # 4 deviations of a random direction's
    assert found.trigger.norm() < 0.2 * R.norm()
    assert found.details["uniformity"] > 0.04


def test_a_run_has_the_same_bits_again() -> None:
    ours, config = Subject(tiny_unet(), PROCESS, DDPM), replace(PUBLISHED, iterations=2, batch=4)
    first, again, other = (purediffusion.examine(ours, c) for c in (config, config, replace(config, seed=1)))
    assert torch.equal(first.trigger, again.trigger)  # type: ignore[arg-type]
    assert not torch.equal(first.trigger, other.trigger)  # type: ignore[arg-type]


def test_an_attacker_starts_from_the_inverted_trigger() -> None:
    """A trigger too short to lead to the target does together with the inverted one, or replaced by it."""
    ours, weak = subject(0.1), 0.3 * ATTACK.trigger
    starts = (weak, amplify(weak, R), amplify(weak, R, "add"))
    shares = [attack_success(ours.images(Arm(DDPM, r), 16), TARGET, 0.01) for r in starts]
    assert shares == [0.0, 1.0, 1.0]
    with pytest.raises(UserError, match="the nearest is 'add'"):
        amplify(weak, R, "ad")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"shape \(1, 4, 4\): expected the trigger's \(1, 12, 12\)"):
        amplify(weak, torch.zeros(1, 4, 4))


def test_one_noise_has_no_other_to_agree_with() -> None:
    with pytest.raises(UserError, match="the batch is 1: expected at least 2"):
        Objective(subject(0.0), replace(PUBLISHED, batch=1))
