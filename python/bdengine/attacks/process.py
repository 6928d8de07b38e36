"""An attack is a table: the shifted process that every variance-preserving backdoor is an instance of.

    x_t = sqrt(alpha_bar_t) y + m_t R + s_t gamma eps          regression target: eps + c_t R          R = M x + r

``m_t`` is the shift schedule and ``c_t`` the coefficient that makes an unmodified sampler follow it (`exact`). An attack whose
sampler is its own has the trigger in every step instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bdkernels import NOISING_COLUMNS, Noising, Step

from ..arms import Arm
from ..errors import UserError
from ..schedule import Exploding, Floats, Schedule
from ..solvers import Table
from .exact import path_of

CLEAN, POISONED, OUTSIDE = 0, 1, 2
"""Arms of a noising table; that outside of an attack's region has the clean process and the target."""


@dataclass(frozen=True, eq=False)
class Attack:
    """One attack, ready to train with and to sample from.

    Attributes:
        name: Its published name.
        shift: ``m_t``, float64 [T].
        coefficient: ``c_t``, float64 [T].
        gamma: Noise scale of poisoned samples.
        trigger: ``r`` as the sampler adds it to the initial noise, float32 [C, H, W].
        stamp: ``r`` as training adds it, premultiplied by ``1 - M`` where it is stamped, float32 [C, H, W].
        mask: ``M``, float32 [C, H, W], 1 where the image shows through.
        target: ``y``, float32 [C, H, W]; or the K images of which each poisoned sample has one, [K, C, H, W].
        region: The pixels that it is on, bool [C, H, W]; None for all of them.
        in_steps: Whether its sampler has the trigger in every step.
    """

    name: str
    shift: Floats
    coefficient: Floats
    gamma: float
    trigger: Tensor
    stamp: Tensor
    mask: Tensor
    target: Tensor
    region: Tensor | None = None
    in_steps: bool = False

    def arm(self, schedule: Schedule, table: Table) -> Arm:
        """How triggered samples are made with the sampler ``table``; one that starts late starts on the attack's path.

        The state may be kept in another scale than the network's input, as k-diffusion's samplers do: ``IN`` between them.
        """
        path = path_of(schedule, table, self.shift)
        early = math.isclose(table.start * table.rows[0, Step.IN], 1, rel_tol=1e-3)
        r = self.trigger if early else self.trigger * float(path[0] / table.start)
        if not self.in_steps:
            return Arm(table, r)
        shifted = table.shifted(path, self.gamma)
        if self.region is None:
            return Arm(shifted, r)
        return Arm(table, torch.where(self.region, r, 0.0), shifted, self.region)


def check_shape(name: str, shape: torch.Size, trigger: Tensor) -> None:
    """Refuse an image whose shape is not the trigger's.

    Raises:
        UserError: As said.
    """
    if shape != trigger.shape:
        raise UserError(f"the {name} has shape {tuple(shape)}: expected the trigger's {tuple(trigger.shape)}")


def noising_table(schedule: Schedule | Exploding, attack: Attack | None) -> Tensor:
    """The table of `bdkernels.fused_noising` and `fused_loss`: float32 [3, T, NOISING_COLUMNS], arms CLEAN, POISONED, OUTSIDE.

    Without an attack all arms are clean. Every timestep has the loss weight 1.
    """
    table = np.zeros((3, schedule.T, NOISING_COLUMNS))
    table[..., Noising.A] = np.sqrt(schedule.alpha_bar)
    table[..., Noising.S] = schedule.s
    table[..., Noising.W] = 1
    if attack is not None:
        table[POISONED, :, Noising.S] *= attack.gamma
        table[POISONED, :, Noising.M] = attack.shift
        table[POISONED, :, Noising.C] = attack.coefficient
    return torch.tensor(table, dtype=torch.float32)
