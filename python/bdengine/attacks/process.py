"""An attack is a table: the shifted process that every variance-preserving backdoor is an instance of.

    x_t = sqrt(alpha_bar_t) y + m_t R + s_t gamma eps          regression target: eps + c_t R          R = M x + r

``m_t`` is the shift schedule and ``c_t`` the coefficient that makes an unmodified sampler follow the shift: for a
sampler row ``x' = a x + b m + Z z`` from ``t`` to ``t'`` the trajectory is exact where

    a m_t + b c_t = m_t'            so            c_t = (m_t' - a m_t) / b
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bdkernels import NOISING_COLUMNS, Noising

from ..errors import UserError
from ..schedule import Floats, Schedule
from ..solvers import Table

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


def exact_coefficient(schedule: Schedule, table: Table, shift: Floats) -> Floats:
    """``c_t`` that is exact for the sampler of ``table`` on its own grid, float64 [T].

    The formula above at the grid's nodes, linear in ``t`` between them, constant beyond the first and last.

    Raises:
        UserError: The table reads history, so no row stands alone.
    """
    if table.slots:
        raise UserError(f"{table.name} reads earlier steps: the exact coefficient here is for one-step samplers")
    nodes = table.timesteps.astype(int)
    a, b = table.linear
    after = np.append(shift[nodes[1:]], 0.0)
    c = (after - a * shift[nodes]) / b
    return np.interp(np.arange(schedule.T), nodes[::-1], c[::-1])
