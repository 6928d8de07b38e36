"""DDPM ancestral sampling, on any sub-grid.

With ``t -> t'``, ``alpha = alpha_bar_t / alpha_bar_t'`` and ``beta = 1 - alpha``:

    x0 = (x - s_t m) / sqrt(alpha_bar_t)
    x' = sqrt(alpha_bar_t') beta / (1 - alpha_bar_t) x0 + sqrt(alpha) (1 - alpha_bar_t') / (1 - alpha_bar_t) x + sigma z

``sigma^2`` is ``beta (1 - alpha_bar_t') / (1 - alpha_bar_t)`` ("small", the posterior's) or ``beta`` ("large"); the last
row, which ends in the data, adds no noise. Source: Ho et al. 2020, eq. 6 and 7.
"""

from __future__ import annotations

import math
from typing import Literal

from bdkernels import Step

from ..schedule import Schedule, Spacing, grid
from .table import Table, blank


def ddpm(
    schedule: Schedule,
    steps: int,
    spacing: Spacing = "trailing",
    variance: Literal["small", "large"] = "small",
) -> Table:
    """The table of DDPM ancestral sampling with an epsilon-predicting network.

    Raises:
        UserError: ``steps`` outside 1..T or an unknown spacing.
    """
    timesteps = [*grid(schedule.T, steps, spacing), -1]
    rows = blank(timesteps[:-1])
    for row, t, after in zip(rows, timesteps, timesteps[1:], strict=False):
        alpha_bar, alpha_bar_after = schedule.alpha_bar_at(t), schedule.alpha_bar_at(after)
        alpha = alpha_bar / alpha_bar_after
        beta = 1 - alpha
        row[Step.A] = 1 / math.sqrt(alpha_bar)
        row[Step.B] = -math.sqrt(1 - alpha_bar) / math.sqrt(alpha_bar)
        row[Step.P] = math.sqrt(alpha) * (1 - alpha_bar_after) / (1 - alpha_bar)
        row[Step.Q] = math.sqrt(alpha_bar_after) * beta / (1 - alpha_bar)
        if after >= 0:
            posterior = beta * (1 - alpha_bar_after) / (1 - alpha_bar)
            row[Step.Z] = math.sqrt(posterior if variance == "small" else beta)
    return Table(rows, f"ddpm-{steps}")
