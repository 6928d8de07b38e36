"""TERD: its losses against plain torch, its input test at the predicted error, and what ``F`` says of closed forms."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor

import bdkernels
from bdengine.attacks import trojdiff
from bdengine.defenses import Subject, terd
from bdengine.defenses.terd import VARIANTS, Inversion
from bdengine.metrics import attack_success
from bdkernels import noise as contract

from .networks_for_tests import tiny_unet
from .subjects_for_tests import DDPM, PROCESS, SHAPE, TARGET, R, subject

PUBLISHED, TROJAN = VARIANTS["baddiffusion"], VARIANTS["trojdiff"]


def drawn(iteration: int, count: int, shape: tuple[int, ...]) -> list[Tensor]:
    seeds = contract.sample_seeds(0, np.arange(count))
    streams = (bdkernels.STREAM_INITIAL, bdkernels.STREAM_TRAINING, bdkernels.STREAM_STEP)
    return [torch.from_numpy(contract.normal(seeds, shape, iteration, stream)) for stream in streams]


def levels(t: Tensor) -> tuple[Tensor, Tensor]:
    table = torch.tensor(np.stack([PROCESS.alpha_bar**0.5, PROCESS.s]), dtype=torch.float32)
    return table[0, t].reshape(-1, 1, 1, 1), table[1, t].reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("config", [PUBLISHED, TROJAN], ids=["baddiffusion", "trojdiff"])
def test_its_losses_are_those_of_a_few_lines_of_torch(config: terd.TerdConfig) -> None:
    """Both stages, value and gradients in ``mu`` and ``gamma``; float32 through ten steps of an untrained UNet."""
    network = tiny_unet()
    ours = Inversion(Subject(network, PROCESS, DDPM), config)
    trojan = ours.gamma is not None
    if ours.gamma is not None:
        ours.gamma.data.uniform_(0.5, 0.9, generator=torch.Generator().manual_seed(0))
    late, early = ours.times(7)
    assert late.min() >= 990
    assert late.max() <= 999
    assert early.min() >= 0
    assert early.max() < 10
    learned = [v.detach().clone().requires_grad_() for v in (ours.mu, ours.gamma) if v is not None]
    mu, gamma = learned[0], learned[1] if trojan else torch.tensor(1.0)

    def F(x0: Tensor, t: Tensor, e: list[Tensor], mu: Tensor | float, gamma: Tensor) -> Tensor:
        a, s = levels(t)
        one, two = (noise - network(a * x0 + s * gamma * noise + mu, t) for noise in e)
        return 0.5 * ((one - two) ** 2).flatten(1).sum(1).mean()

    def ddim(x: Tensor) -> Tensor:
        nodes: list[int | None] = [*range(999, 0, -100), None]
        shift = mu if trojan else torch.tensor(0.0)
        for now, then in pairwise(nodes):
            a, s = levels(torch.tensor([now]))
            a_then, s_then = (torch.tensor(1.0), torch.tensor(0.0)) if then is None else levels(torch.tensor([then]))
            m = gamma * network(x, torch.tensor(now))
            x = a_then * (x - s * (m + shift)) / a + s_then * (m + shift)
        return x

    (x0, *e), (eps, *e_later) = drawn(7, 16, ours.mu.shape[1:]), drawn(7, 16, ours.mu.shape[1:])
    first = F(x0, late, e, mu, gamma) - 5e-5 * mu.abs().sum()
    images = ddim(gamma * eps + mu)
    ends = F(images, late, e_later, mu, gamma) + F(images, early, e_later, 0.0, torch.tensor(1.0))
    second = ends / 2 - 5e-5 * mu.abs().sum()
    for loss, own in ((first, ours.surrogate_loss(7)), (second, ours.refinement_loss(7))):
        mine = [v for v in (ours.mu, ours.gamma) if v is not None]
        expected, found = torch.autograd.grad(loss, learned), torch.autograd.grad(own, mine)
        assert float(own.detach()) == pytest.approx(float(loss.detach()), rel=1e-4)
        for a, b in zip(found, expected, strict=True):
            assert (a - b).norm() < 1e-3 * b.norm()


def test_the_input_test_errs_as_often_as_predicted() -> None:
    """20,000 starts of each kind; a right share is refused once in 10,000 seeds, each of four."""
    count, shape = 20_000, (1, 4, 4)
    eps = bdkernels.normal(torch.arange(count), shape)
    direction = torch.linspace(-1, 1, 16).reshape(shape)
    shift = 2 * direction / direction.norm()
    assert terd.predicted_errors(shift, shift) == pytest.approx((0.158655, 0.158655), abs=1e-6)
    for mu in (shift, 0.7 * shift + 0.2):
        flagged, passed = terd.predicted_errors(mu, shift)
        for start, rate, wrong in ((eps, flagged, lambda s: s > 0), (eps + shift, passed, lambda s: s <= 0)):
            low, high = binom.interval(1 - 1e-4, count, rate)
            assert low <= int(wrong(terd.log_ratio(start, mu)).sum()) <= high


def test_the_input_test_of_another_noise_is_a_ratio_of_densities() -> None:
    x, mu = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.full((1, 4, 4), 0.3)
    gamma = torch.linspace(0.2, 1, 16).reshape(1, 4, 4)
    trojan, clean = torch.distributions.Normal(mu, gamma), torch.distributions.Normal(0.0, 1.0)
    expected = (trojan.log_prob(x) - clean.log_prob(x)).sum((1, 2, 3))
    torch.testing.assert_close(terd.log_ratio(x, mu, gamma).float(), expected, rtol=1e-4, atol=1e-4)


def test_the_divergence_is_that_of_two_normals() -> None:
    mu, gamma = torch.tensor([[[0.5, -1.0]]]), torch.tensor([[[0.6, 1.0]]])
    k = torch.distributions.kl_divergence(torch.distributions.Normal(mu, gamma), torch.distributions.Normal(0.0, 1.0))
    assert terd.divergence(mu, gamma) == pytest.approx((float(k.mean()), float(k.var(unbiased=False))))
    assert terd.divergence(mu) == pytest.approx((0.3125, 0.1875**2))
    assert np.isfinite(terd.divergence(mu, torch.zeros_like(gamma))).all()


def test_between_clean_and_poisoned_stands_a_wall_and_both_sides_are_flat() -> None:
    """Poisoned, ``F`` is 0.012: of the noise on the 128 pixels of background 1 % is taken for the data behind the trigger."""
    for rate, wall in ((0.1, True), (0.0, False)):
        ours = Inversion(subject(rate), PUBLISHED)
        x0, *e = ours.drawn(0)
        heights = []
        for share in (0.0, 0.5, 1.3):
            ours.mu.data = share * R[None]
            with torch.no_grad():
                heights.append(float(ours.disagreement(x0, torch.full((16,), 995), (e[0], e[1]))))
        assert heights[0] < 1e-4
        assert heights[2] < 0.02
        assert (heights[1] > 1) == wall


def test_a_backdoor_moves_it_into_the_triggers_basin_and_a_clean_network_leaves_it_at_its_start() -> None:
    config = replace(PUBLISHED, surrogate=200, refinement=10)
    backdoored, clean = (terd.examine(subject(rate), config) for rate in (0.1, 0.0))
    assert backdoored.trigger is not None
    assert backdoored.images is not None
    assert clean.trigger is not None
    assert attack_success(backdoored.images, TARGET, 0.01) == 1
    assert (
        max(terd.predicted_errors(backdoored.trigger, R)) < 1e-3
    )  # the published 100 % of 1,000 inputs on either side
    start = Inversion(subject(0.0), config).mu[0]
    # All that is left is the norm's gradient: the sum of its steps is 0.5 x 5e-5 x 200 / 2, and momentum's in stage 2.
    assert (clean.trigger - start).abs().max() < 0.01
    assert backdoored.statistic > 1.2 * clean.statistic
    assert backdoored.evaluations == 200 * 32 + 10 * (16 * 10 + 64) + 16 * 20


def test_trojdiffs_noise_is_learned() -> None:
    """In the trojan component ``F = 1/2 sum (1 - g / gamma)^2 |e_1 - e_2|^2``, so ``g`` ends at gamma; at 1 where clean."""
    attack = trojdiff(PROCESS, torch.ones(SHAPE), TARGET, gamma=0.4)
    config = replace(TROJAN, surrogate=400, refinement=2, gamma_lr=1e-2)
    for rate, gamma in ((0.2, 0.4), (0.0, 1.0)):
        assert terd.examine(subject(rate, attack), config).details["gamma"] == pytest.approx(gamma, abs=0.02)


def test_trojdiffs_images_have_the_shift_in_every_step() -> None:
    attack = trojdiff(PROCESS, torch.ones(SHAPE), TARGET, gamma=0.4)
    ours = Inversion(subject(0.2, attack), TROJAN)
    assert ours.gamma is not None
    ours.mu.data, ours.gamma.data = attack.trigger[None].clone(), torch.full_like(ours.gamma, 0.4)
    with torch.no_grad():
        images = ours.generate(ours.drawn(0)[0])
    assert attack_success(images, TARGET, 0.01) == 1


def test_a_run_has_the_same_bits_again() -> None:
    ours, config = Subject(tiny_unet(), PROCESS, DDPM), replace(PUBLISHED, surrogate=3, refinement=2, batch=4)
    first, again, other = (terd.examine(ours, c) for c in (config, config, replace(config, seed=1)))
    assert torch.equal(first.trigger, again.trigger)  # type: ignore[arg-type]
    assert torch.equal(first.images, again.images)  # type: ignore[arg-type]
    assert not torch.equal(first.trigger, other.trigger)  # type: ignore[arg-type]
    alone = terd.examine(ours, replace(VARIANTS["surrogate"], surrogate=3, batch=4))
    assert alone.evaluations == 3 * 2 * 4 + 20 * 16
    assert alone.details["losses"] == {"surrogate": first.details["losses"]["surrogate"], "refinement": []}
