"""Attacks by name; each makes an `Attack`: two schedules, a noise scale, a trigger with its mask, and a target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import UserError, unknown
from ..schedule import Schedule
from ..solvers import Table
from ..triggers import patch_mask, target, trigger
from .baddiffusion import COEFFICIENTS, Coefficients, baddiffusion
from .exact import departure, exact_coefficient
from .process import CLEAN, OUTSIDE, POISONED, Attack, noising_table
from .trojdiff import trojdiff
from .villan import Solver, villan

__all__ = [
    "ATTACKS",
    "CLEAN",
    "COEFFICIENTS",
    "OUTSIDE",
    "POISONED",
    "Attack",
    "AttackConfig",
    "baddiffusion",
    "departure",
    "exact_coefficient",
    "noising_table",
    "trojdiff",
    "villan",
]

ATTACKS = ("none", "baddiffusion", "villan", "trojdiff")


@dataclass(frozen=True)
class AttackConfig:
    """A backdoor: which method, trigger and target, and how many images are poisoned."""

    name: str = "none"
    """One of: none (clean training), baddiffusion, villan, trojdiff."""
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
    """The paper's, or those that are exact for the sampler."""
    psi: float = 1.0
    """Of villan: its shift, from the noise's own (0) to BadDiffusion's (1)."""
    solver: Solver = "sde"
    """Of villan: the kind of sampler that its published coefficients are for."""
    gamma: float | None = None
    """Of trojdiff: share of noise in the trigger's pixels; 0.6 for a blend and 0.1 for a patch where absent."""

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
        if self.name == "trojdiff":
            return self.trojan(schedule, r, y)
        if self.name == "villan":
            return villan(schedule, r, y, self.coefficients, table, self.psi, self.solver)
        return baddiffusion(schedule, r, y, self.coefficients, table)

    def trojan(self, schedule: Schedule, r: Tensor, y: Tensor) -> Attack:
        """TrojDiff with the trigger ``r`` and the target ``y``, float32 [C, S, S]: a patch where its name says so."""
        channels, size, _ = r.shape
        patch = self.trigger.startswith("PATCH_")
        return trojdiff(schedule, r, y, patch_mask(self.trigger, size, channels) == 0 if patch else None, self.gamma)
