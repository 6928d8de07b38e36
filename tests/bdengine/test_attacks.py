"""BadDiffusion against the published golden values, its formulas in float64, and its own trajectory."""

from pathlib import Path

import numpy as np
import pytest
import torch

import bdkernels
from bdengine.attacks import POISONED, AttackConfig, baddiffusion, exact_coefficient, noising_table
from bdengine.attacks.baddiffusion import rho
from bdengine.data import stand_in, to_float
from bdengine.errors import UserError
from bdengine.schedule import linear
from bdengine.solvers import Nodes, SamplerConfig, Table, ddim, ddpm
from bdengine.triggers import target, trigger

PROCESS = linear()
SHIFT = 1 - np.sqrt(PROCESS.alpha_bar)
# t, sqrt(alpha_bar), s, rho, coefficient exact for DDIM(0) on adjacent steps: T = 1000, betas linear 1e-4 .. 0.02.
GOLDEN = np.array(
    [
        (0, 0.999950, 0.010000, 0.005000, 0.005000),
        (1, 0.999890, 0.014829, 0.007415, 0.012415),
        (10, 0.998903, 0.046834, 0.023419, 0.045182),
        (100, 0.946119, 0.323818, 0.161994, 0.322364),
        (250, 0.722096, 0.691793, 0.346337, 0.690830),
        (500, 0.278921, 0.960314, 0.481371, 0.960109),
        (750, 0.057447, 0.998349, 0.501065, 0.998336),
        (900, 0.016439, 0.999865, 0.502206, 0.999864),
        (999, 0.006353, 0.999980, 0.502515, 0.999980),
    ]
)


def test_golden_values() -> None:
    t = GOLDEN[:, 0].astype(int)
    half_a_digit = 5.1e-7
    assert np.abs(np.sqrt(PROCESS.alpha_bar[t]) - GOLDEN[:, 1]).max() < half_a_digit
    assert np.abs(PROCESS.s[t] - GOLDEN[:, 2]).max() < half_a_digit
    assert np.abs(rho(PROCESS)[t] - GOLDEN[:, 3]).max() < half_a_digit
    exact = exact_coefficient(PROCESS, ddim(Nodes.of(PROCESS, 1000)), SHIFT)
    assert np.abs(exact[t] - GOLDEN[:, 4]).max() < half_a_digit


def test_the_published_coefficient_is_exact_for_ddpm_on_every_timestep() -> None:
    for variance in ("small", "large"):
        table = ddpm(Nodes.of(PROCESS, 1000), variance=variance)  # type: ignore[arg-type]
        assert np.abs(exact_coefficient(PROCESS, table, SHIFT) - rho(PROCESS)).max() < 1e-12


def test_psi_zero_shift_needs_the_coefficient_one_under_ddim() -> None:
    exact = exact_coefficient(PROCESS, ddim(Nodes.of(PROCESS, 50)), PROCESS.s)
    assert np.abs(exact - 1).max() < 1e-12


@pytest.mark.parametrize(("t", "stride", "expected"), [(100, 20, 0.2946), (500, 50, 0.9492), (900, 50, 0.9998)])
def test_strided_ddim_golden_values(t: int, stride: int, expected: float) -> None:
    alpha_bar, after = PROCESS.alpha_bar[t], PROCESS.alpha_bar[t - stride]
    ratio = np.sqrt(after / alpha_bar)
    c = (SHIFT[t] * ratio - SHIFT[t - stride]) / (PROCESS.s[t] * ratio - np.sqrt(1 - after))
    assert c == pytest.approx(expected, abs=5e-5)
    table = ddim(Nodes.of(PROCESS, 1000 // stride, "leading"))
    if t in table.timesteps:
        assert exact_coefficient(PROCESS, table, SHIFT)[t] == pytest.approx(c, rel=1e-12)


def attack(name: str = "published", table: Table | None = None):  # noqa: ANN201
    r = trigger("BOX_14", 32, 3)
    return baddiffusion(PROCESS, r, target("CORNER", 32, 3), name, table)  # type: ignore[arg-type]


def test_inputs_and_targets_are_their_formulas_at_every_timestep() -> None:
    """``x_t`` and ``eps + c_t R`` from the kernels, to 1e-6 of float64, clean and poisoned."""
    one = attack()
    x0 = stand_in(32, 3, 2).pixels
    table = noising_table(PROCESS, one)
    poison = {"trigger": one.stamp[None], "mask": one.mask[None]}
    x = to_float(x0).double()
    image = one.mask.double() * x + (1 - one.mask.double()) * one.trigger.double()
    arm = torch.tensor([0, POISONED])
    for t in range(PROCESS.T):
        seeds, times = torch.tensor([t, t + 7]), torch.full((2,), t)
        eps = bdkernels.normal(seeds, (3, 32, 32), stream=bdkernels.STREAM_TRAINING).double()
        root, s = float(np.sqrt(PROCESS.alpha_bar[t])), float(PROCESS.s[t])
        clean = root * x[0] + s * eps[0]
        poisoned = root * one.target.double() + (1 - root) * image[1] + s * eps[1]
        x_t = bdkernels.fused_noising(x0, times, arm, seeds, table, target=one.target[None], **poison)
        assert (x_t.double() - torch.stack([clean, poisoned])).abs().max() < 1e-6
        prediction = torch.zeros(2, 3, 32, 32, requires_grad=True)
        bdkernels.fused_loss(prediction, x0, times, arm, seeds, table, **poison, reduction="sum").sum().backward()
        assert prediction.grad is not None
        got = -prediction.grad.double()  # d/dp of mean over 2 samples of (p - target)^2, at p = 0
        expected = torch.stack([eps[0], eps[1] + float(rho(PROCESS)[t]) * image[1]])
        assert (got - expected).abs().max() < 1e-6


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_a_perfect_network_follows_the_shift_at_every_node_if_exact_and_leaves_it_if_published(steps: int) -> None:
    """``x_t = sqrt(alpha_bar_t) y + m_t r + s_t eps`` all along a deterministic sampler, float64."""
    table = ddim(Nodes.of(PROCESS, steps))
    rows, t = torch.tensor(table.rows[None]), table.timesteps.astype(int)
    off = {}
    for name in ("published", "exact"):
        one = attack(name, table)
        y, r = one.target.double()[None], one.trigger.double()[None]
        eps = bdkernels.normal(torch.tensor([1]), (3, 32, 32), dtype=torch.float64)

        def path(now: int, y=y, r=r, eps=eps) -> torch.Tensor:  # noqa: ANN001
            root = float(np.sqrt(PROCESS.alpha_bar[now]))
            return root * y + SHIFT[now] * r + float(PROCESS.s[now]) * eps

        x, off[name], zero = path(t[0]), 0.0, torch.tensor([0])
        for row, now in enumerate(t):
            off[name] = max(off[name], float((x - path(now)).abs().max()))
            root, s = float(np.sqrt(PROCESS.alpha_bar[now])), float(PROCESS.s[now])
            prediction = (x - root * y - SHIFT[now] * r) / s + one.coefficient[now] * r
            x = bdkernels.fused_step(x, prediction, rows, zero, torch.tensor(row), zero)
    assert off["exact"] < 1e-10
    assert off["published"] > 0.1


def test_bad_attacks_get_a_sentence() -> None:
    shape, table = (1, 16, 16), SamplerConfig(steps=20).table(PROCESS)
    for config, message in (
        (AttackConfig("badifusion"), "unknown attack 'badifusion'.*nearest is 'baddiffusion'"),
        (AttackConfig("baddiffusion", "BOX_4", rate=1.5), "the poison rate is 1.5: expected 0 to 1"),
        (AttackConfig("baddiffusion", "BOX_41"), "unknown trigger 'BOX_41'.*nearest is 'BOX_4'"),
        (AttackConfig("baddiffusion", "BOX_4", coefficients="exat"), "unknown coefficient 'exat'"),  # type: ignore[arg-type]
        (AttackConfig(trigger="BOX_4", rate=0.5), "the attack's trigger is BOX_4 and no attack is named"),
        (
            AttackConfig("baddiffusion", rate=0.0),
            "the poison rate is 0 and the attack is baddiffusion: expected above 0",
        ),
        (
            AttackConfig("baddiffusion", "BOX_4", psi=0.5),
            "psi is 0.5 and baddiffusion has none: expected it with villan alone",
        ),
        (AttackConfig("trojdiff", "BOX_4", coefficients="exact"), "coefficients is exact and trojdiff has none"),
        (AttackConfig("invi", "LEARNED", solver="ode"), "solver is ode and invi has none"),
        (AttackConfig("uib", "BOX_4", solver="odd"), "unknown solver 'odd'"),  # type: ignore[arg-type]
        (
            AttackConfig("villan", "BOX_4", solver="ode", coefficients="exact"),
            "the solver is ode and the coefficients are exact, which are the sampler's own",
        ),
        (
            AttackConfig("trojdiff", "BOX_4", "CLASS_7", target_file=Path("seven.png")),
            r"the target CLASS_7 is a class and takes no picture, and seven\.png was given",
        ),
        (AttackConfig("invi", "LEARNED", coefficients="clipped"), "expected published or exact"),
        (AttackConfig("uib", "LEARNED", "NOSHIFT"), "the target NOSHIFT is made of the trigger, which is LEARNED"),
    ):
        with pytest.raises(UserError, match=message):
            config.build(PROCESS, shape, table)
    bare = AttackConfig("villan", "BOX_4", trigger_only=True).build(PROCESS, shape, table)
    assert bare is not None
    assert not bare.mask.any()
    with pytest.raises(UserError, match="expected its table"):
        attack("exact")
    assert AttackConfig().build(PROCESS, shape, table) is None
