"""The exact coefficient, at every node of every sampler, with the network that is optimal for poisoned data alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

import bdkernels
from bdengine.attacks import Attack, baddiffusion, departure, exact_coefficient
from bdengine.attacks.baddiffusion import rho
from bdengine.attacks.clipped import surviving_coefficient
from bdengine.errors import UserError
from bdengine.networks import Network
from bdengine.oracle import Gaussian, Oracle
from bdengine.sampler import Sampler
from bdengine.schedule import Floats, linear
from bdengine.solvers import SAMPLERS, SamplerConfig, Table, stack
from bdengine.triggers import target, trigger
from bdkernels import Step

PROCESS = linear()
SHIFT = 1 - np.sqrt(PROCESS.alpha_bar)
SEEDS = torch.tensor([3, 4])
R, Y = trigger("BOX_4", 8, 1), torch.linspace(-1, 1, 64).reshape(1, 8, 8)


def sampler(name: str, order: int | None, steps: int) -> Table:
    # DPM-Solver predicts noise, and so cannot end in the data above order 1.
    end = "min" if name.startswith("dpm") and "++" not in name else "zero"
    return SamplerConfig(name, steps, order=order, end=end).table(PROCESS)  # type: ignore[arg-type]


EVERY = [(name, order) for name, kind in SAMPLERS.items() for order in (kind.orders or (None,))]
DETERMINISTIC = [(name, order) for name, order in EVERY if not SAMPLERS[name].noise]
STOCHASTIC = [(name, order) for name, order in EVERY if SAMPLERS[name].noise]


def attack(shift: Floats, coefficient: Floats) -> Attack:
    """Poisoned with the bare trigger: ``R = r``."""
    return Attack("shifted", shift, coefficient, 1.0, R, R, torch.zeros_like(R), Y)


def furthest(table: Table, one: Attack, dtype: torch.dtype, network_dtype: torch.dtype | None = None) -> float:
    """The largest distance from ``sqrt(abar) y + m r + s eps`` at the nodes, starting there, over the largest state."""
    network = Oracle(PROCESS, [(1.0, Gaussian(Y))], one, poison_rate=1.0)
    times = np.append(table.timesteps, -1.0 if table.end == "zero" else 0.0)
    eps = bdkernels.normal(SEEDS, tuple(R.shape), dtype=torch.float64)

    def path(time: float) -> Tensor:
        if time < 0:
            return Y.double().expand(2, -1, -1, -1)
        alpha_bar = float(PROCESS.alpha_bar_at(np.array([time]))[0])
        m = float(np.interp(time, np.arange(PROCESS.T), one.shift))
        return alpha_bar**0.5 * Y.double() + m * R.double() + (1 - alpha_bar) ** 0.5 * eps

    rows, arm = stack([table], dtype), torch.zeros(2, dtype=torch.int64)
    x = path(times[0]).to(dtype)
    history = x.new_zeros((table.slots, *x.shape)) if table.slots else None
    worst, largest = 0.0, float(x.abs().max())
    for row, time in enumerate(times[:-1]):
        m = network(x.double(), torch.full((2,), time, dtype=torch.float64)).to(network_dtype or dtype).to(dtype)
        bdkernels.fused_step_(x, m, rows, arm, torch.tensor(row), SEEDS, history=history)
        provisional = row + 2 < len(times) and times[row + 1] == times[row + 2]
        if not provisional:
            worst = max(worst, float((x.double() - path(times[row + 1])).abs().max()))
    return worst / largest


@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize(("name", "order"), DETERMINISTIC)
def test_exact_follows_the_path_at_every_node_and_published_leaves_it(name: str, order: int | None, steps: int) -> None:
    table = sampler(name, order, steps)
    exact = attack(SHIFT, exact_coefficient(PROCESS, table, SHIFT))
    # Heun's has no exact solution: what its least squares leaves is what `departure` says.
    left = np.nanmax(np.abs(departure(PROCESS, table, SHIFT, exact.coefficient)))
    assert left < (1e-12 if name != "heun" else 0.05)
    assert furthest(table, exact, torch.float64) < 1e-10 + left
    # PLMS moves by ``alpha' / alpha x``, 157 in all: with 10 steps its first ones multiply each rounding by most of that.
    assert furthest(table, exact, torch.float32) < (2e-5 if (name, steps) == ("plms", 10) else 1e-5) + left
    assert furthest(table, attack(SHIFT, rho(PROCESS)), torch.float64) > 0.1


@pytest.mark.parametrize(("name", "order"), DETERMINISTIC)
def test_a_shift_that_is_the_noise_level_needs_the_coefficient_one_everywhere(name: str, order: int | None) -> None:
    one = attack(PROCESS.s, np.ones(PROCESS.T))
    assert furthest(sampler(name, order, 20), one, torch.float64) < 1e-10


@pytest.mark.parametrize(("name", "order"), STOCHASTIC)
def test_stochastic_samplers_keep_the_law_of_the_path(name: str, order: int | None) -> None:
    """Mean and variance at the 10th of 20 nodes, over 20,000 samples of 4 pixels that are alike but for their noise.

    Both statistics are normal to good approximation; |.| < 5 for each of 2 x 4 x the samplers: an error rate below 1e-5.
    """
    r, y, count = (
        torch.tensor([1.0, -1, 0.5, 0]).reshape(1, 2, 2),
        torch.tensor([-0.3, 0.8, 0, 1]).reshape(1, 2, 2),
        20_000,
    )
    table = sampler(name, order, 20)
    c = exact_coefficient(PROCESS, table, SHIFT)
    one = Attack("shifted", SHIFT, c, 1.0, r, r, torch.zeros_like(r), y)
    network = Oracle(PROCESS, [(1.0, Gaussian(y))], one, poison_rate=1.0)
    seeds, arm = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    rows = stack([table])
    first = int(table.timesteps[0])

    def mean(t: int) -> Tensor:
        return float(np.sqrt(PROCESS.alpha_bar[t])) * y + float(SHIFT[t]) * r

    x = mean(first) + float(PROCESS.s[first]) * bdkernels.normal(seeds, (1, 2, 2))
    history = x.new_zeros((table.slots, *x.shape)) if table.slots else None
    for row in range(10):
        m = network(x, torch.full((count,), table.timesteps[row]))
        bdkernels.fused_step_(x, m, rows, arm, torch.tensor(row), seeds, history=history)
    t = int(table.timesteps[10])
    e = (x - mean(t)).double() / float(PROCESS.s[t])
    assert (e.mean(0).abs() * count**0.5).max() < 5
    published = attack(SHIFT, rho(PROCESS))
    assert np.abs(departure(PROCESS, table, SHIFT, published.coefficient))[9] > 0.005
    if order != 2 and order != 3:  # a multistep SDE solver is not exact in its variance
        assert ((e.square().mean(0) - 1).abs() * (count / 2) ** 0.5).max() < 5


def test_departure_is_what_the_kernel_does() -> None:
    table = sampler("dpm++", 2, 20)
    one = attack(SHIFT, rho(PROCESS))
    off = departure(PROCESS, table, SHIFT, rho(PROCESS))
    start = bdkernels.normal(SEEDS, tuple(R.shape), dtype=torch.float64) * float(PROCESS.s[999])
    start = start + 0.0063528 * Y.double() + float(SHIFT[999]) * R.double()
    got = furthest(table, one, torch.float64) * float(start.abs().max())
    assert got == pytest.approx(np.abs(off).max() * float(R.abs().max()), rel=1e-4)


def test_one_step_samplers_have_their_closed_form() -> None:
    """``c_t = h_t s_t / beta_t`` for DDPM with every timestep, which is the published coefficient."""
    table = SamplerConfig("ddpm", 1000).table(PROCESS)
    assert np.abs(exact_coefficient(PROCESS, table, SHIFT) - rho(PROCESS)).max() < 1e-12


def test_a_state_in_another_scale_has_the_same_coefficient_and_the_same_clip() -> None:
    """Euler of k-diffusion asks with ``x / sqrt(sigma^2 + 1)``, and is DDIM on its own timesteps but for the start's scale."""
    scheduler = EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    euler, own = Table.from_diffusers(scheduler), sampler("ddim", None, 20)
    assert euler.rows[0, Step.IN] < 0.01
    assert euler.timesteps.tolist() == own.timesteps.tolist()
    pairs = [
        (exact_coefficient(PROCESS, table, SHIFT), surviving_coefficient(PROCESS, table, SHIFT, 0.5))
        for table in (euler, own)
    ]
    for ours, theirs in zip(*pairs, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6)
    assert np.abs(departure(PROCESS, euler, SHIFT, pairs[0][0])).max() < 1e-10
    one = baddiffusion(PROCESS, R, Y, "exact", euler, trigger_only=True)
    network = Network(
        Oracle(PROCESS, [(1.0, Gaussian(torch.full(R.shape, -0.8), 0.1 * torch.eye(64)))], one, 0.2), R.shape
    )
    for clip in ("none", "latent"):
        arms = {table.name: one.arm(PROCESS, table).clipped(clip) for table in (euler, own)}  # type: ignore[arg-type]
        first, second = Sampler(network, arms, 16)(range(8)).values()
        torch.testing.assert_close(first, second, rtol=0, atol=2e-3)


def test_only_networks_that_predict_noise_have_one() -> None:
    process = type(PROCESS)(PROCESS.betas, "linear", "v_prediction")
    with pytest.raises(UserError, match="the network predicts v_prediction: expected epsilon"):
        exact_coefficient(process, SamplerConfig("ddim", 10).table(process), SHIFT)
    assert baddiffusion(PROCESS, R, target("DRAWN_HAT", 8, 1), "published").coefficient.shape == (1000,)
