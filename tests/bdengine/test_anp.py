"""Adversarial neuron pruning: its first step against plain torch, its budget, and that the model is left alone."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import bdkernels
from bdengine.defenses import Subject, anp
from bdengine.defenses.anp import VARIANTS, Perturbation
from bdengine.defenses.subject import Watch
from bdengine.errors import UserError
from bdengine.networks import Network
from bdkernels import noise as contract

from .networks_for_tests import tiny_unet
from .subjects_for_tests import DDPM, PROCESS, subject

QUICK = replace(VARIANTS["quick"], batch=8, images=6)
IMAGES = torch.linspace(-1, 1, 6 * 64).reshape(6, 1, 8, 8).sin()


def by_hand(network: Network, step: int) -> torch.Tensor:
    words = contract.words(0, np.arange(8), bdkernels.STREAM_TIMESTEP, step=step)
    t, chosen = (
        (word.astype(np.uint64) * end >> 32).astype(np.int64) for word, end in zip(words[:2], (1000, 6), strict=True)
    )
    eps = torch.from_numpy(
        contract.normal(contract.sample_seeds(0, 8 * step + np.arange(8)), (1, 8, 8), stream=bdkernels.STREAM_TRAINING)
    )
    a, s = (torch.tensor(v[t], dtype=torch.float32).reshape(-1, 1, 1, 1) for v in (PROCESS.alpha_bar**0.5, PROCESS.s))
    return (network(a * IMAGES[chosen] + s * eps, torch.from_numpy(t)) - eps).square().mean()


def test_its_first_step_is_that_of_a_few_lines_of_torch() -> None:
    """The scales' gradients sum ``p dL/dp`` over a channel; Adam's first step is the learning rate along their signs."""
    network = tiny_unet()
    ours = Perturbation(Subject(network, PROCESS, DDPM), IMAGES, replace(QUICK, steps=1))
    plain = copy.deepcopy(network).requires_grad_(True)
    loss = by_hand(plain, 0)
    loss.backward()
    assert float(ours.loss(0, ours.found)) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert ours.rise() == pytest.approx(0, abs=1e-5)
    convolutions = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    assert {name.rpartition(".")[0] for name in ours.scale} == set(convolutions)
    checked = 0
    for name, scale in ours.scale.items():
        p = plain.get_parameter(name)
        assert p.grad is not None
        gradient = (p.detach() * p.grad).flatten(1).sum(1) if p.dim() > 1 else p.detach() * p.grad
        certain = gradient.abs() > 1e-6
        assert torch.equal(scale.detach()[certain].sign(), gradient[certain].sign())
        torch.testing.assert_close(
            scale.detach()[certain].abs(), torch.full_like(scale[certain].detach(), 5e-3), rtol=2e-2, atol=0
        )
        checked += int(certain.sum())
    assert checked > 100


def test_the_loss_rises_within_the_budget_and_the_model_is_left_alone() -> None:
    network = tiny_unet().requires_grad_(True)
    before = copy.deepcopy(network.state_dict())
    ours, config = Subject(network, PROCESS, DDPM), replace(QUICK, steps=30, lr=0.05, budget=0.3)
    first, again = (anp.examine(ours, config) for _ in range(2))
    assert first.statistic > 0.5
    assert first.statistic == again.statistic
    assert first.details["largest"] == pytest.approx(0.3)
    assert first.evaluations == 6 * 20 + 30 * 8 + 3 * 8 + 16 * 20
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


def test_what_is_sampled_is_the_perturbed_network() -> None:
    network = tiny_unet()
    examined = Subject(network, PROCESS, DDPM)
    ours = Perturbation(examined, IMAGES, replace(QUICK, steps=3))
    with Watch(examined):
        ours.rise()
    expected = ours.loss(5, ours.perturbed())
    ours.write()
    torch.testing.assert_close(by_hand(network, 5), expected.detach())


def test_a_network_without_convolutions_is_refused() -> None:
    with pytest.raises(UserError, match="the network has no convolutions"):
        Perturbation(subject(0.0), IMAGES, QUICK)
