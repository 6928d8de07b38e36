"""A whole sampling loop as a user has it: `Sampler` on the accelerated UNet against diffusers' pipeline on the stock one.

    x_T = eps      for each t of the trailing grid:  x0 = clamp((x - s unet(x, t)) / a, -1, 1)      x = p x + q x0 + z eps

``diffusers`` is `DDPMPipeline`, ``torch`` the loop by hand with its UNet in channels-last, ``compile`` that with the UNet under
``torch.compile``. All have the same random weights, under which only the clip keeps ``x`` from growing 157 times. The gate is
stock's loop in float64 with our noise, which every row is given.

The share is that of the same loop with an output that is there already in place of the UNet: steps, noise and the loop's own
cost. The ceiling is the accelerated UNet alone, as often as a loop evaluates it. The process keeps freed memory, as in
``network.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Final

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

import bdkernels
from bdengine.accelerate import accelerate
from bdengine.memory import keep_freed
from bdengine.networks import Network
from bdengine.sampler import Arm, Sampler
from bdengine.schedule import linear
from bdengine.solvers import SamplerConfig
from bdkernels import STREAM_STEP

from .bench import CEILING, HOST, REFERENCE, Provider, Shape, compiled, ours, seeds_of
from .capture import CHECKED, check_images, in_unit_range, our_noise, pipeline, run_pipeline
from .network import Form, Networks

SHAPES: Final = ((256, 1, 16, 16), (8, 3, 32, 32))
"""The digits' and CIFAR's, whose UNet takes 33 ms an image."""
FEW, MANY = 4, 20
"""Steps at 32 pixels and above, and below."""
Draw = Callable[[], Tensor]


def steps_of(shape: Shape) -> int:
    """Of the loop: few where the UNet is large; divisors of 1,000."""
    return FEW if shape[3] >= 32 else MANY


@cache
def truth(shape: Shape) -> Tensor:
    """The first images of stock's loop in float64."""
    with our_noise(seeds_of(CHECKED)):
        return run_pipeline(
            pipeline(Networks(shape, False, HOST).unet(dtype=torch.float64), clip=True), CHECKED, steps_of(shape)
        )


def by_hand(net: Form, steps: int, draw: Draw) -> Tensor:
    """The formula, with the posterior's mean and variance; no noise at the last step."""
    alpha_bar, x = linear().alpha_bar, draw()
    for k in range(steps):
        t = 999 - k * 1000 // steps
        bar, before = float(alpha_bar[t]), float(alpha_bar[t - 1000 // steps]) if k < steps - 1 else 1.0
        alpha = bar / before
        x0 = (x - (1 - bar) ** 0.5 * net(x, torch.tensor(t))).mul_(bar**-0.5).clamp_(-1, 1)
        x = x0.mul_(before**0.5 * (1 - alpha) / (1 - bar)).add_(x, alpha=alpha**0.5 * (1 - before) / (1 - bar))
        if k < steps - 1:
            x.add_(draw(), alpha=((1 - before) / (1 - bar) * (1 - alpha)) ** 0.5)
    return x


def our_draws(seeds: Tensor, shape: Shape) -> Iterator[Tensor]:
    """The initial noise and that of each step."""
    yield bdkernels.normal(seeds, shape[1:])
    step = 0
    while True:
        yield bdkernels.normal(seeds, shape[1:], step=step, stream=STREAM_STEP)
        step += 1


def answering(unet: Any, m: Tensor) -> Any:
    """A network with its configuration that returns ``m`` at once."""
    free = copy.copy(unet)
    free.forward = lambda *_, return_dict=True, **__: UNet2DOutput(sample=m) if return_dict else (m,)
    return free


def whole_loop(shape: Shape, device: torch.device = HOST) -> dict[str, Provider]:
    """The providers of a loop on a batch of ``shape``."""
    keep_freed()
    steps, of = steps_of(shape), Networks(shape, False, device)
    seeds, arm = seeds_of(shape[0]).to(device), torch.zeros(shape[0], dtype=torch.int64, device=device)
    generator = torch.Generator(device).manual_seed(0)
    m = torch.randn(shape).to(device, memory_format=torch.channels_last)
    table = SamplerConfig("ddpm", steps).table(linear()).clipped("x0")
    contiguous, stock, fast = of.unet(torch.contiguous_format), of.unet(), accelerate(of.unet())

    def theirs() -> Provider:
        made, free = (pipeline(net, clip=True) for net in (contiguous, answering(contiguous, m)))

        def check() -> None:
            with our_noise(seeds):
                check_images(truth(shape), lambda: run_pipeline(made, shape[0], steps))

        def share() -> Tensor:
            return run_pipeline(free, shape[0], steps, generator)

        return Provider(
            lambda: run_pipeline(made, shape[0], steps, generator), check, steps=steps, share=("step_share", share)
        )

    def hand(form: Callable[[Form], Form]) -> Provider:
        call = form(lambda x, t: stock(x, t, return_dict=False)[0])

        def draw() -> Tensor:
            return torch.randn_like(m)

        @torch.inference_mode()
        def run(net: Form, draw: Draw) -> Tensor:
            return by_hand(net, steps, draw)

        def check() -> None:
            draws = our_draws(seeds, shape)
            check_images(
                truth(shape),
                lambda: in_unit_range(run(call, lambda: next(draws).contiguous(memory_format=torch.channels_last))),
            )

        return Provider(
            lambda: run(call, draw), check, steps=steps, share=("step_share", lambda: run(lambda *_: m, draw))
        )

    def fused() -> Provider:
        made, free = (Sampler(Network(net), {"": Arm(table)}, shape[0]) for net in (fast, answering(fast, m)))

        def check() -> None:
            check_images(truth(shape), lambda: in_unit_range(made.batch(arm, seeds)))

        return Provider(
            lambda: made.batch(arm, seeds), check, steps=steps, share=("step_share", lambda: free.batch(arm, seeds))
        )

    x, times = torch.randn_like(m), torch.tensor(table.timesteps, dtype=torch.float32, device=device)

    @torch.inference_mode()
    def alone() -> None:
        for time in times:
            fast(x, time)

    return {
        "diffusers": theirs(),
        "torch": hand(lambda call: call),
        "compile": hand(compiled),
        **dict.fromkeys(ours(device) or (REFERENCE,), fused()),
        CEILING: Provider(alone, steps=steps),
    }
