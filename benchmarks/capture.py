"""A whole sampling loop with the shipped digits network: `Sampler` as it is and captured, against diffusers' pipeline.

    python -m benchmarks.run capture --device cuda

DDPM on the trailing grid, without clips. ``diffusers`` is `DDPMPipeline` with the same weights, ``compile`` the same with
its network under ``torch.compile``; the backends are `Sampler` on each of them, ``captured`` is `Sampler(capture=True)` on
the backend that the device prefers. The ceiling is the network alone, as often as a loop evaluates it, neither compiled nor
captured: rows that are can be ahead of it.

The gate is a loop of stock's in float64 with our noise, on the CPU; the captured loop has the bits of the one that is not.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Final
from unittest import mock

import torch
from diffusers import DDPMPipeline, DDPMScheduler
from diffusers.pipelines.ddpm import pipeline_ddpm
from diffusers.schedulers import scheduling_ddpm
from torch import Tensor

import bdkernels
from bdengine.checkpoint import load_scheduler_config, load_unet
from bdengine.errors import UserError
from bdengine.networks import Network
from bdengine.sampler import Arm, Sampler
from bdengine.schedule import linear
from bdengine.shipped import find
from bdengine.solvers import SamplerConfig
from bdkernels import testing
from bdkernels.noise import STREAM_STEP

from .bench import CAPTURED, CEILING, REFERENCE, Provider, Shape, assert_close, in_full, ours, seeds_of

CHECKPOINT: Final = "digits-clean"
STEPS: Final = (20, 100)
SHAPE: Final = (256, 1, 16, 16)
CHECKED: Final = 4
"""Samples of a batch that are held against float64."""


def pipeline(unet: Any, clip: bool = False) -> Any:
    """Stock's, on our grid, with its x0 clipped or not."""
    config = load_scheduler_config(find(CHECKPOINT))
    made: Any = DDPMPipeline(unet, DDPMScheduler.from_config(config, timestep_spacing="trailing", clip_sample=clip))
    made.set_progress_bar_config(disable=True)
    return made


def run_pipeline(stock: Any, count: int, steps: int, generator: torch.Generator | None = None) -> Tensor:
    """Its images in [0, 1], left on the device."""
    images = stock(batch_size=count, num_inference_steps=steps, generator=generator, output_type="pt").images
    return torch.as_tensor(images)


@contextmanager
def our_noise(seeds: Tensor) -> Iterator[None]:
    """Stock's loop starts from our noise and draws ours in its steps."""
    step = -1

    def initial(shape: Shape, *_: Any, dtype: torch.dtype, **__: Any) -> Tensor:
        return bdkernels.normal(seeds, shape[1:], dtype=torch.float64).to(dtype)

    def next_one(shape: Shape, *_: Any, dtype: torch.dtype, **__: Any) -> Tensor:
        nonlocal step
        step += 1
        return bdkernels.normal(seeds, shape[1:], step=step, stream=STREAM_STEP, dtype=torch.float64).to(dtype)

    with (
        mock.patch.object(pipeline_ddpm, "randn_tensor", initial),
        mock.patch.object(scheduling_ddpm, "randn_tensor", next_one),
    ):
        yield


@cache
def truth(steps: int) -> Tensor:
    """The first images of stock's loop, in float64 on the CPU."""
    with our_noise(seeds_of(CHECKED)):
        return run_pipeline(pipeline(load_unet(find(CHECKPOINT)).double()), CHECKED, steps)


def check_images(expected: Tensor, run: Callable[[], Tensor]) -> None:
    """The first images of a batch, in [0, 1], against the ``expected`` ones, float64.

    Raises:
        AssertionError: They are further off than `bench.PEER_TOLERANCE`.
    """
    images = in_full(run)
    assert_close(f"the worst of {CHECKED} images", images[: len(expected)].to(expected.device), expected[: len(images)])


def in_unit_range(x: Tensor) -> Tensor:
    """As the pipeline returns them."""
    return (x / 2 + 0.5).clamp(0, 1)


def unread(sampler: Sampler) -> Sampler:
    """The same sampler, which leaves the flag of bad rows on the device."""
    same = copy.copy(sampler)
    vars(same)["_check_bad"] = lambda _: None
    return same


def sampling_loop(steps: int, shape: Shape, device: torch.device) -> dict[str, Provider]:
    """The providers of a loop of ``steps`` steps on a batch of ``shape``.

    Raises:
        UserError: The images are not the network's.
    """
    network = Network(load_unet(find(CHECKPOINT))).to(device)
    count = shape[0]
    if shape[1:] != network.sample_shape:
        wanted = "x".join(map(str, (count, *network.sample_shape)))
        raise UserError(f"shape {'x'.join(map(str, shape))} is not of the network {CHECKPOINT}: expected {wanted}")
    table = SamplerConfig("ddpm", steps).table(linear())
    arm, seeds = torch.zeros(count, dtype=torch.int64, device=device), seeds_of(count).to(device)
    generator = torch.Generator(device).manual_seed(0)
    stock, compiled = (pipeline(load_unet(find(CHECKPOINT))).to(device) for _ in range(2))
    compiled.unet = torch.compile(compiled.unet, dynamic=False)
    x, times = torch.randn(shape).to(device), torch.tensor(table.timesteps, dtype=torch.float32, device=device)

    def theirs(made: Any) -> Provider:
        def check() -> None:
            with our_noise(seeds):
                check_images(truth(steps), lambda: run_pipeline(made, count, steps))

        return Provider(lambda: run_pipeline(made, count, steps, generator), check, steps=steps)

    def sampler(capture: bool = False) -> Sampler:
        return Sampler(network, {"clean": Arm(table)}, count, capture=capture)

    def fused(made: Sampler, check: Callable[[], None]) -> Provider:
        return Provider(
            partial(made.batch, arm, seeds), check, steps=steps, queued=partial(unread(made).batch, arm, seeds)
        )

    eager = sampler()

    def check_eager() -> None:
        check_images(truth(steps), lambda: in_unit_range(eager.batch(arm, seeds)))

    @torch.inference_mode()
    def alone() -> None:
        for row in range(steps):
            network(x, times[row])

    providers = {
        "diffusers": theirs(stock),
        "compile": theirs(compiled),
        **dict.fromkeys(ours(device) or (REFERENCE,), fused(eager, check_eager)),
    }
    if device.type == "cuda":
        captured = sampler(capture=True)
        providers[CAPTURED] = fused(
            captured, lambda: testing.assert_same_bits("x", captured.batch(arm, seeds), eager.batch(arm, seeds))
        )
    else:
        print("capture: a captured loop needs CUDA, so it has no row here", file=sys.stderr)
    return {**providers, CEILING: Provider(alone, steps=steps)}
