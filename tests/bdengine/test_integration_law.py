"""Our schedulers against stock's: the law of a step, timesteps and rows."""

import inspect
from importlib import import_module
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers.schedulers import DDIMScheduler, DDPMScheduler
from torch import Tensor

import bdkernels
from bdengine.errors import UserError
from bdengine.integrations import diffusers as fused
from bdengine.schedule import linear
from bdengine.solvers import Nodes, Table, ddim, ddpm, dpm_multistep, unipc

from .schedulers_for_tests import LEADING, PAIRS, SHAPE, TRAILING, loop, network, seeds_from

# Stock's law


LAWS = {
    "ddpm": ("ddpm", LEADING, {}),
    "ddpm-clip-range": ("ddpm", {**LEADING, "clip_sample_range": 0.3}, {}),
    "ddpm-linspace": ("ddpm", {"timestep_spacing": "linspace", "clip_sample": False}, {}),
    "ddpm-large": ("ddpm", {**LEADING, "variance_type": "fixed_large"}, {}),
    "ddpm-small-log": ("ddpm", {**LEADING, "variance_type": "fixed_small_log"}, {}),
    "ddpm-v": ("ddpm", {**LEADING, "prediction_type": "v_prediction"}, {}),
    "ddpm-sample": ("ddpm", {**LEADING, "prediction_type": "sample"}, {}),
    "ddim": ("ddim", {**LEADING, "clip_sample_range": 0.3}, {}),
    "ddim-eta": ("ddim", {**TRAILING, "steps_offset": 1}, {"eta": 0.6}),
    "ddim-v": ("ddim", {**LEADING, "prediction_type": "v_prediction", "set_alpha_to_one": False}, {"eta": 1.0}),
    **{f"dpm-{order}-{form}-{end}": ("dpm", {"solver_order": order, "solver_type": form, "final_sigmas_type": end}, {})
       for order in (1, 2, 3) for form in ("midpoint", "heun") for end in ("zero", "sigma_min")},
    "sde": ("dpm", {"algorithm_type": "sde-dpmsolver++"}, {}),
    "unipc": ("unipc", {}, {}),
    "unipc-3": ("unipc", {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}, {}),
    "unipc-noise": ("unipc", {"predict_x0": False, "final_sigmas_type": "sigma_min"}, {}),
}  # fmt: skip


def in_float64(scheduler: Any) -> None:
    """Stock's float32 betas alone cost 1e-5."""
    alpha_bar = torch.tensor(linear().alpha_bar)
    scheduler.alphas_cumprod, scheduler.one = alpha_bar, torch.tensor(1.0, dtype=torch.float64)
    if isinstance(scheduler, DDIMScheduler):
        scheduler.final_alpha_cumprod = scheduler.one if scheduler.config.set_alpha_to_one else alpha_bar[0]


def sigmas_in_float64(scheduler: Any) -> None:
    if hasattr(scheduler, "sigmas"):
        kappa = linear().kappa_at(scheduler.timesteps.double().numpy())
        end = 0.0 if scheduler.config.final_sigmas_type == "zero" else linear().kappa_at(np.zeros(1))[0]
        scheduler.sigmas = torch.tensor(np.append(kappa, end))


def stock_loop(scheduler: Any, x: Tensor, seeds: Tensor, timesteps: Tensor, **step: Any) -> tuple[Tensor, Tensor]:
    """Stock's loop on our noise, and its first prediction of ``x0`` where it has one."""
    module, first = import_module(type(scheduler).__mro__[0].__module__), None
    for row, t in enumerate(timesteps):
        z = bdkernels.normal(seeds, SHAPE, step=row, stream=bdkernels.STREAM_STEP, dtype=torch.float64)
        with mock.patch.object(module, "randn_tensor", return_value=z, create=True):
            out = scheduler.step(network(x, t), t, x, **step)
        x, first = out.prev_sample, out.get("pred_original_sample") if first is None else first
    return x, x if first is None else first


@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("name", LAWS)
def test_the_law_is_stocks(name: str, steps: int) -> None:
    kind, options, step = LAWS[name]
    ours, stock = (scheduler(**options) for scheduler in PAIRS[kind])
    in_float64(stock)
    ours.set_timesteps(steps)
    stock.set_timesteps(steps)
    sigmas_in_float64(stock)
    seeds = seeds_from(1, 2)
    x = 1.5 * bdkernels.normal(seeds, SHAPE)
    expected, expected_x0 = stock_loop(stock, x.double(), seeds, stock.timesteps, **step)
    if kind != "unipc":
        step = {**step, "generator": torch.Generator().manual_seed(1)}
    t = ours.timesteps[0]
    first = ours.step(network(x, t), t, x, **step)
    got = loop(ours, first.prev_sample, ours.timesteps[1:], **step)
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5
    if kind in ("ddpm", "ddim"):
        assert float((first.pred_original_sample - expected_x0).abs().max() / expected_x0.abs().max()) < 1e-5


@pytest.mark.parametrize("levels", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"])
def test_levels_that_stock_spreads_are_stocks(levels: str) -> None:
    for name in ("dpm", "unipc"):
        if (name, levels) == ("unipc", "use_lu_lambdas"):
            continue
        ours, stock = (scheduler(**{levels: True}) for scheduler in PAIRS[name])
        ours.set_timesteps(20)
        stock.set_timesteps(20)
        x = bdkernels.normal(seeds_from(1, 2), SHAPE)
        expected = loop(stock, x.double())
        assert torch.equal(ours.timesteps, stock.timesteps)
        assert float((loop(ours, x) - expected).abs().max() / expected.abs().max()) < 1e-3


@pytest.mark.parametrize("name", PAIRS)
def test_zero_terminal_snr_runs_where_the_network_predicts_v(name: str) -> None:
    options = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    ours, stock = (scheduler(**options) for scheduler in PAIRS[name])
    ours.set_timesteps(10)
    stock.set_timesteps(10)
    x = bdkernels.normal(seeds_from(1, 2), SHAPE)
    expected, _ = stock_loop(stock, x.double(), seeds_from(1, 2), stock.timesteps)
    noise = {} if name == "unipc" else {"generator": torch.Generator().manual_seed(1)}
    assert torch.allclose(loop(ours, x, **noise).double(), expected, atol=1e-3)


# Timesteps and rows


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", PAIRS)
def test_timesteps_are_stocks(name: str, spacing: str) -> None:
    for steps in (1, 7, 50):
        ours, stock = (scheduler(timestep_spacing=spacing, steps_offset=1) for scheduler in PAIRS[name])
        ours.set_timesteps(steps)
        stock.set_timesteps(steps)
        assert torch.equal(ours.timesteps, stock.timesteps)
        assert ours.num_inference_steps == stock.num_inference_steps


@pytest.mark.parametrize("name", ["ddpm", "dpm"])
def test_custom_timesteps_are_stocks(name: str) -> None:
    ours, stock = (scheduler() for scheduler in PAIRS[name])
    for method in ("__init__", "set_timesteps"):
        assert inspect.signature(getattr(type(ours), method)) == inspect.signature(getattr(type(stock), method))
    ours.set_timesteps(timesteps=[900, 500, 120, 3])
    assert ours.timesteps.tolist() == [900, 500, 120, 3]
    alpha_bar = np.append(linear().alpha_bar[[900, 500, 120, 3]], 1)
    table = {"ddpm": ddpm, "dpm": dpm_multistep}[name](
        Nodes(np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar), np.array([900.0, 500, 120, 3]))
    )
    table = table.clipped("x0") if name == "ddpm" else table
    x = bdkernels.normal(seeds_from(2, 2), SHAPE)
    assert torch.equal(loop(ours, x, generator=torch.Generator().manual_seed(2)), run(table, x, seeds_from(2, 2)))


def run(table: Table, x: Tensor, seeds: Tensor) -> Tensor:
    """The table's own loop."""
    rows = torch.tensor(table.rows[None], dtype=torch.float32)
    history = x.new_zeros((table.slots, *x.shape)) if table.slots else None
    x, arm = x.clone(), torch.zeros_like(seeds)
    for row, t in enumerate(table.timesteps):
        bdkernels.fused_step_(x, network(x, t), rows, arm, torch.tensor(row), seeds, history=history)
    return x


def test_ddpm_steps_without_set_timesteps_as_stock_does() -> None:
    ours, stock = fused.FusedDDPMScheduler(), DDPMScheduler()
    x = bdkernels.normal(seeds_from(0, 2), SHAPE)
    z = bdkernels.normal(seeds_from(0, 2), SHAPE, step=499, stream=bdkernels.STREAM_STEP)
    with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", return_value=z):
        expected = stock.step(network(x, 500), 500, x).prev_sample
    got = ours.step(network(x, 500), 500, x, generator=torch.Generator().manual_seed(0)).prev_sample
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_a_timestep_has_its_row_in_any_form_and_order(name: str) -> None:
    scheduler = PAIRS[name][0]()
    scheduler.set_timesteps(10)
    x = bdkernels.normal(seeds_from(0, 2), SHAPE)

    def step(t: Any) -> Tensor:
        return scheduler.step(x, t, x, generator=torch.Generator().manual_seed(0)).prev_sample

    expected = [step(t) for t in scheduler.timesteps]
    for row in (7, 2, 2, 9):
        t = scheduler.timesteps[row]
        for form in (t, t.clone(), t[None], int(t), float(t), scheduler.timesteps[row - 1 :][1]):
            assert torch.equal(step(form), expected[row])


@pytest.mark.parametrize("part", [slice(4, None), slice(None, None, 2)], ids=["from the fifth", "every second"])
@pytest.mark.parametrize("name", PAIRS)
def test_timesteps_that_are_assigned_are_the_run(name: str, part: slice) -> None:
    ours = PAIRS[name][0](timestep_spacing="trailing")
    ours.set_timesteps(10)
    whole = ours.timesteps
    expected = Nodes.preserving(np.append(linear().alpha_bar[whole[part]], 1), whole[part].double().numpy())
    ours.timesteps = whole[part]
    table = {"ddpm": lambda n: ddpm(n).clipped("x0"), "ddim": lambda n: ddim(n).clipped("x0"), "dpm": dpm_multistep}
    x = bdkernels.normal(seeds_from(2, 2), SHAPE)
    step = {} if name == "unipc" else {"generator": torch.Generator().manual_seed(2)}
    assert torch.equal(loop(ours, x, **step), run(table.get(name, unipc)(expected), x, seeds_from(2, 2)))
    ours.timesteps = whole[part].clone()
    with pytest.raises(UserError, match=f"timestep {whole[1]} is not of this run"):
        ours.step(x, whole[1], x)


@pytest.mark.parametrize("name", ["dpm", "unipc"])
@pytest.mark.parametrize("how", ["begin index", "timestep"])
def test_a_multistep_run_may_begin_in_the_middle_as_in_stock(name: str, how: str) -> None:
    ours, stock = (scheduler() for scheduler in PAIRS[name])
    ends = []
    for scheduler in (ours, stock):
        scheduler.set_timesteps(20)
        if how == "begin index":
            scheduler.set_begin_index(4)
        if scheduler is stock:
            sigmas_in_float64(stock)
        x = bdkernels.normal(seeds_from(0, 2), SHAPE, dtype=torch.float32 if scheduler is ours else torch.float64)
        for t in scheduler.timesteps[4:]:
            # A begin index, and after the first step the counter, go before the timestep.
            told = 999 if how == "begin index" or scheduler.step_index else t
            x = scheduler.step(network(x, t), told, x).prev_sample
        ends.append(x)
        assert scheduler.step_index == 20
    assert float((ends[0] - ends[1]).abs().max() / ends[1].abs().max()) < 1e-5


@pytest.mark.parametrize("name", PAIRS)
def test_set_timesteps_begins_anew(name: str) -> None:
    used, new = PAIRS[name][0](), PAIRS[name][0]()
    x = bdkernels.normal(seeds_from(0, 2), SHAPE)
    used.set_timesteps(20)
    loop(used, x)
    for scheduler in (used, new):
        scheduler.set_timesteps(10)
    ends = []
    for scheduler in (used, new):
        torch.manual_seed(0)
        ends.append(loop(scheduler, x))
    assert torch.equal(*ends)
