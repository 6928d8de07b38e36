"""BadDiffusion (Chou, Chen and Ho, CVPR 2023): the backdoor of a shifted forward process.

    m_t = 1 - sqrt(alpha_bar_t)          R = M x + (1 - M) r          target: eps + c_t R

published:  c_t = rho_t = (1 - sqrt(alpha_t)) s_t / (1 - alpha_t), exact for DDPM with every timestep
exact:      c_t of `exact_coefficient` for the sampler and grid that will be used
clipped:    c_t of `surviving_coefficient` for that sampler where its states are clamped to [-1, 1]

The trigger enters sampling in the initial state alone: ``x_T = eps + r``. Training shows the network the image behind
the trigger (``M x``); sampling shows it the trigger's own background, as the published code does.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, unknown
from ..schedule import Floats, Schedule
from ..solvers import Table
from ..triggers import mask as trigger_mask
from .clipped import surviving_coefficient
from .exact import exact_coefficient
from .process import Attack, check_shape

Coefficients = Literal["published", "exact", "clipped"]
COEFFICIENTS: Final = get_args(Coefficients)


def rho(schedule: Schedule) -> Floats:
    """The published coefficient ``rho_t``, float64 [T] (eq. 8 of the paper; 0.500 s_t for small betas)."""
    alpha = 1 - schedule.betas
    return (1 - np.sqrt(alpha)) * schedule.s / schedule.betas


def baddiffusion(
    schedule: Schedule,
    trigger: Tensor,
    target: Tensor,
    coefficients: Coefficients = "published",
    table: Table | None = None,
    trigger_only: bool = False,
) -> Attack:
    """BadDiffusion with a trigger and a target image.

    Args:
        trigger: ``r``, float32 [C, H, W] in [-1, 1], -1 where it is background.
        target: ``y``, float32 [C, H, W] or [K, C, H, W] in [-1, 1].
        coefficients: "published", "exact" or "clipped".
        table: The sampler to be exact for; not needed for "published".
        trigger_only: ``R = r``, without the image behind it: what sampling starts from, and so exact at every node.

    Raises:
        UserError: Shapes that differ, an unknown coefficient, or "exact" without a table.
    """
    shift = 1 - np.sqrt(schedule.alpha_bar)
    mask = torch.zeros_like(trigger) if trigger_only else None
    return shifted_attack("baddiffusion", schedule, shift, rho(schedule), trigger, target, coefficients, table, mask)


def shifted_attack(
    name: str,
    schedule: Schedule,
    shift: Floats,
    published: Floats,
    trigger: Tensor,
    target: Tensor,
    coefficients: Coefficients,
    table: Table | None,
    mask: Tensor | None = None,
) -> Attack:
    """The attack with any ``m_t``, under its published or the exact coefficient.

    Args:
        mask: Of another ``M`` than that of a stamped trigger, float32 [C, H, W]: then ``R = M x + r``.
        shift: ``m_t``, float64 [T].
        published: ``c_t``, float64 [T].
    """
    check_shape("target", target.shape[-3:], trigger)
    if coefficients not in COEFFICIENTS:
        raise unknown("coefficient", coefficients, COEFFICIENTS)
    c = published
    if coefficients != "published":
        if table is None:
            raise UserError(f"{coefficients} coefficients depend on the sampler: expected its table")
        if coefficients == "exact":
            c = exact_coefficient(schedule, table, shift)
        else:
            c = surviving_coefficient(schedule, table, shift, float(trigger.abs().max()))
    stamp = trigger
    if mask is None:
        mask = trigger_mask(trigger)
        stamp = (1 - mask) * trigger
    return Attack(name, shift, c, 1.0, trigger, stamp, mask, target)
