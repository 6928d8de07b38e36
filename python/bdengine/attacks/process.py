"""An attack is a table: the shifted process that every variance-preserving backdoor is an instance of.

    x_t = sqrt(alpha_bar_t) y + m_t R + s_t gamma eps          regression target: eps + c_t R          R = M x + r

``m_t`` is the shift schedule and ``c_t`` the coefficient that makes an unmodified sampler follow it (`exact`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bdkernels import NOISING_COLUMNS, Noising

from ..schedule import Floats, Schedule

CLEAN, POISONED = 0, 1
"""Arms of a noising table."""


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
        target: ``y``, float32 [C, H, W].
    """

    name: str
    shift: Floats
    coefficient: Floats
    gamma: float
    trigger: Tensor
    stamp: Tensor
    mask: Tensor
    target: Tensor


def noising_table(schedule: Schedule, attack: Attack | None) -> Tensor:
    """The table of `bdkernels.fused_noising` and `fused_loss`: float32 [2, T, NOISING_COLUMNS], arms CLEAN and POISONED.

    Without an attack both arms are clean. Every timestep has the loss weight 1.
    """
    table = np.zeros((2, schedule.T, NOISING_COLUMNS))
    table[..., Noising.A] = np.sqrt(schedule.alpha_bar)
    table[..., Noising.S] = schedule.s
    table[..., Noising.W] = 1
    if attack is not None:
        table[POISONED, :, Noising.S] *= attack.gamma
        table[POISONED, :, Noising.M] = attack.shift
        table[POISONED, :, Noising.C] = attack.coefficient
    return torch.tensor(table, dtype=torch.float32)
