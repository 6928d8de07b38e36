"""Elijah's inversion: its first step against plain torch, and what it finds in networks known in closed form."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import bdkernels
from bdengine.arms import Arm
from bdengine.attacks import trojdiff
from bdengine.defenses import Subject, elijah, features
from bdengine.defenses.elijah import VARIANTS
from bdengine.defenses.subject import Watch, run_seeds
from bdengine.errors import UserError
from bdengine.extractors import DigitFeatures
from bdengine.metrics import attack_success
from bdengine.oracle import Gaussian, Oracle
from bdengine.schedule import Exploding
from bdengine.solvers import Nodes, score_sde
from bdkernels import noise as contract

from .networks_for_tests import tiny_unet
from .subjects_for_tests import ATTACK, DDPM, PIXELS, PROCESS, SHAPE, TARGET, R, cosine, subject

PUBLISHED = VARIANTS["baddiffusion"]


def numpy_noises(count: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    seeds = contract.sample_seeds(seed, np.arange(count))
    return torch.from_numpy(contract.normal(seeds, shape, stream=bdkernels.STREAM_TRAINING))


@pytest.mark.parametrize("variant", ["baddiffusion", "trojdiff", "ode"])
def test_its_first_step_is_that_of_a_few_lines_of_torch(variant: str) -> None:
    network, config = tiny_unet(), replace(VARIANTS[variant], iterations=1, noises=20)
    start, _ = elijah.invert(Subject(network, PROCESS, DDPM), replace(config, lr=0.0))
    after, losses = elijah.invert(Subject(network, PROCESS, DDPM), config)

    low, high = config.start
    assert low <= float(start.min()) < low + 0.1 * (high - low)
    assert high - 0.1 * (high - low) < float(start.max()) <= high
    tau = start.clone().requires_grad_()
    out = network(numpy_noises(20, start.shape) + tau, torch.tensor(999))
    loss = (out.mean(0) - {"ode": 1.0}.get(variant, 0.5) * tau).abs().mean()
    (gradient,) = torch.autograd.grad(loss, tau)
    assert losses == pytest.approx([float(loss.detach())], rel=1e-6)
    torch.testing.assert_close(after, start - 0.1 * gradient / (gradient.abs() + 1e-8), rtol=0, atol=1e-5)


def test_a_variance_exploding_models_loss_is_the_published_one() -> None:
    """``|tau - mean score (-380 / 0.5)|`` of the released code is twice ``|-380 mean score - 0.5 tau|``."""
    sigmas = np.geomspace(0.01, 380, 50)
    data = [(1.0, Gaussian(torch.full((1, 4, 4), 0.5), 0.1 * torch.eye(16)))]
    oracle = Oracle(Exploding(sigmas), data, prediction="score")
    table = score_sde(Nodes.exploding(sigmas[::-1].copy()))
    ours = Subject(oracle, None, table)  # type: ignore[arg-type]
    tau, eps = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)), numpy_noises(8, (1, 4, 4))
    score = oracle(380 * (eps + tau), torch.tensor(380.0)).mean(0)
    published = (tau[0] - score * (-380 / 0.5)).abs().mean()
    assert float(elijah.loss(ours, tau, eps, 0.5)) == pytest.approx(float(published) / 2, rel=1e-4)
    with pytest.raises(UserError, match="terd needs betas"):
        ours.preserving("terd")


@pytest.mark.parametrize("variant", ["baddiffusion", "background"])
@pytest.mark.parametrize("rate", [0.1, 0.0])
def test_it_ends_where_the_closed_form_says(variant: str, rate: float) -> None:
    """Within a step of Adam (0.1) of the module's ``tau*`` in every pixel, backdoored and clean.

    With 100 noises ``tau*`` itself is 2 x 0.1 a pixel off the trigger: a relative error of 0.265 and a cosine of 0.967.
    """
    found = elijah.examine(subject(rate), VARIANTS[variant])
    assert found.trigger is not None
    eps = numpy_noises(100, SHAPE).mean(0)
    there = float(ATTACK.shift[999] - ATTACK.coefficient[999]) * R * (rate > 0)
    assert (found.trigger - (there - eps) / 0.5).abs().max() < 0.1
    assert found.evaluations == 100 * 100 + 20 * 16
    if rate:
        assert cosine(found.trigger, R) > 0.95
        assert (found.trigger - R).norm() / R.norm() < 0.3
    else:
        assert abs(cosine(found.trigger, R)) < 4 / PIXELS**0.5  # 4 deviations of a random direction's


def test_the_images_of_a_backdoor_are_alike() -> None:
    backdoored, clean = (elijah.examine(subject(rate), PUBLISHED) for rate in (0.1, 0.0))
    assert backdoored.images is not None
    assert clean.images is not None
    assert attack_success(backdoored.images, TARGET, 0.01) == 1
    assert attack_success(clean.images, TARGET, 0.01) == 0
    assert backdoored.details["uniformity"] < 1e-5
    assert clean.details["uniformity"] > 0.04  # the data's deviation is 0.141, so images are 0.1 apart in [0, 1] units
    assert backdoored.statistic > clean.statistic
    assert backdoored.verdict == clean.verdict == "undecided"


def test_a_run_has_the_same_bits_again_and_trains_no_weight() -> None:
    network = tiny_unet().requires_grad_(True)
    ours, config = Subject(network, PROCESS, DDPM), replace(PUBLISHED, iterations=3, noises=10)
    first, again = (elijah.examine(ours, config) for _ in range(2))
    other = elijah.examine(ours, replace(config, seed=1))
    for a, b, c in zip(*((f.trigger, f.images) for f in (first, again, other)), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    assert first.statistic == again.statistic
    assert all(p.grad is None and p.requires_grad for p in network.parameters())


def test_while_it_is_watched_a_network_is_frozen() -> None:
    network = tiny_unet().requires_grad_(True).train()
    with Watch(Subject(network, PROCESS, DDPM)) as watch:
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())
        network(torch.zeros(3, 1, 8, 8), torch.tensor(5))
    assert watch.evaluations == 3
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    network(torch.zeros(3, 1, 8, 8), torch.tensor(5))
    assert watch.evaluations == 3


def test_trojdiffs_images_have_the_shift_in_every_step() -> None:
    """The closed form of TrojDiff with ``gamma`` known: its own ``mu`` leads to the target, in the start alone it does not."""
    attack = trojdiff(PROCESS, torch.ones(SHAPE), TARGET, gamma=0.6)
    ours = subject(0.2, attack)
    arms = (elijah.arm_of(ours, attack.trigger, 0.6), Arm(DDPM, attack.trigger))
    shares = [attack_success(ours.images(arm, 16), TARGET, 0.01) for arm in arms]
    assert shares == [1.0, 0.0]


def test_uniformity_trims_and_total_variation_sums() -> None:
    levels = torch.tensor([0.0, 0.1, 0.2, 0.4, 0.8, 0.9, 0.5, -0.3])
    images = levels.reshape(-1, 1, 1, 1).expand(-1, 1, 3, 3)
    pairs = (levels[:, None] - levels).abs() / 2
    rows = pairs.sort(dim=1).values[:, 2:6].mean(1)
    assert features.uniformity(images) == pytest.approx(float(rows.sort().values[2:6].mean()), abs=1e-6)
    assert features.uniformity(images[:1].expand(16, -1, -1, -1)) == 0
    ramp = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert features.total_variation(torch.cat([ramp, 0 * ramp])) == pytest.approx((4 * 1 + 3 * 3) / 2)


def test_uniformity_of_digits_by_features() -> None:
    noise = bdkernels.normal(run_seeds(0, 16, torch.device("cpu")), (1, 16, 16)).clamp(-1, 1)
    apart, alike = (features.uniformity(x, DigitFeatures()) for x in (noise, noise[:1] + 0.01 * noise))
    assert alike < 0.05 * apart
