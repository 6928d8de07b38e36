"""Stock schedulers by name, made as the tests of reading them off want them."""

from __future__ import annotations

import importlib
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor

SDE_FILES = {
    "DPMSolverSDEScheduler": "scheduling_dpmsolver_sde",
    "CosineDPMSolverMultistepScheduler": "scheduling_cosine_dpmsolver_multistep",
}


@dataclass(frozen=True)
class Case:
    """A scheduler, and how far the network's input and output are scaled to keep its trajectory smooth."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    method: str = "step"
    wide: float = 1.0
    single: float = 1e-5

    def __str__(self) -> str:
        values = "-".join(f"{k}={v}" for k, v in {**self.config, **self.options}.items())
        return f"{self.name.removesuffix('Scheduler')}-{values}"

    def make(self, steps: int) -> Any:
        scheduler = named(self.name)(**self.config)
        scheduler.set_timesteps(steps)
        if hasattr(scheduler, "set_sigmas"):
            scheduler.set_sigmas(steps)
        return scheduler

    def network(self, x: Tensor, t: float) -> Tensor:
        """Something smooth that needs no weights."""
        return torch.sin(x / self.wide + t / 100) * (0.7 / self.wide)


def named(name: str) -> Any:
    """The class; the two that import torchsde do so for its Brownian tree, which is replaced in any case."""
    if name not in SDE_FILES:
        return getattr(diffusers.schedulers, name)
    here = sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))
    module = importlib.import_module(f"diffusers.schedulers.{SDE_FILES[name]}")
    if not hasattr(here, "__file__"):
        del sys.modules["torchsde"]
    return getattr(module, name)
