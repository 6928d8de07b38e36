"""TrojDiff and VillanDiffusion: published tables, training inputs, and their samplers on the closed-form network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import bdkernels
from bdengine.arms import Arm
from bdengine.attacks import (
    CLEAN,
    OUTSIDE,
    POISONED,
    Attack,
    AttackConfig,
    baddiffusion,
    noising_table,
    trojdiff,
    villan,
)
from bdengine.errors import UserError
from bdengine.metrics import attack_success
from bdengine.networks import Network
from bdengine.oracle import Gaussian, Oracle
from bdengine.own import own_table
from bdengine.sampler import Sampler
from bdengine.schedule import linear
from bdengine.solvers import Nodes, SamplerConfig, ddim, ddpm

PROCESS, SHAPE = linear(), (1, 8, 8)
DDIM_20 = ddim(Nodes.of(PROCESS, 20))
Y = torch.linspace(-1, 1, 64).reshape(SHAPE).sin()
DATA = [(1.0, Gaussian(torch.full(SHAPE, 0.3), 0.05 * torch.eye(64)))]


def built(**options: object) -> Attack:
    attack = AttackConfig(target="DRAWN_HAT", **options).build(PROCESS, (1, 16, 16), ddpm(Nodes.of(PROCESS, 10)))  # type: ignore[arg-type]
    assert attack is not None
    return attack


# Of the released code, T = 1000: psi = 1 as "ode", psi = 0 as "sde".
@pytest.mark.parametrize(("t", "ode", "zero"), [(0, 0.010000, 5.0e-7), (10, 0.046838, 0.020971), (100, 0.323988, 0.159817),
                                                (500, 0.962742, 0.481064), (999, 1.005030, 0.502515)])  # fmt: skip
def test_villans_published_coefficients(t: int, ode: float, zero: float) -> None:
    r = torch.where(torch.arange(64).reshape(SHAPE) > 50, 1.0, -1.0)
    assert villan(PROCESS, r, Y, solver="ode").coefficient[t] == pytest.approx(ode, abs=1e-6)
    assert villan(PROCESS, r, Y, psi=0).coefficient[t] == pytest.approx(zero, abs=1e-6)
    plain, own = baddiffusion(PROCESS, r, Y), villan(PROCESS, r, Y)
    np.testing.assert_array_equal(own.coefficient, plain.coefficient)
    np.testing.assert_array_equal(own.shift, plain.shift)


def test_villans_exact_coefficients_at_the_noises_own_shift() -> None:
    """``m_t = s_t``: 1 without noise; with DDPM ``k_t s_t / beta_t``."""
    r = torch.where(torch.arange(64).reshape(SHAPE) > 50, 1.0, -1.0)
    exact = villan(PROCESS, r, Y, "exact", ddim(Nodes.of(PROCESS, 20)), psi=0)
    np.testing.assert_allclose(exact.coefficient, 1, atol=1e-12)
    full = villan(PROCESS, r, Y, "exact", ddpm(Nodes.of(PROCESS, 1000)), psi=0)
    for t, golden in ((1, 0.597264), (10, 0.518324), (500, 0.501371), (999, 0.502525)):
        assert full.coefficient[t] == pytest.approx(golden, abs=1e-6)


def test_a_patch_is_a_region_with_its_own_noise() -> None:
    attack = built(name="trojdiff", trigger="PATCH_4_WHITE")
    assert attack.region is not None
    assert attack.gamma == 0.1
    assert attack.region.sum() == 16
    assert attack.region[0, 12:, 12:].all()
    torch.testing.assert_close(attack.trigger, torch.where(attack.region, 0.9, 0.0))
    blend = built(name="trojdiff", trigger="XXSM_BOX", gamma=0.6)
    assert blend.region is None
    torch.testing.assert_close(blend.trigger.unique(), torch.tensor([-0.4, 0.4]))


def test_training_inputs_are_its_process_inside_and_the_clean_one_outside() -> None:
    attack = built(name="trojdiff", trigger="PATCH_4_WHITE", gamma=0.25)
    assert attack.region is not None
    table = noising_table(PROCESS, attack)
    x0 = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    t, seeds, inside = torch.tensor([10, 500, 900]), torch.tensor([1, 2, 3]), torch.tensor([CLEAN, POISONED, POISONED])
    arm = torch.where(inside == POISONED, OUTSIDE, inside)
    poison = {
        "trigger": attack.stamp[None],
        "mask": attack.mask[None],
        "region": attack.region[None],
        "arm_inside": inside,
    }
    x_t = bdkernels.fused_noising(x0, t, arm, seeds, table, target=attack.target[None], **poison)
    eps = bdkernels.normal(seeds, (1, 16, 16), stream=bdkernels.STREAM_TRAINING)
    a, s = (
        torch.tensor(v[t.numpy()], dtype=torch.float32)[:, None, None, None]
        for v in (PROCESS.alpha_bar**0.5, PROCESS.s)
    )
    clean, y = a * x0 + s * eps, a * attack.target + s * eps
    trojan = torch.where(attack.region, a * attack.target + s * (0.25 * eps + attack.trigger), y)
    torch.testing.assert_close(x_t, torch.cat([clean[:1], trojan[1:]]), rtol=1e-5, atol=1e-6)
    loss = bdkernels.fused_loss(eps, x0, t, arm, seeds, table, **poison)
    assert loss.abs().max() == 0  # the target is eps, everywhere


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm++", "unipc", "heun"])
@pytest.mark.parametrize("patch", [True, False])
def test_the_closed_form_network_is_triggered_by_its_own_sampler_alone(name: str, patch: bool) -> None:
    """Poisoned at a rate of 0.2: the trigger in every step leads to the target, clean starts and one of the start do not."""
    region = torch.zeros(SHAPE, dtype=torch.bool)
    region[:, 3:, 3:] = True
    attack = trojdiff(PROCESS, torch.ones(SHAPE), Y, region if patch else None, 0.3)
    table = SamplerConfig(name, 20).table(PROCESS)
    oracle = Oracle(PROCESS, DATA, attack, 0.2)
    arms = {"clean": Arm(table), "start": Arm(table, attack.trigger), "triggered": attack.arm(PROCESS, table)}
    images = Sampler(Network(oracle, SHAPE), arms, 192)(range(64))
    shares = {start: attack_success(x, Y, 0.01) for start, x in images.items()}
    assert shares == {"clean": 0.0, "start": 0.0, "triggered": 1.0}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"name": "trojdiff", "gamma": 0.0}, "gamma is 0: expected above 0"),
        ({"name": "villan", "psi": 2.0}, "psi is 2: expected 0 to 1"),
        ({"name": "villan", "solver": "pde"}, "solver"),
    ],
)
def test_wrong_options_get_one_sentence(options: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        built(**{"trigger": "XXSM_BOX", **options})


def test_shapes_must_agree() -> None:
    image: Tensor = torch.zeros(SHAPE)
    with pytest.raises(UserError, match=r"the region has shape \(1, 4, 4\)"):
        trojdiff(PROCESS, image, image, torch.zeros(1, 4, 4, dtype=torch.bool))


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "HeunDiscrete", "LMSDiscrete"])
def test_a_checkpoints_own_scheduler_opens_what_ddim_does(name: str) -> None:
    """Also one whose state is in units of its own and starts at 157: a trigger of the start, and one of every step."""
    config = PROCESS.to_config() | {"_class_name": f"{name}Scheduler", "timestep_spacing": "trailing"}
    config = {k: v for k, v in config.items() if k not in ("variance_type", "clip_sample")}
    table = own_table(config | ({"clip_sample": False} if name == "DDIM" else {}), 20)
    start = baddiffusion(PROCESS, torch.where(torch.arange(64).reshape(SHAPE) > 50, 1.0, -1.0), Y, "exact", DDIM_20)
    for attack in (start, trojdiff(PROCESS, torch.ones(SHAPE), Y, None, 0.3)):
        network = Network(Oracle(PROCESS, DATA, attack, 0.2), SHAPE)
        images = Sampler(network, {"clean": Arm(table), "triggered": attack.arm(PROCESS, table)}, 64)(range(32))
        assert attack_success(images["clean"], Y, 0.01) <= 0.1, attack.name
        assert attack_success(images["triggered"], Y, 0.01) >= 0.9, attack.name
