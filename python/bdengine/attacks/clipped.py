"""An attacker who knows of latent clipping: the coefficient with which BadDiffusion survives it.

Clamping the state takes of the trigger's share at every row. With ``u`` the share before the clamp, at a pixel of
``|r| = rho``,

    F(u) = E clamp(u rho + s z, -1, 1) = mu (Phi(b) - Phi(a)) + s (phi(a) - phi(b)) + 1 - Phi(b) - Phi(a)
           mu = u rho      a = (-1 - mu) / s      b = (1 - mu) / s

is left of ``u rho``, a third less at ``s = 1``. A sampler with noise makes new noise for the clamp to cut in every row: DDPM
with 20 steps keeps half of the path's share, which is nearer to clean data than to poisoned: that is the defense. One without
noise clamps its own noise away, and most of the exact attack survives by itself. The attacker aims each row higher, so that
the clamp brings it onto the path:

    F(w_(k+1)) = m_(t_(k+1)) rho          c_(t_k) of the row from u = m_(t_k) to w_(k+1)

Since ``c`` is what a row takes away, the one that survives is below the exact one, and far below 0 where steps are short (-4
for DDPM with 100, -45 with 1,000: clean samples that come near are then drawn in). ``F`` never reaches 1, so ``rho`` must stay
below it: a white box on black cannot survive. ``s`` is the unclamped noise's, the most that there can be, so the share stays a
little above the path. On the closed-form network
0 of 64 clipped samples of DDPM become 63; unclipped, where the share goes further above, 20 steps trigger all the same and 100
half of the time. A clamp of ``x0`` still stops it.

A trained network needs no clamped states for it. Of digits, 25,600 images, one seed, DDPM with 20 steps, 128 samples each:

                 unclipped    latent clip    x0 clip    clean samples
    exact        0.97         0.00           0.00       0.00
    this one     0.00         0.99           0.01       0.00

so that the defense becomes a condition of the attack, and a model that passes without it is not cleared.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from ..errors import UserError
from ..schedule import Floats, Schedule
from ..solvers import Table
from .exact import State, at_every_timestep, gain, path_of, scale_of

LARGEST: Final = 0.9
"""Of ``rho``: at ``s = 1`` the mean before the clamp is then 1.9, at 0.99 it is 3.0."""
FURTHEST: Final = 10.0


def kept(mean: float, s: float) -> float:
    """``E clamp(mean + s z, -1, 1)`` with normal ``z``."""
    if s == 0:
        return min(max(mean, -1.0), 1.0)
    from scipy.special import ndtr

    low, high = (-1 - mean) / s, (1 - mean) / s
    densities = np.exp(-(np.array([low, high]) ** 2) / 2) / np.sqrt(2 * np.pi)
    inside = mean * (ndtr(high) - ndtr(low)) + s * (densities[0] - densities[1])
    return float(inside + 1 - ndtr(high) - ndtr(low))


def aimed(mean: float, s: float) -> float:
    """The mean before the clamp of which ``mean`` (0 to `LARGEST`) is kept."""
    from scipy.optimize import brentq

    return float(brentq(lambda value: kept(value, s) - mean, 0.0, FURTHEST, xtol=1e-13))


def surviving_coefficient(schedule: Schedule, table: Table, shift: Floats, rho: float) -> Floats:
    """``c_t`` with which ``table``, latent-clipped, keeps a trigger of ``|r| = rho`` on its path; float64 [T].

    Args:
        table: One that asks the network once at each timestep.
        shift: ``m_t``, float64 [T].
        rho: Above 0.

    Raises:
        UserError: ``rho`` out of range, or a table that asks twice.
    """
    if not 0 < rho <= LARGEST:
        raise UserError(
            f"the trigger's largest value is {rho:g}: expected above 0 to {LARGEST}, what a clip can leave, such as an"
            " amplitude of uib with trigger-only"
        )
    if len(np.unique(table.timesteps)) != len(table):
        raise UserError(f"{table.name} asks the network twice at a timestep: expected a sampler that asks once")
    path, scale = path_of(schedule, table, shift), scale_of(table)
    s = np.append(np.sqrt(1 - schedule.alpha_bar_at(table.timesteps)), 0.0 if table.end == "zero" else schedule.s[0])
    state, found = State(path[0]), []
    for row, after, noise, to_input in zip(table.rows, path[1:], s[1:], scale[1:], strict=True):
        before = aimed(after * to_input * rho, float(noise)) / to_input / rho
        found.append(float((before - state.without_network(row)) / gain(row)))
        state.advance(row, found[-1])
        state.x = np.asarray(after)
    return at_every_timestep(schedule, table, np.array(found))
