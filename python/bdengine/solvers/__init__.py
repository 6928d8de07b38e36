"""Samplers by name; each is a function from a schedule and a number of steps to a `Table`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import UserError, unknown
from ..schedule import Schedule, Spacing
from .ddim import ddim
from .ddpm import ddpm
from .table import CLIPS, Clip, Table, stack

__all__ = ["CLIPS", "SAMPLERS", "Clip", "SamplerConfig", "Table", "ddim", "ddpm", "stack"]

SAMPLERS = ("ddpm", "ddim")


@dataclass(frozen=True)
class SamplerConfig:
    """Which sampler, on which grid."""

    name: str = "ddpm"
    """One of: ddpm, ddim."""
    steps: int = 1000
    """Network evaluations, 1 to the number of training timesteps."""
    spacing: Spacing = "trailing"
    """How the timesteps are spread."""
    eta: float = 0.0
    """Noise of ddim: 0 is deterministic, 1 is ddpm."""
    variance: Literal["small", "large"] = "small"
    """Variance of ddpm: the posterior's (small) or beta (large)."""

    def table(self, schedule: Schedule) -> Table:
        """Its table.

        Raises:
            UserError: An unknown name, or a value out of range.
        """
        if self.name != "ddim" and self.eta != 0:
            raise UserError(f"eta is {self.eta:g} with {self.name}: expected ddim, the sampler whose noise eta scales")
        if self.name == "ddpm":
            return ddpm(schedule, self.steps, self.spacing, self.variance)
        if self.name == "ddim":
            return ddim(schedule, self.steps, self.spacing, self.eta)
        raise unknown("sampler", self.name, SAMPLERS)
