"""VillanDiffusion, variance exploding: golden values, and the closed-form score network under predictor and corrector."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bdengine.arms import Arm
from bdengine.attacks import AttackConfig
from bdengine.attacks.villan_ve import exact_exploding, published, villan_ve
from bdengine.errors import UserError
from bdengine.metrics import attack_success
from bdengine.networks import Network
from bdengine.oracle import Gaussian, Oracle
from bdengine.sampler import Sampler
from bdengine.schedule import Exploding, Floats
from bdengine.solvers import Nodes, Table, edm, score_sde
from bdengine.solvers.nodes import karras

SHAPE = (1, 16, 16)
BOX, Y = torch.zeros(SHAPE), torch.zeros(SHAPE)
BOX[:, 6:14, 6:14], Y[:, :8, :8] = 1, 0.7
POWER = 0.25
RELEASED = np.geomspace(0.01, 380, 2000)
SIGMAS = np.geomspace(0.01, 50, 100)


def sampler(sigmas: Floats, corrector_steps: int = 0, snr: float = 0.16, ancestral: bool = False) -> Table:
    nodes = Nodes.exploding(sigmas[::-1].copy())
    return score_sde(nodes, corrector_steps=corrector_steps, snr=snr, ancestral=ancestral)


def shares(table: Table, coefficient: Floats, count: int = 200) -> Tensor:
    """``u / sigma`` before each level, float64 [levels, count]: by what a run with ``r`` is off one of equal noise without."""
    steps = len(table) // len(SIGMAS)
    states = []
    for r in (BOX, torch.zeros(SHAPE)):
        attack = replace(villan_ve(SIGMAS, r, Y), coefficient=coefficient)
        network = Oracle(Exploding(SIGMAS), [(1.0, Gaussian(Y))], attack, 1.0, "score")
        seen: list[Tensor] = []
        run = Sampler(Network(network, SHAPE), {"": Arm(table, r)}, count)
        run.batch(
            torch.zeros(count, dtype=torch.int64), torch.arange(count), lambda _, x, seen=seen: seen.append(x.double().clone())
        )  # fmt: skip
        states.append(torch.stack(seen[:-1:steps]))
    off = ((states[0] - states[1]) * BOX).sum((2, 3, 4)) / BOX.square().sum()
    return off / torch.tensor(SIGMAS[::-1].copy())[:, None]


def half_poisoned(sampled: Table, **attack: Any) -> dict[str, float]:
    """ASR by start of 64 samples each, of the network of 64 pixels that is optimal at a poison rate of 0.5."""
    shape = (1, 8, 8)
    r, y = torch.zeros(shape), torch.zeros(shape)
    r[:, 1:7, 1:7], y[:, :4, :4] = 1, 0.7
    data = [(1.0, Gaussian(torch.full(shape, 0.5), 0.02 * torch.eye(64)))]
    oracle = Oracle(Exploding(SIGMAS), data, villan_ve(SIGMAS, r, y, **attack), 0.5, "score")
    images = Sampler(Network(oracle, shape), {"clean": Arm(sampled), "triggered": Arm(sampled, r)}, 128)(range(64))
    return {start: attack_success(2 * x - 1, 2 * y - 1, 0.01) for start, x in images.items()}


def test_golden_values() -> None:
    c = published(RELEASED)
    assert c[0] == 1
    assert c[1:] == pytest.approx(0.5013, abs=5e-5)
    assert np.abs(exact_exploding(sampler(RELEASED), RELEASED, POWER) - c).max() < 1e-10


def test_one_corrector_step_halves_the_coefficient() -> None:
    """The closed form of the module, up to the noise's variance that it takes for ``sigma^2``."""
    snr, q = 0.075, RELEASED[999] / RELEASED[1000]
    c = 0.5
    for _ in range(20):
        e = 2 * snr**2 / (1 + c**2 * POWER)
        c = (1 - q) / (1 - q**2 * (1 - e))
    found = exact_exploding(sampler(RELEASED, 1, snr), RELEASED, POWER)
    assert found[1000] == pytest.approx(c, rel=0.01)
    assert c == pytest.approx(0.2451, abs=5e-5)
    assert found[0] == 1


def test_a_predictor_alone_keeps_the_trigger_at_every_level_of_every_sample() -> None:
    """To the rounding of float32 states: 6e-8 of a pixel near 1, over a sigma of 0.01."""
    for ancestral in (False, True):
        table = sampler(SIGMAS, ancestral=ancestral)
        off = shares(table, exact_exploding(table, SIGMAS, POWER)) - 1
        assert float(off.abs().max()) < 6e-6


@pytest.mark.parametrize(("steps", "snr", "left"), [(1, 0.075, 0.045), (1, 0.16, 0.16), (3, 0.16, 0.3)])
def test_with_a_corrector_the_exact_one_keeps_it_in_the_mean_and_the_published_leaves_it(
    steps: int, snr: float, left: float
) -> None:
    """The mean over samples at all 100 levels. 0.004: samples differ in their norms, which is of the order of ``e c / D``."""
    table = sampler(SIGMAS, steps, snr)
    exact, known = (shares(table, c).mean(1) - 1 for c in (exact_exploding(table, SIGMAS, POWER), published(SIGMAS)))
    assert float(exact.abs().max()) < 0.0045
    assert float(known.abs().max()) > left


def test_the_exact_coefficient_gives_the_attack_back_that_the_corrector_takes() -> None:
    """Half poisoned, 64 pixels, 3 corrector steps: of 64 triggered samples 83 % reach the target, 8 % as published."""
    table = sampler(SIGMAS, 3)
    success = {c: half_poisoned(table, coefficients=c, table=table) for c in ("published", "exact")}
    assert success["published"]["triggered"] < 0.2
    assert success["exact"]["triggered"] > 0.7
    assert success["exact"]["clean"] < 0.2


def test_published_without_noise_is_twice_that_with_noise() -> None:
    ode = AttackConfig("villan", "BOX_4", solver="ode").build(Exploding(SIGMAS), (1, 16, 16), sampler(SIGMAS))
    assert ode is not None
    assert ode.coefficient.tolist() == (2 * published(SIGMAS)).tolist()


def test_the_published_one_without_noise_is_for_edms_sampler() -> None:
    """Half poisoned, 64 pixels: of 64 triggered samples 97 % reach the target, 42 % with that of samplers with noise."""
    table = edm(Nodes.exploding(karras(50.0, 0.01, 20)))
    success = {solver: half_poisoned(table, solver=solver) for solver in ("sde", "ode")}
    assert success["sde"]["triggered"] < 0.6
    assert success["ode"]["triggered"] > 0.9
    assert success["ode"]["clean"] < 0.1


def test_bad_attacks_get_a_sentence() -> None:
    with pytest.raises(UserError, match="the sampler edm-100 is no predictor, which exact coefficients are for"):
        villan_ve(SIGMAS, BOX, Y, "exact", edm(Nodes.exploding(SIGMAS[::-1].copy())))
    with pytest.raises(UserError, match="unknown solver 'odd'"):
        villan_ve(SIGMAS, BOX, Y, solver="odd")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"psi is 0\.5 and the process is variance exploding: expected none"):
        AttackConfig("villan", "BOX_4", psi=0.5).build(Exploding(SIGMAS), (1, 16, 16), sampler(SIGMAS))
    with pytest.raises(UserError, match="expected its table"):
        villan_ve(SIGMAS, BOX, Y, "exact")
    with pytest.raises(UserError, match="unknown coefficient 'exat'"):
        villan_ve(SIGMAS, BOX, Y, "exat")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"the target has shape \(1, 8, 8\)"):
        villan_ve(SIGMAS, BOX, torch.zeros(1, 8, 8))
