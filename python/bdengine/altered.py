"""Triggers that are not quite the trained one: part of it, stronger or weaker, or noisy.

    r' = scale crop(r) + noise z + uniform u          z ~ N(0, I), u ~ U[0, 1], one draw of each for all samples

``crop`` makes half of the trigger what is bare around it: of a stamp, half of the stamp and not of the canvas; of a
perturbation, 0. Scale and noise are of ``r`` as a sampler adds it, background included. A patch stays one, and a cropped one is
half black. BackdoorDM's two tests are ``uniform = 1``, and half of the trigger cut away at random: here the user says which.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

import bdkernels
from bdkernels import STREAM_POISON

from .errors import UserError

Crop = Literal["none", "left", "right", "top", "bottom"]


@dataclass(frozen=True)
class Altered:
    """How the trigger differs from the one that is named."""

    crop: Crop = "none"
    """Half of the trigger that is cut away."""
    scale: float = 1.0
    """Of its values as they are added to the initial noise, the background's too."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise on it, the same for all samples."""
    uniform: float = 0.0
    """Largest value of noise from 0 up on it, the same for all samples; 1 as published (BackdoorDM)."""

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            UserError: As said.
        """
        if not math.isfinite(self.scale):
            raise UserError(f"the trigger's scale is {self.scale}: expected a finite number, and 1 as it is")
        for what, value in (("noise", self.noise), ("uniform noise", self.uniform)):
            if not 0 <= value < math.inf:
                raise UserError(f"the trigger's {what} is {value}: expected a finite number of at least 0")

    def cropped(self, r: Tensor, bare: float) -> Tensor:
        """``r`` without one half of the box around what is not ``bare``, float32 [C, H, W]; of an odd side the lesser half."""
        if self.crop == "none":
            return r
        axis = 2 if self.crop in ("left", "right") else 1
        stamped = (r != bare).any(0).any(2 - axis).nonzero()
        if len(stamped) == 0:
            return r
        first, last = int(stamped[0]), int(stamped[-1]) + 1
        half = (last - first) // 2
        kept, start = r.clone(), first if self.crop in ("left", "top") else last - half
        kept.narrow(axis, start, half).fill_(bare)
        return kept

    def perturbed(self, r: Tensor) -> Tensor:
        """``scale r + noise z + uniform u``, float32 [C, H, W]."""
        if self.noise == self.uniform == 0:
            return self.scale * r
        z, other = bdkernels.normal(torch.arange(2), tuple(r.shape), stream=STREAM_POISON)
        return self.scale * r + self.noise * z + self.uniform * torch.special.ndtr(other)


UNALTERED: Final = Altered()
