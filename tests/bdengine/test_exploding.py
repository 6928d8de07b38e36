"""Samplers of variance-exploding models against stock diffusers and the published formulas, with injected noise."""

from __future__ import annotations

from unittest import mock

import diffusers.schedulers as stock
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_sde_ve
from torch import Tensor, nn

import bdkernels
from bdengine.errors import UserError
from bdengine.networks import Network
from bdengine.sampler import Arm, Sampler, langevin
from bdengine.solvers import Churn, Nodes, Table, edm, score_sde, stack
from bdengine.solvers.nodes import even, karras

SHAPE = (1, 6, 6)
SEEDS = torch.tensor([5, 6])


def z_of(row: int) -> Tensor:
    return bdkernels.normal(SEEDS, SHAPE, step=row, stream=bdkernels.STREAM_STEP, dtype=torch.float64)


def score(x: Tensor, sigma: float) -> Tensor:
    """Of data near 0 with a ripple, float64."""
    return -(x - 0.3 * torch.sin(x)) / (0.25 + sigma**2)


def run(table: Table, network: object, dtype: torch.dtype = torch.float64) -> Tensor:
    x = (bdkernels.normal(SEEDS, SHAPE, dtype=torch.float64) * table.start).to(dtype)
    rows, arm = stack([table], dtype), torch.zeros(2, dtype=torch.int64)
    history = x.new_zeros((table.slots, *x.shape)) if table.slots else None
    for row in range(len(table)):
        scale, time = table.rows[row, bdkernels.Step.IN], table.timesteps[row]
        m = network(x.double() * scale, time).to(dtype)  # type: ignore[operator]
        if table.corrector is not None and table.corrector[row]:
            x = langevin(x, m, z_of(row).to(dtype), table.corrector[row])
        else:
            bdkernels.fused_step_(x, m, rows, arm, torch.tensor(row), SEEDS, history=history)
    return x


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_the_predictor_is_stocks(steps: int) -> None:
    """Stock's predictor looks its sigma up in one table and tells the network another: here the two are made one."""
    sigmas = even(50.0, 0.01, steps)
    scheduler = stock.ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=50.0)
    scheduler.set_timesteps(steps)
    scheduler.set_sigmas(steps)
    scheduler.discrete_sigmas = torch.tensor(sigmas[::-1].copy())
    x = bdkernels.normal(SEEDS, SHAPE, dtype=torch.float64) * sigmas[0]
    mean = x
    for row, sigma in enumerate(sigmas):
        t = torch.tensor((steps - 1 - row) / (steps - 1) + 1e-4, dtype=torch.float64)
        with mock.patch.object(scheduling_sde_ve, "randn_tensor", lambda *_, row=row, **__: z_of(row)):
            x, mean = scheduler.step_pred(score(x, sigma), t, x, return_dict=False)
    table = score_sde(Nodes.exploding(sigmas))
    assert len(table) == steps
    assert float((run(table, score) - mean).abs().max() / mean.abs().max()) < 1e-6
    assert float((run(table, score, torch.float32).double() - mean).abs().max() / mean.abs().max()) < 1e-5


def test_the_corrector_is_stocks_for_a_single_sample() -> None:
    """Stock takes norms over the batch, so that a sample depends on its neighbours; alone it does not."""
    scheduler = stock.ScoreSdeVeScheduler(snr=0.075)
    scheduler.set_timesteps(3)
    x, z = z_of(0)[:1], z_of(1)[:1]
    with mock.patch.object(scheduling_sde_ve, "randn_tensor", return_value=z):
        expected = scheduler.step_correct(score(x, 2.0), x, return_dict=False)[0]
    torch.testing.assert_close(
        langevin(x, score(x, 2.0), z, 0.075), expected, rtol=2e-7, atol=1e-8
    )  # it rounds e to float32


class Score(nn.Module):
    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return score(x, 1.0) * 0 - x / (0.25 + sigma.reshape(-1, 1, 1, 1) ** 2)


def test_the_loop_runs_correctors_and_every_sample_is_its_own() -> None:
    sigmas = even(50.0, 0.01, 12)
    table = score_sde(Nodes.exploding(sigmas), corrector_steps=1)
    assert len(table) == 24
    network = Network(Score(), sample_shape=SHAPE)
    images = Sampler(network, {"": Arm(table)}, micro_batch=2)([5, 6, 7])[""]
    alone = Sampler(network, {"": Arm(table)}, micro_batch=1)([6])[""]
    assert torch.equal(images[1], alone[0])
    got = run(table, lambda x, t: -x / (0.25 + t**2), torch.float32)
    torch.testing.assert_close(images[:2], got, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="corrector steps in different rows"):
        Sampler(network, {"a": Arm(table), "b": Arm(score_sde(Nodes.exploding(even(50.0, 0.01, 24))))})


def test_the_ancestral_predictor_ends_in_the_law_of_the_data() -> None:
    """Standard normal data of standard deviation 0.5: its score is known. 7,200 pixels, |statistics| < 5 normal."""
    table = score_sde(Nodes.exploding(even(50.0, 0.01, 500)), ancestral=True)
    network = Network(Score(), sample_shape=SHAPE)
    images = Sampler(network, {"": Arm(table)}, micro_batch=200)(range(200))[""].double()
    count = images.numel()
    assert abs(float(images.mean()) / 0.5) * count**0.5 < 5
    assert abs(float(images.square().mean() / 0.25) - 1) * (count / 2) ** 0.5 < 5


def denoised(x: Tensor, sigma: float) -> Tensor:
    return 0.25 / (0.25 + sigma**2) * x + 0.1 * torch.sin(x)


def preconditioned(scaled: Tensor, noise: float) -> Tensor:
    """The raw network ``F`` whose EDM preconditioning is `denoised` (Karras et al. 2022, eq. 7)."""
    sigma = np.exp(4 * noise)
    total = sigma**2 + 0.25
    x = scaled * total**0.5
    return (denoised(x, sigma) - 0.25 / total * x) / (sigma * 0.5 / total**0.5)


@pytest.mark.parametrize("churn", [Churn(), Churn(40, 0.05, 50, 1.003)])
def test_edm_is_its_published_algorithm(churn: Churn) -> None:
    """Algorithm 2 written out; the noise of a raised state is that of the row before it, the first is in the start."""
    steps = 18
    sigmas = karras(80.0, 0.002, steps)
    table = edm(Nodes.exploding(sigmas, "edm"), churn)
    assert len(table) == 2 * steps - 1
    x, row = bdkernels.normal(SEEDS, SHAPE, dtype=torch.float64) * table.start, 0
    for i, sigma in enumerate(sigmas):
        hat = churn.raised(sigma, steps)
        if i > 0:
            x = x + churn.noise * (hat**2 - sigma**2) ** 0.5 * z_of(row - 1)
        after = sigmas[i + 1] if i + 1 < steps else 0.0
        d = (x - denoised(x, hat)) / hat
        x_next, row = x + (after - hat) * d, row + 1
        if after:
            d_next = (x_next - denoised(x_next, after)) / after
            x_next, row = x + (after - hat) * (d + d_next) / 2, row + 1
        x = x_next
    assert table.start == pytest.approx((80**2 + churn.noise**2 * (churn.raised(80, 18) ** 2 - 80**2)) ** 0.5)
    assert float((run(table, preconditioned) - x).abs().max() / x.abs().max()) < 1e-10
    assert float((run(table, preconditioned, torch.float32).double() - x).abs().max() / x.abs().max()) < 1e-5
