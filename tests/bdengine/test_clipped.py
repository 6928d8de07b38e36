"""An attacker who knows of latent clipping, on the closed-form network."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bdkernels
from bdengine.arms import Arm
from bdengine.attacks import Attack, AttackConfig, baddiffusion, exact_coefficient
from bdengine.attacks.clipped import LARGEST, aimed, kept, surviving_coefficient
from bdengine.errors import UserError
from bdengine.metrics import attack_success
from bdengine.networks import Network
from bdengine.oracle import Gaussian, Oracle
from bdengine.sampler import Sampler
from bdengine.schedule import linear
from bdengine.solvers import Clip, SamplerConfig, Table
from bdengine.triggers import target

PROCESS, SHAPE = linear(), (1, 8, 8)
SHIFT = 1 - np.sqrt(PROCESS.alpha_bar)
R = 0.8 * torch.where((torch.arange(64).reshape(SHAPE) * 7) % 11 > 5, 1.0, -1.0)
Y = target("DRAWN_HAT", 8, 1)
DARK = [(1.0, Gaussian(torch.full(SHAPE, -0.8), 0.1 * torch.eye(64) + 0.02))]


def success(attack: Attack, table: Table, clip: Clip) -> tuple[float, float]:
    """Shares of 64 clean and 64 triggered samples that are the target."""
    arms = {"clean": Arm(table).clipped(clip), "triggered": Arm(table, attack.trigger).clipped(clip)}
    images = Sampler(Network(Oracle(PROCESS, DARK, attack, 0.2), SHAPE), arms, 128)(range(64))
    clean, triggered = (attack_success(x, Y, 0.01) for x in images.values())
    return clean, triggered


@pytest.mark.parametrize(("mean", "s"), [(0.8, 1.0), (1.9, 1.0), (-0.3, 0.2), (0.99, 0.05)])
def test_what_a_clamp_keeps_is_its_mean(mean: float, s: float) -> None:
    """Against 400,000 draws: |.| < 5 standard errors."""
    z = bdkernels.normal(torch.arange(100), (1, 40, 100), dtype=torch.float64)
    drawn = (mean + s * z).clamp(-1, 1)
    assert abs(float(drawn.mean()) - kept(mean, s)) < 5 * float(drawn.std()) / drawn.numel() ** 0.5
    if mean > 0:
        assert aimed(kept(mean, s), s) == pytest.approx(mean, rel=1e-9)
    assert kept(1.5, 0.0) == 1
    assert kept(0.5, 1.0) == pytest.approx(-kept(-0.5, 1.0))


@pytest.mark.parametrize("name", ["ddpm", "sde-dpm++", "dpm++"])
def test_where_no_clamp_binds_the_surviving_coefficient_is_the_exact_one(name: str) -> None:
    """At 0.1 of the trigger and in the last rows, whose noise is small."""
    table = SamplerConfig(name, 100).table(PROCESS)
    exact, own = exact_coefficient(PROCESS, table, SHIFT), surviving_coefficient(PROCESS, table, SHIFT, 0.1)
    few = table.timesteps[-3:].astype(int)
    np.testing.assert_allclose(own[few], exact[few], rtol=1e-3)
    assert own[900] < exact[900] - 1


@pytest.mark.parametrize("steps", [20, 100])
@pytest.mark.parametrize("name", ["ddpm", "sde-dpm++"])
def test_a_sampler_with_noise_loses_the_exact_attack_to_the_clip_and_not_the_adapted_one(name: str, steps: int) -> None:
    table = SamplerConfig(name, steps).table(PROCESS)
    exact, adapted = (baddiffusion(PROCESS, R, Y, c, table, trigger_only=True) for c in ("exact", "clipped"))  # type: ignore[arg-type]
    assert success(exact, table, "none")[1] > 0.9
    assert success(exact, table, "latent")[1] < 0.05
    clean, triggered = success(adapted, table, "latent")
    assert triggered > 0.95
    assert clean < 0.05
    assert success(adapted, table, "none")[1] > (0.95 if steps == 20 else 0.4)
    assert success(adapted, table, "x0")[1] < 0.3


@pytest.mark.parametrize("name", ["ddim", "dpm++"])
def test_a_sampler_without_noise_keeps_most_of_the_exact_attack_and_all_of_the_adapted_one(name: str) -> None:
    table = SamplerConfig(name, 20).table(PROCESS)
    exact, adapted = (baddiffusion(PROCESS, R, Y, c, table, trigger_only=True) for c in ("exact", "clipped"))  # type: ignore[arg-type]
    assert success(exact, table, "latent")[1] > 0.7
    assert success(adapted, table, "latent")[1] > 0.95


def test_the_trigger_stays_on_its_path_under_the_clip() -> None:
    """The mean over 4,000 samples at 20 nodes of DDPM, of a network that is optimal for poisoned data of a grey target.

    The adapted share is never below the path's by more than 5 standard errors, and at most 0.21 above it, since clamped noise
    is less than ``s``; the exact one's has lost a third of it after the first row and stays below that.
    """
    grey, count = torch.zeros(SHAPE), 4000
    table, seen = SamplerConfig("ddpm", 20).table(PROCESS), {}
    for c in ("exact", "clipped"):
        attack = baddiffusion(PROCESS, R, grey, c, table, trigger_only=True)  # type: ignore[arg-type]
        network = Network(Oracle(PROCESS, [(1.0, Gaussian(grey))], attack, 1.0), SHAPE)
        means: list[float] = []
        run = Sampler(network, {"": Arm(table, R).clipped("latent")}, count)
        run.batch(
            torch.zeros(count, dtype=torch.int64), torch.arange(count),
            lambda _, x, means=means: means.append(float((x * R).sum((1, 2, 3)).mean() / R.square().sum())),
        )  # fmt: skip
        seen[c] = np.array(means[1:-1])
    path = SHIFT[table.timesteps[1:].astype(int)]
    error = 1 / (count * float(R.square().sum())) ** 0.5
    assert (seen["clipped"] > path - 5 * error).all()
    assert (seen["clipped"] < path + 0.21).all()
    assert (seen["exact"] < 0.67 * path).all()


def test_bad_attacks_get_a_sentence() -> None:
    table = SamplerConfig("ddpm", 20).table(PROCESS)
    with pytest.raises(UserError, match=rf"the trigger's largest value is 1: expected above 0 to {LARGEST}"):
        AttackConfig("baddiffusion", "BOX_4", coefficients="clipped").build(PROCESS, (1, 16, 16), table)
    with pytest.raises(UserError, match="heun-20 asks the network twice at a timestep"):
        surviving_coefficient(PROCESS, SamplerConfig("heun", 20).table(PROCESS), SHIFT, 0.5)
    with pytest.raises(UserError, match="clipped coefficients depend on the sampler: expected its table"):
        baddiffusion(PROCESS, R, Y, "clipped")
