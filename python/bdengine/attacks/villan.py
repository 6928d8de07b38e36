"""VillanDiffusion (Chou, Chen and Ho, NeurIPS 2023), variance preserving: a family of shifts around BadDiffusion's.

    m_t = psi (1 - sqrt(alpha_bar_t)) + (1 - psi) s_t          R = M x + (1 - M) r          target: eps + c_t R

published:  c_t = w ( psi rho_t + (1 - psi) ( (1 - sqrt(alpha_t)) s_t + k_t (alpha_t - alpha_bar_t) / (1 - alpha_t) ) ),
            w = 1 for samplers with noise ("sde"), 2 without ("ode"), k_t = s_t - sqrt(alpha_t) s_(t-1)
exact:      c_t of `exact_coefficient` for the sampler and grid that will be used

With psi = 1 and "sde" it is BadDiffusion. The published part for psi = 0 is as its code has it; it is not exact for any sampler
(0.02 at t = 10, where DDPM needs 0.52).
"""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, unknown
from ..schedule import Floats, Schedule
from ..solvers import Table
from .baddiffusion import Coefficients, rho, shifted_attack
from .process import Attack

Solver = Literal["sde", "ode"]
WEIGHTS: Final[dict[Solver, float]] = {"sde": 1.0, "ode": 2.0}
"""``w``."""


def weight_of(solver: Solver) -> float:
    """``w`` of a solver.

    Raises:
        UserError: An unknown one.
    """
    if solver not in WEIGHTS:
        raise unknown("solver", solver, WEIGHTS)
    return WEIGHTS[solver]


def published(schedule: Schedule, psi: float, solver: Solver) -> Floats:
    """The released code's ``c_t``, float64 [T]; the errors are `weight_of`'s."""
    alpha, s = 1 - schedule.betas, schedule.s
    k = s - np.sqrt(alpha) * np.append(0.0, s[:-1])
    exploding = (1 - np.sqrt(alpha)) * s + k * (alpha - schedule.alpha_bar) / (1 - alpha)
    return weight_of(solver) * (psi * rho(schedule) + (1 - psi) * exploding)


def villan(
    schedule: Schedule,
    trigger: Tensor,
    target: Tensor,
    coefficients: Coefficients = "published",
    table: Table | None = None,
    psi: float = 1.0,
    solver: Solver = "sde",
    trigger_only: bool = False,
) -> Attack:
    """VillanDiffusion with a trigger and a target image.

    Args:
        psi: 1 is BadDiffusion's shift, 0 the noise's own.
        solver: Kind of sampler that the published coefficient is for.

    The other arguments and the errors are `baddiffusion`'s, and:

    Raises:
        UserError: psi outside 0..1, or an unknown solver.
    """
    if not 0 <= psi <= 1:
        raise UserError(f"psi is {psi:g}: expected 0 to 1")
    shift = psi * (1 - np.sqrt(schedule.alpha_bar)) + (1 - psi) * schedule.s
    known = published(schedule, psi, solver)
    mask = torch.zeros_like(trigger) if trigger_only else None
    return shifted_attack("villan", schedule, shift, known, trigger, target, coefficients, table, mask)
