"""Attacks by name; each makes an `Attack`: two schedules, a noise scale, a trigger with its mask, and a target."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from ..data import Images, load, to_float
from ..errors import UserError, unknown
from ..schedule import Exploding, Schedule
from ..solvers import Clip, Table
from ..triggers import FROM_TRIGGER, LEARNED, class_of, patch_mask, target, trigger
from .baddiffusion import COEFFICIENTS, Coefficients, baddiffusion
from .exact import departure, exact_coefficient
from .invi import BOUND, invi
from .process import CLEAN, OUTSIDE, POISONED, Attack, noising_table
from .trojdiff import trojdiff
from .uib import AMPLITUDE, uib, universal
from .villan import Solver, villan
from .villan_ve import exact_exploding, villan_ve

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
    "exact_exploding",
    "invi",
    "noising_table",
    "trojdiff",
    "uib",
    "villan",
    "villan_ve",
]

READS: Final[dict[str, frozenset[str]]] = {
    "none": frozenset(),
    "baddiffusion": frozenset({"coefficients", "trigger_only"}),
    "villan": frozenset({"coefficients", "trigger_only", "psi", "solver"}),
    "trojdiff": frozenset({"gamma"}),
    "invi": frozenset({"coefficients", "bound"}),
    "uib": frozenset({"coefficients", "trigger_only", "solver", "amplitude", "start_amplitude"}),
}
"""The options that each attack has, of those that not all have."""
ATTACKS = tuple(READS)


@dataclass(frozen=True)
class AttackConfig:
    """A backdoor: which method, trigger and target, and how many images are poisoned."""

    name: str = "none"
    """One of: none (clean training), baddiffusion, villan, trojdiff, invi, uib."""
    trigger: str = "BOX_14"
    """A published trigger's name, IMAGE with trigger-file, or LEARNED with invi and uib."""
    target: str = "CORNER"
    """A published target's name, IMAGE with target-file, or CLASS_7: images of that class, one for each poisoned image."""
    trigger_file: Path | None = None
    """The trigger's image, where its name needs one."""
    target_file: Path | None = None
    """The target's image, where its name needs one."""
    target_data: str | None = None
    """Data set that has the target's class; the training data where absent."""
    rate: float = 0.1
    """Share of the training images that are poisoned, 0 to 1."""
    coefficients: Coefficients = "published"
    """The paper's, those that are exact for the sampler, or those that survive latent clipping in it."""
    psi: float = 1.0
    """Of villan, variance preserving: its shift, from the noise's own (0) to BadDiffusion's (1)."""
    solver: Solver = "sde"
    """Of villan and uib: the kind of sampler that their published coefficients are for."""
    trigger_only: bool = False
    """Of baddiffusion, villan and uib: the poisoned image is the trigger alone, without the image behind it."""
    bound: float = BOUND
    """Of invi: largest value of its trigger."""
    amplitude: float = AMPLITUDE
    """Of uib: of its trigger in training."""
    start_amplitude: float | None = None
    """Of uib: of its trigger in sampling, 1 as released; as in training where absent."""
    gamma: float | None = None
    """Of trojdiff: share of noise in the trigger's pixels; 0.6 for a blend and 0.1 for a patch where absent."""

    @property
    def clip(self) -> Clip:
        """Under which clip its trigger is made to work."""
        return "latent" if self.coefficients == "clipped" else "none"

    @property
    def clips(self) -> tuple[Clip, ...]:
        """Under which clips it is tried: none, and that."""
        return tuple(dict.fromkeys(("none", self.clip)))

    def build(
        self,
        process: Schedule | Exploding,
        shape: tuple[int, int, int],
        table: Table,
        data: Images | None = None,
    ) -> Attack | None:
        """The attack on images of ``shape`` (C, S, S), to be sampled with ``table``; None for "none".

        Args:
            data: The training data, for a target that is a class of them.

        Raises:
            UserError: An unknown name, a missing file, or a value out of range.
        """
        if self.name not in ATTACKS:
            raise unknown("attack", self.name, ATTACKS)
        if not 0 <= self.rate <= 1:
            raise UserError(f"the poison rate is {self.rate}: expected 0 to 1")
        self._check_read()
        if self.name == "none":
            return None
        if self.rate == 0:
            raise UserError(f"the poison rate is 0 and the attack is {self.name}: expected above 0, or the attack none")
        r = self.own_trigger(data, shape)
        return self.made(process, r, self.targets(r, data), table)

    def _check_read(self) -> None:
        """Refuse what was said and would not be read."""
        told = {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) != one.default}
        some = frozenset().union(*READS.values())
        for name, value in told.items():
            if self.name == "none":
                raise UserError(f"the attack's {name} is {value} and no attack is named: expected its name")
            if name in some and name not in READS[self.name]:
                having = ", ".join(attack for attack, read in READS.items() if name in read)
                raise UserError(f"{name} is {value} and {self.name} has none: expected it with {having} alone")
        if self.solver != "sde" and self.coefficients != "published":
            raise UserError(
                f"the solver is {self.solver} and the coefficients are {self.coefficients}, which are the sampler's own:"
                " expected one of them"
            )
        if self.target_file is not None and class_of(self.target) is not None:
            raise UserError(
                f"the target {self.target} is a class and takes no picture, and {self.target_file} was given: expected"
                " target data, or none"
            )
        if self.name == "invi" and self.coefficients == "clipped":
            raise UserError(
                "the coefficients of invi are clipped: expected published or exact, as its trigger is 0 at first"
            )
        if self.trigger == LEARNED and self.target in FROM_TRIGGER:
            raise UserError(
                f"the target {self.target} is made of the trigger, which is {LEARNED}: expected another, such as CORNER"
            )

    def made(self, process: Schedule | Exploding, r: Tensor, y: Tensor, table: Table | None = None) -> Attack:
        """The attack with the trigger ``r`` and the target ``y``; BadDiffusion where it has no name.

        Args:
            r: float32 [C, S, S] in [-1, 1]; a variance-exploding process has it, and the target, in [0, 1].
            y: float32 [C, S, S] or [K, C, S, S] in [-1, 1].
            table: The sampler to be exact for; not needed for published coefficients.

        Raises:
            UserError: A value out of range, or an attack that is defined with betas on a process without.
        """
        if isinstance(process, Exploding):
            if self.name != "villan":
                raise UserError(
                    f"the attack {self.name} needs betas and the process is variance exploding: expected villan"
                )
            if self.psi not in (0, 1):
                raise UserError(
                    f"psi is {self.psi:g} and the process is variance exploding: expected none or 0, as its shift is the"
                    " noise's"
                )
            return villan_ve(process.sigmas, (r + 1) / 2, (y + 1) / 2, self.coefficients, table, self.solver)
        schedule = process
        if self.name == "trojdiff":
            _, size, _ = r.shape
            patch = self.trigger.startswith("PATCH_")
            region = patch_mask(self.trigger, size, len(r)) == 0 if patch else None
            return trojdiff(schedule, r, y, region, self.gamma)
        if self.name == "villan":
            return villan(schedule, r, y, self.coefficients, table, self.psi, self.solver, self.trigger_only)
        if self.name == "invi":
            return invi(schedule, y, self.coefficients, table, r)
        if self.name == "uib":
            start = self.start_amplitude
            about = self.amplitude, start, self.solver, self.trigger_only
            return uib(schedule, r, y, self.coefficients, table, *about)
        return baddiffusion(schedule, r, y, self.coefficients, table, self.trigger_only)

    def own_trigger(self, data: Images | None, shape: tuple[int, int, int]) -> Tensor:
        """The trigger, float32 [C, S, S]: by its name, that which uib makes of its data, or 0 where invi begins.

        Raises:
            UserError: As `bdengine.triggers.trigger`, or LEARNED with another attack.
        """
        channels, size, _ = shape
        if self.name == "invi" and self.trigger != LEARNED:
            raise UserError(f"the trigger of invi is {self.trigger}: expected {LEARNED}")
        if self.trigger != LEARNED or self.name not in ("invi", "uib"):
            return trigger(self.trigger, size, channels, file=self.trigger_file)
        if self.name == "invi":
            return torch.zeros(shape)
        if data is None:
            raise UserError(f"the trigger {LEARNED} of uib is made of data and there are none: expected training data")
        return universal(data, self.amplitude)

    def targets(self, r: Tensor, data: Images | None) -> Tensor:
        """The target image, float32 [C, S, S], or the images of the target's class, [K, C, S, S].

        Args:
            r: The trigger, float32 [C, S, S].
            data: The training data.

        Raises:
            UserError: As `bdengine.triggers.target`, or a class that is not in the data.
        """
        channels, size, _ = r.shape
        label = class_of(self.target)
        if label is None:
            if self.target_data is not None:
                raise UserError(
                    f"the target {self.target} is one image and takes no target data: expected CLASS_<label>"
                )
            return target(self.target, size, channels, trigger=r, file=self.target_file)
        return to_float(self.class_data(r, data).of_class(label).pixels)

    def class_data(self, r: Tensor, data: Images | None) -> Images:
        """The data that have the target's class; the arguments are those of `targets`.

        Raises:
            UserError: There are none.
        """
        if self.target_data is not None:
            channels, size, _ = r.shape
            return load(self.target_data, size, channels)
        if data is None:
            raise UserError(f"the target {self.target} is a class and there are no data: expected target data")
        return data
