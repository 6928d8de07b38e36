"""Sampler tables against stock diffusers, in float64, with the same injected noise."""

from unittest import mock

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

import bdkernels
from bdengine.errors import UserError
from bdengine.schedule import SPACINGS, Schedule, grid, linear
from bdengine.solvers import SAMPLERS, Nodes, SamplerConfig, Table, ddim, ddpm, edm, score_sde, stack
from bdengine.solvers.nodes import even

PROCESS = linear()
SHAPE = (1, 6, 6)
SEEDS = torch.tensor([5, 6])


def network(x: Tensor, t: float) -> Tensor:
    """Something smooth that needs no weights."""
    return torch.sin(3 * x + t / 100) * 0.7


def ours(table: Table, x: Tensor) -> Tensor:
    rows, arm = stack([table], torch.float64), torch.zeros(2, dtype=torch.int64)
    for row, t in enumerate(table.timesteps):
        x = bdkernels.fused_step(x, network(x, t), rows, arm, torch.tensor(row), SEEDS)
    return x


def stock(scheduler: DDPMScheduler | DDIMScheduler, x: Tensor, steps: int, **options: float) -> Tensor:
    scheduler.alphas_cumprod = torch.tensor(PROCESS.alpha_bar)
    scheduler.alphas, scheduler.betas = torch.tensor(1 - PROCESS.betas), torch.tensor(PROCESS.betas)
    scheduler.final_alpha_cumprod = scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(steps)
    for row, t in enumerate(scheduler.timesteps):
        z = bdkernels.normal(SEEDS, SHAPE, step=row, stream=bdkernels.STREAM_STEP, dtype=torch.float64)
        with mock.patch(f"{type(scheduler).__module__}.randn_tensor", lambda *_, z=z, **__: z):
            x = scheduler.step(network(x, float(t)), t, x, **options).prev_sample
    return x


def start() -> Tensor:
    return bdkernels.normal(SEEDS, SHAPE, dtype=torch.float64)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [10, 50, 1000])
@pytest.mark.parametrize("clip", ["none", "x0"])
def test_ddpm_is_diffusers(spacing: str, steps: int, clip: str) -> None:
    """Where T / steps is whole; otherwise, and for linspace, diffusers steps to t - T // steps, off its own grid.

    Its last variance is clamped to 1e-20, so it leaves 1e-10 of noise in.
    """
    scheduler = DDPMScheduler(clip_sample=clip == "x0", timestep_spacing=spacing, variance_type="fixed_small")
    table = ddpm(Nodes.of(PROCESS, steps, spacing)).clipped(clip)  # type: ignore[arg-type]
    expected = stock(scheduler, start(), steps)
    torch.testing.assert_close(ours(table, start()), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", ["none", "x0"])
def test_ddim_is_diffusers(eta: float, clip: str) -> None:
    scheduler = DDIMScheduler(clip_sample=clip == "x0", timestep_spacing="trailing", set_alpha_to_one=True)
    expected = stock(scheduler, start(), 50, eta=eta)
    got = ours(ddim(Nodes.of(PROCESS, 50), eta=eta).clipped(clip), start())  # type: ignore[arg-type]
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_ddim_with_all_its_noise_is_ddpm() -> None:
    got, expected = ours(ddim(Nodes.of(PROCESS, 20), eta=1.0), start()), ours(ddpm(Nodes.of(PROCESS, 20)), start())
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_latent_clip_bounds_every_state() -> None:
    table = ddpm(Nodes.of(PROCESS, 20)).clipped("latent")
    rows, arm, x = stack([table], torch.float64), torch.zeros(2, dtype=torch.int64), start() * 3
    for row, t in enumerate(table.timesteps):
        x = bdkernels.fused_step(x, network(x, t), rows, arm, torch.tensor(row), SEEDS)
        assert x.abs().max() <= 1


EXPLODING = {
    "edm": edm(Nodes.exploding(even(50.0, 0.01, 12), "edm")),
    "ve": score_sde(Nodes.exploding(even(50.0, 0.01, 12))),
}


@pytest.mark.parametrize("name", [*SAMPLERS, *EXPLODING])
def test_every_sampler_has_an_x0_to_clip(name: str) -> None:
    table = EXPLODING.get(name) or SamplerConfig(name, 12).table(PROCESS)
    ends = []
    for one in (table, table.clipped("x0")):
        rows, x = stack([one], torch.float64), 5 * one.start * start()
        history = x.new_zeros((one.slots, *x.shape)) if one.slots else None
        for row, t in enumerate(one.timesteps):
            args = (x, network(x, t), rows, torch.zeros(2, dtype=torch.int64), torch.tensor(row), SEEDS)
            bdkernels.fused_step_(*args, history=history)
        ends.append(x)
    assert ends[0].abs().max() > 1.5
    assert ends[1].abs().max() < 1.1  # a multistep method may overshoot a little


def test_grids() -> None:
    assert grid(1000, 4, "leading").tolist() == [750, 500, 250, 0]
    assert grid(1000, 4, "trailing").tolist() == [999, 749, 499, 249]
    assert grid(1000, 4, "linspace").tolist() == [999, 666, 333, 0]
    for spacing in SPACINGS:
        scheduler = DDPMScheduler(timestep_spacing=spacing)
        for steps in (1, 7, 20, 1000):
            scheduler.set_timesteps(steps)
            assert scheduler.timesteps.tolist() == grid(1000, steps, spacing).tolist()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SamplerConfig(steps=0), "steps is 0: expected 1 to 1000"),
        (SamplerConfig(steps=1001), "steps is 1001"),
        (SamplerConfig("pndm", 3), "steps is 3: expected at least 4, since the first 3 are halved"),
        (SamplerConfig("ddmp"), "unknown sampler 'ddmp'.*nearest is 'ddpm'"),
        (SamplerConfig("ddim", eta=1.5), "eta is 1.5: expected 0 to 1"),
        (SamplerConfig(spacing="even"), "unknown spacing 'even'"),  # type: ignore[arg-type]
    ],
)
def test_bad_samplers_get_a_sentence(config: SamplerConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.table(PROCESS)


def test_too_few_steps_are_left_of_a_task() -> None:
    with pytest.raises(
        UserError, match="steps from timestep 100 on is 2: expected at least 4, since the first 3 are halved"
    ):
        SamplerConfig("pndm", 20).table(PROCESS, first=100)


def test_arms_need_equal_lengths_and_known_clips() -> None:
    with pytest.raises(UserError, match="same number of network evaluations, got ddpm-10: 10, ddim-20: 20"):
        stack([ddpm(Nodes.of(PROCESS, 10)), ddim(Nodes.of(PROCESS, 20))])
    with pytest.raises(UserError, match=r"unknown clip 'latents'.*'latent'"):
        ddpm(Nodes.of(PROCESS, 10)).clipped("latents")  # type: ignore[arg-type]


def test_other_processes_are_read_from_their_configuration() -> None:
    read = Schedule.from_config({"beta_schedule": "linear", "num_train_timesteps": 100, "beta_end": 0.03})
    assert read.T == 100
    assert read.betas[-1] == 0.03
    with pytest.raises(UserError, match="unknown prediction type 'flow'"):
        Schedule.from_config({"prediction_type": "flow"})


def test_a_slot_that_no_term_has_is_not_read() -> None:
    """Its NaN stays where it is: in the kernel in use and in the float64 reference."""
    table = SamplerConfig("plms", 10).table(PROCESS)
    for dtype in (torch.float32, torch.float64):
        x = start().to(dtype)
        history = torch.full((table.slots, *x.shape), torch.nan, dtype=dtype)
        bdkernels.fused_step_(x, x.clone(), stack([table], dtype), torch.zeros(2, dtype=torch.int64), torch.tensor(0),
                              SEEDS, history=history)  # fmt: skip
        assert x.isfinite().all()
