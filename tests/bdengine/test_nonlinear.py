"""What no row can say, against stock diffusers: a variance that the network chooses, and x0 thresholded by a quantile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import diffusers.schedulers as stock
import pytest
import torch
from torch import Tensor, nn

import bdkernels
from bdengine.errors import UserError
from bdengine.networks import Network
from bdengine.sampler import QUANTILE, Arm, Sampler, thresholded
from bdengine.schedule import linear
from bdengine.solvers import Nodes, Table, ddim, ddpm, dpm_multistep

from .networks_for_tests import elementwise

SHAPE, SEEDS, STEPS = (1, 8, 8), [3, 4, 5], 20
NODES = Nodes.of(linear(), STEPS)


class Wide(nn.Module):
    """A prediction and a spread, in twice the channels; the spread goes beyond [-1, 1], as networks' do."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t.reshape(-1, 1, 1, 1)
        return torch.cat([torch.sin(x / 50 + t / 300) * 0.8, 1.2 * torch.cos(x / 50 + t / 100)], dim=1)


def stock_loop(scheduler: Any, network: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Its own loop with our noise; its step in float64, its betas in its own float32."""
    scheduler.set_timesteps(STEPS)
    seeds = torch.tensor(SEEDS)
    x = bdkernels.normal(seeds, SHAPE, dtype=torch.float64)
    for row, t in enumerate(scheduler.timesteps):
        z = bdkernels.normal(seeds, SHAPE, step=row, stream=bdkernels.STREAM_STEP, dtype=torch.float64)
        m = network(x, t.expand(len(x)).double())
        with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, z=z, **__: z):
            x = scheduler.step(m, t, x).prev_sample
    return x


def assert_near(got: Tensor, expected: Tensor) -> None:
    """Stock's float32 betas alone cost 1e-5 of the largest value."""
    assert float((got.double() - expected).abs().max() / expected.abs().max()) < 5e-5


def test_a_learned_variance_is_stocks() -> None:
    """On the leading grid: with others stock adds noise to the image itself."""
    scheduler = stock.DDPMScheduler(variance_type="learned_range", timestep_spacing="leading", clip_sample=False)
    nodes = Nodes.of(linear(), STEPS, "leading")
    table = ddpm(nodes, "learned_range")
    got = Sampler(Network(Wide(), SHAPE), {"": Arm(table)}, 3)(SEEDS)[""]
    assert_near(got, stock_loop(scheduler, Wide()))
    plain = Sampler(Network(Wide(), SHAPE), {"": Arm(ddpm(nodes))}, 3)(SEEDS)[""]
    assert (got - plain).abs().max() > 0.01


@pytest.mark.parametrize("end", [-1.0, 1.0])
def test_a_learned_variance_lies_between_small_and_large(end: float) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            m = elementwise()(x, t)
            return torch.cat([m, torch.full_like(m, end)], dim=1)

    network = Network(Fixed(), SHAPE)
    learned, fixed = (
        Sampler(network, {"": Arm(table)}, 3)(SEEDS)[""]
        for table in (ddpm(NODES, "learned_range"), ddpm(NODES, "small" if end < 0 else "large"))
    )
    assert (learned - fixed).abs().max() < 1e-6 * fixed.abs().max()


def test_other_samplers_leave_a_networks_variance_aside() -> None:
    class Narrow(Wide):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward(x, t)[:, :1].contiguous()

    wide, narrow = (Sampler(Network(n, SHAPE), {"": Arm(ddim(NODES))}, 3)(SEEDS)[""] for n in (Wide(), Narrow()))
    assert torch.equal(wide, narrow)


def test_a_network_without_a_variance_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"variance is learned and the network returns none: expected twice the channels"
    ):
        Sampler(elementwise(), {"": Arm(ddpm(NODES, "learned_range"))}, 3)(SEEDS)


_DDIM = stock.DDIMScheduler(clip_sample=False, timestep_spacing="trailing", thresholding=True,
                            dynamic_thresholding_ratio=QUANTILE, sample_max_value=1e9)  # fmt: skip
_DDIM.step = partial(_DDIM.step, use_clipped_model_output=True)  # type: ignore[method-assign]
STOCK: dict[str, tuple[Table, Any]] = {
    "ddim": (ddim(NODES), _DDIM),
    "ddpm": (ddpm(NODES), stock.DDPMScheduler(clip_sample=False, timestep_spacing="trailing", thresholding=True,
                                              dynamic_thresholding_ratio=QUANTILE, sample_max_value=1e9)),
    "dpm++": (dpm_multistep(NODES, 2), stock.DPMSolverMultistepScheduler(
        timestep_spacing="trailing", thresholding=True, dynamic_thresholding_ratio=QUANTILE, sample_max_value=1e9)),
}  # fmt: skip


@pytest.mark.parametrize("name", list(STOCK))
def test_dynamic_thresholding_is_stocks(name: str) -> None:
    table, scheduler = STOCK[name]
    network = elementwise()
    got = Sampler(network, {"": Arm(table.clipped("dynamic")), "not": Arm(table)}, 6)(SEEDS)
    assert_near(got[""], stock_loop(scheduler, network))
    assert (got["not"] - got[""]).abs().max() > 0.1
    assert got[""].abs().max() <= 1 + 1e-6


def test_a_threshold_is_each_samples_own() -> None:
    m = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 0.1]).reshape(
        2, 1, 1, 1
    )
    x0 = thresholded(m, torch.zeros(()), torch.ones(()))
    bound = torch.quantile(m[0].abs(), QUANTILE)
    torch.testing.assert_close(x0[0], m[0].clamp(-bound, bound) / bound)
    assert torch.equal(x0[1], m[1])
