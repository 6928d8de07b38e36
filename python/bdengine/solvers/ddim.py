"""DDIM(eta), on any sub-grid.

With ``t -> t'`` and ``sigma^2 = eta^2 (1 - alpha_bar_t') / (1 - alpha_bar_t) (1 - alpha_bar_t / alpha_bar_t')``:

    x0 = (x - s_t m) / sqrt(alpha_bar_t)
    x' = sqrt(alpha_bar_t') x0 + sqrt(1 - alpha_bar_t' - sigma^2) m + sigma z

Source: Song et al. 2021 (DDIM), eq. 12 and 16. ``eta = 1`` is DDPM with its small variance.
"""

from __future__ import annotations

import math

from bdkernels import Step

from ..errors import UserError
from ..schedule import Schedule, Spacing, grid
from .table import Table, blank


def ddim(schedule: Schedule, steps: int, spacing: Spacing = "trailing", eta: float = 0.0) -> Table:
    """The table of DDIM with an epsilon-predicting network; deterministic where ``eta`` is 0.

    Raises:
        UserError: ``steps`` outside 1..T, ``eta`` outside 0..1, or an unknown spacing.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta is {eta}: expected 0 to 1")
    timesteps = [*grid(schedule.T, steps, spacing), -1]
    rows = blank(timesteps[:-1])
    for row, t, after in zip(rows, timesteps, timesteps[1:], strict=False):
        alpha_bar, alpha_bar_after = schedule.alpha_bar_at(t), schedule.alpha_bar_at(after)
        variance = eta**2 * (1 - alpha_bar_after) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_after)
        row[Step.A] = 1 / math.sqrt(alpha_bar)
        row[Step.B] = -math.sqrt(1 - alpha_bar) / math.sqrt(alpha_bar)
        row[Step.Q] = math.sqrt(alpha_bar_after)
        row[Step.S] = math.sqrt(max(1 - alpha_bar_after - variance, 0.0))
        row[Step.Z] = math.sqrt(variance)
    return Table(rows, f"ddim-{steps}" if eta == 0 else f"ddim-{steps}-eta{eta:g}")
