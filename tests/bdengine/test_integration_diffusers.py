"""Our schedulers inside stock pipelines: stock's timesteps, configurations and law; our seeds, bits and host cost."""

import inspect
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline
from diffusers.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bdkernels
from bdengine.errors import UserError
from bdengine.integrations import diffusers as fused
from bdengine.networks import unet
from bdengine.sampler import Arm, Sampler
from bdengine.schedule import linear
from bdengine.solvers import Nodes, Table, ddim, ddpm, dpm_multistep, unipc

from .networks_for_tests import Elementwise, elementwise

PAIRS = {
    "ddpm": (fused.FusedDDPMScheduler, DDPMScheduler),
    "ddim": (fused.FusedDDIMScheduler, DDIMScheduler),
    "dpm": (fused.FusedDPMSolverMultistepScheduler, DPMSolverMultistepScheduler),
    "unipc": (fused.FusedUniPCMultistepScheduler, UniPCMultistepScheduler),
}
LEADING, TRAILING = {"timestep_spacing": "leading"}, {"timestep_spacing": "trailing"}
SHAPE = (1, 8, 8)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeds_from(seed: int, count: int) -> Tensor:
    """What the contract draws from a generator of this seed."""
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def tiny_unet() -> Any:
    torch.manual_seed(0)
    return unet(8, 1, (8, 16), groups=4).eval()


class ElementwiseUNet(nn.Module):
    """Enough of a UNet for a pipeline; each sample's output is its own, to the bit."""

    config = SimpleNamespace(in_channels=1, sample_size=8)
    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, x: Tensor, t: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=Elementwise()(x, t))


def network(x: Tensor, t: float | Tensor) -> Tensor:
    return torch.sin(x + float(t) / 100) * 0.7


def images(pipeline: Any, **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(output_type="pt", **options).images


def loop(scheduler: Any, x: Tensor, timesteps: Any = None, **step: Any) -> Tensor:
    for t in scheduler.timesteps if timesteps is None else timesteps:
        x = scheduler.step(network(x, t), t, x, **step).prev_sample
    return x


# Stock pipelines


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        (DDPMPipeline, "ddpm", {}),
        (DDPMPipeline, "ddim", {}),
        (DDPMPipeline, "dpm", {}),
        (DDIMPipeline, "ddim", {}),
        (DDIMPipeline, "ddim", {"eta": 0.5}),
    ],
)
def test_stock_pipelines_run_with_ours(kind: Any, name: str, options: dict[str, float]) -> None:
    pipeline = kind(tiny_unet(), DDIMScheduler())
    pipeline.scheduler = PAIRS[name][0].from_config(pipeline.scheduler.config)
    options = {"batch_size": 2, "num_inference_steps": 3, **options}
    first, again = (images(pipeline, generator=torch.Generator().manual_seed(0), **options) for _ in range(2))
    assert first.shape == (2, 1, 8, 8)
    assert first.isfinite().all()
    assert first.std() > 0.01
    assert torch.equal(first, again)


def test_a_stock_pipeline_makes_what_our_sampler_makes() -> None:
    seeds = seeds_from(3, 4)
    start = bdkernels.normal(seeds, SHAPE)
    pipeline = DDPMPipeline(ElementwiseUNet(), fused.FusedDDPMScheduler())
    with mock.patch("diffusers.pipelines.ddpm.pipeline_ddpm.randn_tensor", return_value=start):
        got = images(pipeline, batch_size=4, num_inference_steps=6, generator=torch.Generator().manual_seed(3))
    table = ddpm(Nodes.of(linear(), 6, "leading")).clipped("x0")
    own = Sampler(elementwise(), {"": Arm(table)}, micro_batch=4)(seeds.tolist())[""]
    assert torch.equal(got, (own / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize(
    ("name", "options", "step", "table"),
    [
        ("ddpm", {**TRAILING, "clip_sample": False, "variance_type": "fixed_large"}, {},
         lambda n: ddpm(n, "large")),
        ("ddpm", TRAILING, {}, lambda n: ddpm(n).clipped("x0")),
        ("ddim", {**TRAILING, "clip_sample": False}, {"eta": 0.5}, lambda n: ddim(n, 0.5)),
        ("dpm", {**TRAILING, "solver_order": 3}, {}, lambda n: dpm_multistep(n, 3)),
        ("dpm", {**TRAILING, "algorithm_type": "sde-dpmsolver++"}, {}, lambda n: dpm_multistep(n, 2, "sde-dpm++")),
        ("unipc", TRAILING, {}, unipc),
    ],
)  # fmt: skip
def test_every_scheduler_makes_what_our_sampler_makes(name: str, options: Any, step: Any, table: Any) -> None:
    seeds = seeds_from(5, 3)
    scheduler = PAIRS[name][0](**options)
    scheduler.set_timesteps(8)
    x = bdkernels.normal(seeds, SHAPE)
    if name != "unipc":
        step = {**step, "generator": torch.Generator().manual_seed(5)}
    for t in scheduler.timesteps:
        x = scheduler.step(Elementwise()(x, t), t, x, **step).prev_sample
    own = Sampler(elementwise(), {"": Arm(table(Nodes.of(linear(), 8)))}, micro_batch=3)(seeds.tolist())[""]
    assert torch.equal(x, own)


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
    step = partial(scheduler.step, sample=x, generator=torch.Generator().manual_seed(0))
    expected = [step(x, t).prev_sample for t in scheduler.timesteps]
    for row in (7, 2, 2, 9):
        t = scheduler.timesteps[row]
        for form in (t, t.clone(), t[None], int(t), float(t), scheduler.timesteps[row - 1 :][1]):
            assert torch.equal(step(x, form).prev_sample, expected[row])


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


# Noise and seeds


def test_image_k_of_a_list_of_generators_is_the_same_in_any_batch() -> None:
    pipeline = DDPMPipeline(ElementwiseUNet(), fused.FusedDDPMScheduler())
    batch = images(pipeline, batch_size=3, num_inference_steps=5, generator=generators(7, 8, 9))
    assert not torch.equal(batch[0], batch[1])
    for k, seed in enumerate((7, 8, 9)):
        assert torch.equal(images(pipeline, num_inference_steps=5, generator=generators(seed))[0], batch[k])
    swapped = images(pipeline, batch_size=2, num_inference_steps=5, generator=generators(9, 8))
    assert torch.equal(swapped, batch[[2, 1]])


def test_without_a_generator_runs_differ_and_follow_torchs_seed() -> None:
    scheduler = fused.FusedDDPMScheduler()
    x = torch.zeros(2, *SHAPE)

    def once() -> Tensor:
        scheduler.set_timesteps(5)
        return loop(scheduler, x)

    torch.manual_seed(4)
    first, second = once(), once()
    torch.manual_seed(4)
    assert torch.equal(once(), first)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("name", ["ddim", "dpm", "unipc"])
def test_samplers_without_noise_leave_torchs_generator_alone(name: str) -> None:
    before = torch.get_rng_state()
    scheduler = PAIRS[name][0]()
    scheduler.set_timesteps(5)
    loop(scheduler, torch.zeros(2, *SHAPE))
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_are_drawn_once_a_run() -> None:
    scheduler = fused.FusedDDPMScheduler()
    generator, once = generators(1, 1)
    scheduler.set_timesteps(5)
    loop(scheduler, torch.zeros(2, *SHAPE), generator=generator)
    torch.randint(-(2**63), 2**63 - 1, (2,), generator=once)
    assert torch.equal(generator.get_state(), once.get_state())


# Tensors


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_layouts(name: str, dtype: torch.dtype) -> None:
    """A narrow step is the float32 step of the same values, rounded once; layouts change no bit; inputs are kept."""
    x = bdkernels.normal(seeds_from(0, 2), (3, 8, 8), dtype=dtype)
    forms = {
        "float": lambda v: v.float(),
        "plain": lambda v: v,
        "last": lambda v: v.contiguous(memory_format=torch.channels_last),
        "slice": lambda v: torch.cat([v, v], 1)[:, :3],
    }
    schedulers = {form: PAIRS[name][0]() for form in forms}
    noise = {} if name == "unipc" else {form: torch.Generator().manual_seed(0) for form in forms}
    for scheduler in schedulers.values():
        scheduler.set_timesteps(4)
    for t in schedulers["plain"].timesteps.tolist():
        m, after = network(x, t), {}
        for form, make in forms.items():
            given = make(x)
            drawn = {"generator": noise[form]} if noise else {}
            after[form] = schedulers[form].step(make(m), t, given, **drawn).prev_sample
            assert torch.equal(given, make(x))
            assert after[form].dtype == given.dtype
        assert after["last"].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(after["plain"], after["float"].to(dtype))
        assert torch.equal(after["last"], after["plain"])
        assert torch.equal(after["slice"], after["plain"])
        x = after["plain"]


def test_the_output_reads_like_stocks_and_predicts_when_asked() -> None:
    scheduler = fused.FusedDDPMScheduler()
    scheduler.set_timesteps(4)
    x, t = bdkernels.normal(seeds_from(0, 2), SHAPE), scheduler.timesteps[0]
    with mock.patch.object(bdkernels, "fused_step", wraps=bdkernels.fused_step) as calls:
        out = scheduler.step(x, t, x)
        assert calls.call_count == 1
        pair = scheduler.step(x, t, x, return_dict=False)
        assert calls.call_count == 3
    assert torch.equal(out[0], pair[0])
    assert torch.equal(out["prev_sample"], pair[0])
    assert torch.equal(out[1], pair[1])
    assert torch.equal(out["pred_original_sample"], out.pred_original_sample)
    multistep = fused.FusedUniPCMultistepScheduler()
    multistep.set_timesteps(4)
    (only,) = multistep.step(x, multistep.timesteps[0], x, return_dict=False)
    assert only.shape == x.shape


class NoHostRead(TorchDispatchMode):
    """Raises on what would wait for an accelerator: a scalar read, a place found by content, a copy to another device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "_to_copy", "copy_")
        assert func.name().removeprefix("aten::") not in reads, f"{func.name()} in a step"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", PAIRS)
def test_a_step_reads_nothing_back(name: str) -> None:
    ours, stock = (scheduler() for scheduler in PAIRS[name])
    x = bdkernels.normal(seeds_from(0, 2), SHAPE)
    m = network(x, 3)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(20)
    x = ours.step(m, ours.timesteps[0], x).prev_sample  # the first step sends the table
    with NoHostRead():
        for t in ours.timesteps[1:]:
            x = ours.step(m, t, x).prev_sample
    with pytest.raises(AssertionError, match="in a step"), NoHostRead():
        stock.step(m, stock.timesteps[0], x)


@pytest.mark.parametrize("name", PAIRS)
def test_on_another_device_too_the_first_step_included(name: str) -> None:
    """The meta device stands for an accelerator: nothing can be read from it, and any attempt raises."""
    ours, _ = (scheduler() for scheduler in PAIRS[name])
    ours.set_timesteps(20)
    x = torch.zeros(2, *SHAPE, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        x.cpu()
    rows = []
    with mock.patch.object(fused, "_Run", side_effect=fused._Run) as runs:
        for t in ours.timesteps:
            x = ours.step(x, t.to("meta"), x).prev_sample
            rows.append(ours._step_index)
    assert x.device.type == "meta"
    assert rows == list(range(1, 21))
    assert runs.call_count == 1


# Files


RELOAD = """
import sys, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
image = pipeline(batch_size=2, num_inference_steps=4, generator=torch.Generator().manual_seed(3), output_type="pt").images
torch.save([type(pipeline.scheduler).__module__, type(pipeline.scheduler).__name__, image], sys.argv[2])
"""


def test_a_saved_pipeline_makes_the_same_bits_in_a_fresh_process(tmp_path: Path) -> None:
    scheduler = fused.FusedDDPMScheduler(clip_sample_range=0.8, timestep_spacing="trailing")
    pipeline = DDPMPipeline(tiny_unet(), scheduler)
    pipeline.save_pretrained(tmp_path / "saved")
    options = {"batch_size": 2, "num_inference_steps": 4}
    # From the file too: loading lays the weights out anew, and a layout changes the last bits.
    here = images(
        DiffusionPipeline.from_pretrained(tmp_path / "saved"), generator=torch.Generator().manual_seed(3), **options
    )
    subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path / "saved"), str(tmp_path / "out")], check=True)
    module, name, there = torch.load(tmp_path / "out", weights_only=True)
    assert (module, name) == ("bdengine.integrations.diffusers", "FusedDDPMScheduler")
    assert torch.equal(here, there)
    stock = DDPMScheduler.from_pretrained(tmp_path / "saved", subfolder="scheduler")
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "saved", scheduler=stock)
    assert images(pipeline, **options).isfinite().all()
    assert type(DDIMPipeline.from_pretrained(tmp_path / "saved").scheduler) is DDIMScheduler


@pytest.mark.parametrize("name", PAIRS)
def test_stock_reads_what_ours_saves(name: str, tmp_path: Path) -> None:
    ours, stock = PAIRS[name]
    saved = ours(beta_end=0.03, timestep_spacing="trailing", num_train_timesteps=500)
    saved.save_pretrained(tmp_path)
    for kind in (stock, ours):
        read = kind.from_pretrained(tmp_path)
        assert type(read) is kind
        assert {k: v for k, v in read.config.items() if k[0] != "_"} == {
            k: v for k, v in saved.config.items() if k[0] != "_"
        }
    assert type(ours.from_config(stock.from_config(saved.config).config)) is ours


def test_ours_can_be_had_from_any_stock_configuration() -> None:
    for config in (stock().config for _, stock in PAIRS.values()):
        for ours, stock in PAIRS.values():
            expected = stock.from_config(config)
            got = ours.from_config(config)
            got.set_timesteps(10)
            expected.set_timesteps(10)
            assert torch.equal(got.timesteps, expected.timesteps)


# Refusals


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("ddpm", {"thresholding": True}, "thresholding is True with FusedDDPMScheduler: expected False"),
        ("ddpm", {"variance_type": "learned_range"}, "variance_type is 'learned_range' .* expected 'fixed_small' or"),
        ("ddpm", {"variance_type": "fixed_large_log"}, "variance_type is 'fixed_large_log'"),
        ("ddpm", {"beta_schedule": "laplace"}, "unknown beta schedule 'laplace'"),
        ("ddpm", {"prediction_type": "score"}, "unknown prediction type 'score'"),
        ("ddim", {"thresholding": True}, "thresholding is True with FusedDDIMScheduler"),
        ("dpm", {"thresholding": True}, "thresholding"),
        ("dpm", {"variance_type": "learned"}, "variance_type is 'learned'"),
        (
            "dpm",
            {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
            "algorithm_type is 'sde-dpmsolver' .* 'sde-dpmsolver\\+\\+'",
        ),
        ("dpm", {"solver_order": 4}, "solver_order is 4 .* expected 1 or 2 or 3"),
        ("dpm", {"lower_order_final": False}, "lower_order_final is False .* expected True"),
        ("dpm", {"euler_at_final": True}, "euler_at_final is True"),
        ("dpm", {"use_flow_sigmas": True}, "use_flow_sigmas is True"),
        ("dpm", {"prediction_type": "flow_prediction"}, "unknown prediction type 'flow_prediction'"),
        ("unipc", {"disable_corrector": [0]}, r"disable_corrector is \[0\]"),
        ("unipc", {"solver_p": DDPMScheduler()}, "solver_p is DDPMScheduler"),
    ],
)
def test_what_a_table_cannot_do_is_refused(name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        PAIRS[name][0](**options)


@pytest.mark.parametrize(
    ("name", "options", "steps", "sentence"),
    [
        ("ddpm", {"rescale_betas_zero_snr": True, **TRAILING}, 10, "not finite .* other than epsilon"),
        ("ddpm", {"steps_offset": 1}, 1000, "timestep 1000 is not of training: expected 0 to 999"),
        ("dpm", {"solver_type": "heun"}, 1000, "dpm\\+\\+-2m-1000 has coefficients that are not finite"),
    ],
)
def test_grids_that_have_no_table_are_refused(name: str, options: Any, steps: int, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        PAIRS[name][0](**options).set_timesteps(steps)


def test_what_a_step_cannot_do_is_refused() -> None:
    x = torch.zeros(2, *SHAPE)
    one, two = fused.FusedDDIMScheduler(), fused.FusedDPMSolverMultistepScheduler()
    with pytest.raises(UserError, match="step was called on a new scheduler: expected set_timesteps first"):
        two.step(x, 999, x)
    for scheduler in (one, two):
        scheduler.set_timesteps(4)
        with pytest.raises(UserError, match="variance_noise was given"):
            scheduler.step(x, scheduler.timesteps[0], x, variance_noise=x)
        with pytest.raises(UserError, match=r"timestep 1 is not of this run: expected one of scheduler.timesteps"):
            scheduler.step(x, 1, x)
    with pytest.raises(UserError, match="3 generators were given for 2 samples"):
        one.step(x, one.timesteps[0], x, eta=1, generator=generators(1, 2, 3))
    with pytest.raises(UserError, match="use_clipped_model_output is True"):
        one.step(x, one.timesteps[0], x, use_clipped_model_output=True)
    with pytest.raises(UserError, match="eta is 2"):
        one.step(x, one.timesteps[0], x, eta=2)
    with pytest.raises(UserError, match="keeps no graph"):
        two.step(x.clone().requires_grad_(), two.timesteps[0], x)
    loop(two, x)
    with pytest.raises(UserError, match="step 5 of a run of 4: expected set_timesteps before another run"):
        two.step(x, two.timesteps[0], x)
