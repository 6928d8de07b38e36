"""Our schedulers inside stock pipelines, and saved with them."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline
from diffusers.schedulers import DDIMScheduler, DDPMScheduler

import bdkernels
from bdengine.integrations import diffusers as fused
from bdengine.sampler import Arm, Sampler
from bdengine.schedule import linear
from bdengine.solvers import Nodes, ddim, ddpm, dpm_multistep, unipc

from .networks_for_tests import Elementwise, elementwise
from .schedulers_for_tests import PAIRS, SHAPE, TRAILING, ElementwiseUNet, images, seeds_from, tiny_unet


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    index = json.loads((tmp_path / "saved/model_index.json").read_text())
    assert index["scheduler"] == ["bdengine.integrations.diffusers", "FusedDDPMScheduler"]
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


def test_every_class_is_one_of_its_own_compatibles_and_so_are_stocks() -> None:
    for ours, stock in PAIRS.values():
        assert set(ours().compatibles) == {ours, *stock().compatibles}


def test_ours_can_be_had_from_any_stock_configuration() -> None:
    for config in (stock().config for _, stock in PAIRS.values()):
        for ours, stock in PAIRS.values():
            expected = stock.from_config(config)
            got = ours.from_config(config)
            got.set_timesteps(10)
            expected.set_timesteps(10)
            assert torch.equal(got.timesteps, expected.timesteps)
