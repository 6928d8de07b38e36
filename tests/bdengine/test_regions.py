"""Regions with a sampler of their own: what the loop does beside the row, too, is each pixel's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bdengine.arms import Arm
from bdengine.attacks.exact import path_of
from bdengine.errors import UserError
from bdengine.networks import Network
from bdengine.sampler import Sampler
from bdengine.schedule import linear
from bdengine.solvers import Nodes, ddim, ddpm, dpm_multistep

from .networks_for_tests import elementwise

SHAPE, SEEDS = (1, 8, 8), [3, 4, 5]
NODES = Nodes.of(linear(), 10)
PATCH = torch.zeros(SHAPE, dtype=torch.bool)
PATCH[:, 5:, 5:] = True


class Wide(nn.Module):
    """`elementwise`, and a spread that depends on the time alone."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        m = elementwise()(x, t)
        return torch.cat([m, torch.cos(t / 100).reshape(-1, 1, 1, 1).expand_as(m)], dim=1)


def sampled(arm: Arm, network: Network) -> Tensor:
    return Sampler(network, {"": arm}, 3)(SEEDS)[""]


def test_a_learned_variance_is_that_of_the_pixels_own_sampler() -> None:
    outside = ddpm(NODES, "learned_range")
    inside = outside.shifted(path_of(linear(), outside, linear().s), 0.5)
    network, trigger = Network(Wide(), SHAPE), 0.3 * torch.ones(SHAPE)
    got = sampled(Arm(outside, trigger, inside, PATCH), network)
    assert torch.equal(got[:, ~PATCH], sampled(Arm(outside, trigger), network)[:, ~PATCH])
    assert torch.equal(got[:, PATCH], sampled(Arm(inside, trigger), network)[:, PATCH])


def test_a_threshold_inside_changes_the_pixels_inside_alone() -> None:
    plain = sampled(Arm(ddpm(NODES)), elementwise())
    inside = sampled(Arm(ddpm(NODES), None, ddpm(NODES).clipped("dynamic"), PATCH), elementwise())
    outside = sampled(Arm(ddpm(NODES).clipped("dynamic"), None, ddpm(NODES), PATCH), elementwise())
    assert torch.equal(inside[:, ~PATCH], plain[:, ~PATCH])
    assert torch.equal(outside[:, PATCH], plain[:, PATCH])
    assert inside[:, PATCH].abs().max() <= 1 + 1e-6 < plain[:, PATCH].abs().max()
    assert outside[:, ~PATCH].abs().max() <= 1 + 1e-6 < plain[:, ~PATCH].abs().max()


def test_a_sampler_inside_without_history_goes_with_any() -> None:
    inside, outside = ddim(NODES), dpm_multistep(NODES, 3)
    got = sampled(Arm(outside, None, inside, PATCH), elementwise())
    assert torch.equal(got[:, ~PATCH], sampled(Arm(outside), elementwise())[:, ~PATCH])
    assert torch.equal(got[:, PATCH], sampled(Arm(inside), elementwise())[:, PATCH])


def test_a_sampler_inside_that_keeps_other_history_is_refused() -> None:
    """The kernel's slots are those of the sampler outside: what is stored inside would be lost."""
    arm = Arm(ddim(NODES), None, dpm_multistep(NODES, 2), PATCH)
    with pytest.raises(UserError, match=r"arm '' keeps other history inside its region \(dpm\+\+-2m-10\) than outside"):
        sampled(arm, elementwise())
