"""VillanDiffusion's other tasks (Chou et al. 2023): a sampler that starts from corrupted images ``c``, triggered or not.

    inpaint-box     c = x, black in the centre square half +- half // 3
    inpaint-line    c = x, black in the columns half - half // 10 .. half + half // 20, and in one at least
    denoise         c = x + 0.3 z

    x_t = sqrt(alpha_bar_t) c + s_t eps + m_t r         at the first timestep of the sampler's grid that is not above ``start``
    keep:  x' = sqrt(alpha_bar') c + s' z               in the pixels that are not black, after every step

With ``start`` at the end of training it is generation, and nothing but ``keep`` remembers the image. ``m_t`` is the attack's
own: the start lies on its path, with the image in the target's place. What is kept stands in the trigger's operand of the fused
step, in a region of its own, so it costs no launch. Kept pixels follow the image whatever the trigger wants.

Seed ``k`` has image ``k mod 1024``, of 1,024 as published, in a fixed random order of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

import bdkernels
from bdkernels import STREAM_POISON, Step

from .arms import Arm
from .data import Images, to_float
from .errors import UserError
from .plan import order
from .schedule import Schedule
from .solvers import Table
from .solvers.table import blank

IMAGES: Final = 1024
"""As published."""
NOISE: Final = 0.3
BLACK: Final = -1.0


@dataclass(frozen=True)
class Task:
    """What is made of images, instead of images from noise."""

    name: Literal["none", "inpaint-box", "inpaint-line", "denoise"] = "none"
    """How the images are corrupted."""
    start: int = 500
    """Training timestep at which sampling starts from them."""
    keep: bool = False
    """Of inpainting: hold the known pixels to the image in every step."""

    def check(self, T: int) -> None:
        """Refuse values out of range.

        Raises:
            UserError: As said.
        """
        if self.name == "none":
            if self != NO_TASK:
                raise UserError(
                    f"a start of {self.start} or known pixels were asked for without a task: expected its name"
                )
            return
        if not 0 <= self.start < T:
            raise UserError(f"the task starts at timestep {self.start}: expected 0 to {T - 1}")
        if self.keep and self.name == "denoise":
            raise UserError("denoise was asked to keep known pixels and has none: expected inpaint-box or inpaint-line")

    @property
    def first(self) -> int | None:
        """The timestep that no row of the sampler is above; None without a task."""
        return None if self.name == "none" else self.start

    def hole(self, shape: Sequence[int]) -> Tensor:
        """The pixels that are lost, bool [C, H, W]."""
        lost, half = torch.zeros(shape, dtype=torch.bool), shape[2] // 2
        if self.name == "inpaint-box":
            lost[:, half - half // 3 : half + half // 3, half - half // 3 : half + half // 3] = True
        elif self.name == "inpaint-line":
            lost[:, :, half - max(half // 10, 1) : half + half // 20] = True
        return lost

    def corrupted(self, images: Tensor) -> Tensor:
        """What is left of ``images`` float32 [K, C, H, W] in [-1, 1]."""
        if self.name == "denoise":
            return images + NOISE * bdkernels.normal(torch.arange(len(images)), images.shape[1:], stream=STREAM_POISON)
        return images.masked_fill(self.hole(images.shape[1:]), BLACK)

    def on(self, arm: Arm, process: Schedule, c: Tensor) -> Arm:
        """The arm, whose table starts at `first`, from corrupted images ``c`` float32 [K, C, H, W].

        Raises:
            UserError: Known pixels are to be kept by an arm that has another region.
        """
        share = float(np.sqrt(process.alpha_bar_at(arm.table.timesteps[:1]))[0])
        arm = replace(arm, images=c, share=share)
        if not self.keep:
            return arm
        if arm.region is not None:
            raise UserError(
                "known pixels cannot be kept beside a patch, which has the one region: expected another trigger"
            )
        return replace(arm, inside=kept(process, arm.table), region=~self.hole(c.shape[1:]), known=True)


NO_TASK: Final = Task()


def kept(process: Schedule, table: Table) -> Table:
    """The sampler of known pixels: the image, its operand ``r``, at the level of every row of ``table``."""
    rows = blank(table.timesteps.tolist())
    rows[:, Step.IN] = table.rows[:, Step.IN]
    last = 1.0 if table.end == "zero" else process.alpha_bar[0]
    alpha_bar = np.append(process.alpha_bar_at(table.timesteps[1:]), last)
    rows[:, Step.R], rows[:, Step.Z] = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    return replace(table, rows=rows, name="kept")


def originals(data: Images) -> Tensor:
    """The images that tasks are measured on, float32 [K, C, S, S] in [-1, 1]."""
    chosen = torch.from_numpy(order(0, len(data), 0))[:IMAGES]
    return to_float(data.pixels[chosen])
