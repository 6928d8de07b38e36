"""Attacks by name; each makes an `Attack`: two schedules, a noise scale, a trigger with its mask, and a target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError, unknown
from ..schedule import Schedule
from ..solvers import Table
from ..triggers import target, trigger
from .baddiffusion import COEFFICIENTS, Coefficients, baddiffusion
from .exact import departure, exact_coefficient
from .process import CLEAN, POISONED, Attack, noising_table

__all__ = [
    "ATTACKS",
    "CLEAN",
    "COEFFICIENTS",
    "POISONED",
    "Attack",
    "AttackConfig",
    "baddiffusion",
    "departure",
    "exact_coefficient",
    "noising_table",
]

ATTACKS = ("none", "baddiffusion")


@dataclass(frozen=True)
class AttackConfig:
    """A backdoor: which method, trigger and target, and how many images are poisoned."""

    name: str = "none"
    """One of: none (clean training), baddiffusion."""
    trigger: str = "BOX_14"
    """A published trigger's name, or IMAGE with trigger-file."""
    target: str = "CORNER"
    """A published target's name, or IMAGE with target-file."""
    trigger_file: Path | None = None
    """The trigger's image, where its name needs one."""
    target_file: Path | None = None
    """The target's image, where its name needs one."""
    rate: float = 0.1
    """Share of the training images that are poisoned, 0 to 1."""
    coefficients: Coefficients = "published"
    """The paper's rho_t, or the coefficient that is exact for the sampler."""

    def build(self, schedule: Schedule, shape: tuple[int, int, int], table: Table) -> Attack | None:
        """The attack on images of ``shape`` (C, S, S), to be sampled with ``table``; None for "none".

        Raises:
            UserError: An unknown name, a missing file, or a value out of range.
        """
        if self.name not in ATTACKS:
            raise unknown("attack", self.name, ATTACKS)
        if not 0 <= self.rate <= 1:
            raise UserError(f"the poison rate is {self.rate}: expected 0 to 1")
        if self.name == "none":
            return None
        channels, size, _ = shape
        r = trigger(self.trigger, size, channels, file=self.trigger_file)
        y = target(self.target, size, channels, trigger=r, file=self.target_file)
        return baddiffusion(schedule, r, y, self.coefficients, table)
