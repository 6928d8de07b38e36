"""Our schedulers and stock's, side by side, and what drives them in the tests."""

from types import SimpleNamespace
from typing import Any

import torch
from diffusers.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor, nn

from bdengine.integrations import diffusers as fused
from bdengine.networks import unet

from .networks_for_tests import Elementwise

PAIRS = {
    "ddpm": (fused.FusedDDPMScheduler, DDPMScheduler),
    "ddim": (fused.FusedDDIMScheduler, DDIMScheduler),
    "dpm": (fused.FusedDPMSolverMultistepScheduler, DPMSolverMultistepScheduler),
    "unipc": (fused.FusedUniPCMultistepScheduler, UniPCMultistepScheduler),
}
LEADING, TRAILING = {"timestep_spacing": "leading"}, {"timestep_spacing": "trailing"}
SHAPE = (1, 8, 8)


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
