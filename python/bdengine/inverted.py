"""A trigger that a defense or the audit inverted, and what is made of one that only a search found.

What a search finds opens the backdoor and is no likeness of its trigger: in seven models squares at a cosine of 0.4 to 0.8 to
it. Elijah's inversion from there ends at 0.90 to 0.99 and at half of the trigger's length, so its images say how long it should
be. Its ``lambda`` is the published 0.5, and of what the clip opens the coefficient ``c_T`` of an attack that is made for it
(with 0.5 that ended at -0.12). Nothing is gained where ``c_T`` is near 1, in models of samplers without noise: what was found
stays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from . import checkpoint
from .arms import Arm
from .attacks import Attack, baddiffusion, trojdiff
from .attacks.clipped import LARGEST, surviving_coefficient
from .attacks.trojdiff import BLEND_GAMMA, PATCH_GAMMA
from .audit import SEARCHES, ode_table
from .defenses import Subject, elijah, features
from .errors import UserError
from .schedule import linear
from .solvers import SamplerConfig

LENGTHS: Final = (1.0, 1.5, 2.0)
"""Of what is inverted, tried in turn; the shortest that opens most is taken."""
IMAGES: Final = 32
"""Of each length."""
FIRST_SEED: Final = 500
"""Of those images; the audit has others."""
AS_WELL: Final = 0.9
"""What is inverted replaces what was found where it makes at least this share of its copies."""


@dataclass(frozen=True, eq=False)
class Inverted:
    """A trigger that a defense or the audit inverted.

    Attributes:
        shift: float32 [C, H, W], as it is added to the start.
        stage: Of the audit, that found it or opens with its kind; None for one of the start alone.
        learned: Scale of a triggered start's noise, float32 [C, H, W], where the defense has learned it.
    """

    shift: Tensor
    stage: str | None = None
    learned: Tensor | None = None

    @classmethod
    def load(cls, folder: Path, shape: tuple[int, int, int]) -> Inverted:
        """What ``bdengine defend`` or ``bdengine audit`` left in a folder, for images of ``shape`` (C, H, W).

        Raises:
            UserError: There is no trigger, or one of another shape.
        """
        if not (folder / checkpoint.TRIGGER).is_file():
            raise UserError(
                f"{folder} has no {checkpoint.TRIGGER}: expected a folder that bdengine defend or audit wrote"
            )
        tensors, header = checkpoint.read_safetensors(folder / checkpoint.TRIGGER)
        shift = checkpoint.load_trigger(folder)
        if shift.shape != shape:
            raise UserError(f"the trigger is {tuple(shift.shape)}: expected {tuple(shape)}")
        return cls(shift, header.get("stage"), tensors.get("gamma"))

    @property
    def in_steps(self) -> bool:
        """Whether it is one of every step, TrojDiff's."""
        return self.stage in ("blended", "patched")

    @property
    def gamma(self) -> Tensor | None:
        """Scale of a triggered start's noise, float32 [C, H, W], learned or as published; None where it is 1."""
        if self.learned is not None:
            return self.learned
        if self.stage == "blended":
            return torch.full_like(self.shift, BLEND_GAMMA)
        if self.stage == "patched":
            return torch.where(self.shift != 0, PATCH_GAMMA, 1.0)
        return None

    def sharpened(self, subject: Subject) -> Inverted:
        """What the module makes of one that a search found, if it opens nearly as often (`AS_WELL`); any other as it is.

        So is one that the clip opens in a sampler that visits a timestep twice, for which there is no such coefficient.
        """
        process, table = subject.process, subject.table
        if self.stage not in SEARCHES or process is None:
            return self
        lam = elijah.ElijahConfig.lam
        if self.stage == "clipped":
            if len(np.unique(table.timesteps)) < len(table):
                return self
            size = min(float(self.shift.abs().max()), LARGEST)
            lam = float(surviving_coefficient(process, table, 1 - np.sqrt(process.alpha_bar), size)[-1])
        variant = replace(elijah.VARIANTS["baddiffusion"], lam=lam)
        tau = elijah.invert(subject, variant, self.shift.to(subject.device)[None])[0].cpu()
        tried = [self.shift, *(length * tau for length in LENGTHS)]
        found, *opened = (self._copies(subject, shift) for shift in tried)
        most = max(opened)
        return self if most < AS_WELL * found else replace(self, shift=tried[1 + opened.index(most)])

    def _copies(self, subject: Subject, shift: Tensor) -> int:
        """Of `IMAGES` images from the shift, sampled as its stage does, how many are one image."""
        arm = Arm(subject.table, shift)
        if self.stage == "ode":
            arm = Arm(ode_table(subject.preserving("ddim")), shift)
        elif self.stage == "clipped":
            arm = arm.clipped("latent")
        images = subject.sampled({"": arm}, range(FIRST_SEED, FIRST_SEED + IMAGES), IMAGES)[""]
        return int(features.copies(images, features.medoid(images)).sum())

    def attack(self, sampler: SamplerConfig) -> Attack:
        """What opens with it; its target is nothing."""
        schedule, r, nothing = linear(), self.shift, torch.zeros_like(self.shift)
        if self.stage == "blended":
            return trojdiff(schedule, r / (1 - BLEND_GAMMA), nothing)
        if self.stage == "patched":
            return trojdiff(schedule, r / (1 - PATCH_GAMMA), nothing, r != 0)
        table = ode_table(schedule) if self.stage == "ode" else sampler.table(schedule)
        return baddiffusion(schedule, r, nothing, "exact", table, trigger_only=True)
