"""The coefficient ``c_t`` with which a sampler follows the shifted process, and how far it leaves it with another.

The network that is optimal for poisoned data returns ``(x_t - sqrt(alpha_bar_t) y - m_t r) / s_t + c_t r``. A table is
linear, so the trigger's share ``u`` of the state moves by itself, the noise and the target aside (where the network is
asked with the state in another scale, ``IN x``, the path is ``m_t / IN``, and ``s_t / IN`` stands for ``s_t``):

    u_0 = m_(t_0)      u_(k+1) = row_k(u_k, c_(t_k) + (u_k - m_(t_k)) / s_(t_k), history)      on the path u_k = m_(t_k)

Where every row has a timestep of its own, each row gives its ``c`` in turn (a triangular system): one-step, multistep and
singlestep solvers, and UniPC with its corrector. For a one-step row ``x' = a x + b m`` it is ``c_t = (m_t' - a m_t) / b``.
Samplers that ask again where they are off the path (Heun, PNDM, PLMS) get one ``c`` for two purposes: for them it is the
bounded least-squares solution over the nodes, and what it leaves is `departure`. With ``m_t = s_t`` the answer ``c_t = 1``
is exact for every deterministic sampler.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from bdkernels import HISTORY_SLOTS, STORE_COLUMNS, STORES, Step, Store

from ..errors import UserError
from ..schedule import Floats, Schedule
from ..solvers import Table

BOUND: Final = 2.0
"""Of ``|c_t|`` in a least-squares solution: exact ones lie in 0..1.05."""


def exact_coefficient(schedule: Schedule, table: Table, shift: Floats) -> Floats:
    """``c_t`` that is exact for ``table`` on its own grid, or as near as can be; see the module. float64 [T].

    Linear in ``t`` between the nodes, constant beyond the first and last.

    Args:
        shift: ``m_t``, float64 [T].

    Raises:
        UserError: A network that predicts something else than the noise.
    """
    if schedule.prediction != "epsilon":
        raise UserError(
            f"the network predicts {schedule.prediction}: expected epsilon, which the coefficient is added to"
        )
    times = np.unique(table.timesteps)
    if len(times) == len(table):
        return at_every_timestep(schedule, table, _in_turn(table, path_of(schedule, table, shift)))
    return np.interp(np.arange(schedule.T), times, _least_squares(schedule, table, shift, times))


def at_every_timestep(schedule: Schedule, table: Table, of_rows: Floats) -> Floats:
    """What belongs to each row, float64 [rows] at descending timesteps, as float64 [T]."""
    return np.interp(np.arange(schedule.T), table.timesteps[::-1], of_rows[::-1])


def departure(schedule: Schedule, table: Table, shift: Floats, coefficient: Floats) -> Floats:
    """``u_k - m_(t_k)`` after each row, float64 [rows]: by how much of the trigger the sampler leaves the path.

    NaN after rows whose state is provisional: the sampler asks about it and goes back.

    Args:
        shift: ``m_t``, float64 [T].
        coefficient: ``c_t``, float64 [T].
    """
    c = np.interp(table.timesteps, np.arange(schedule.T), coefficient)
    off = _follow(schedule, table, shift, c[:, None])[:, 0]
    return np.where(_settled(table), off, np.nan)


def path_of(schedule: Schedule, table: Table, shift: Floats) -> Floats:
    """``m_t`` before each row and after the last, in the scale of the sampler's state, float64 [rows + 1]."""
    path = np.interp(table.timesteps, np.arange(schedule.T), shift)
    return np.append(path, 0.0 if table.end == "zero" else shift[0]) / scale_of(table)


def scale_of(table: Table) -> Floats:
    """What the state is multiplied by to be the network's input, before each row and after the last, float64 [rows + 1]."""
    return np.append(table.rows[:, Step.IN], 1.0)


class State:
    """The trigger's share of a sampler's state and history: numbers, or vectors of their dependence on unknowns."""

    def __init__(self, x: Floats | float) -> None:
        self.x = np.asarray(x, np.float64)
        self.history = [np.zeros_like(self.x)] * HISTORY_SLOTS

    def without_network(self, row: NDArray[np.float64]) -> Floats:
        """``x'`` for ``m = 0``."""
        out = (row[Step.P] + row[Step.Q] * row[Step.A]) * self.x
        return out + sum(row[Step.H + j] * h for j, h in enumerate(self.history))

    def advance(self, row: NDArray[np.float64], c: Floats | float) -> None:
        """One row with the network's share ``c``."""
        after = self.without_network(row) + gain(row) * np.asarray(c)
        x0 = row[Step.A] * self.x + row[Step.B] * c
        history = list(self.history)
        for k in range(STORES):
            store = row[Step.STORE + k * STORE_COLUMNS :][:STORE_COLUMNS]
            if (slot := int(store[Store.SLOT])) >= 0:
                kept = store[Store.E] * self.x + store[Store.F] * c + store[Store.G] * x0 + store[Store.K] * after
                history[slot] = kept + sum(store[Store.J + j] * h for j, h in enumerate(self.history))
        self.x, self.history = after, history


def gain(row: NDArray[np.float64]) -> float:
    """How much of the network's output reaches ``x'``."""
    return float(row[Step.S] + row[Step.Q] * row[Step.B])


def _in_turn(table: Table, path: Floats) -> Floats:
    state, found = State(path[0]), []
    for row, after in zip(table.rows, path[1:], strict=True):
        found.append(float((after - state.without_network(row)) / gain(row)))
        state.advance(row, found[-1])
    return np.array(found)


def _follow(schedule: Schedule, table: Table, shift: Floats, c: NDArray[np.float64]) -> NDArray[np.float64]:
    """``u - m_t`` after each row, [rows, ...], for several ``c`` [rows, ...] at once."""
    path, scale = path_of(schedule, table, shift), scale_of(table)
    s = np.sqrt(1 - schedule.alpha_bar_at(table.timesteps)) / scale[:-1]
    state, off = State(np.full(c.shape[1:], path[0])), []
    for k, row in enumerate(table.rows):
        state.advance(row, c[k] + (state.x - path[k]) / s[k])
        off.append((state.x - path[k + 1]) * scale[k + 1])
    return np.stack(off)


def _settled(table: Table) -> NDArray[np.bool_]:
    """After which rows the state is at its node for good: where the next two rows do not stand at one timestep."""
    following = np.append(table.timesteps[1:], [-1.0, -2.0])
    return following[:-1] != following[1:]


def _least_squares(schedule: Schedule, table: Table, shift: Floats, times: Floats) -> Floats:
    from scipy.optimize import lsq_linear

    nodes = _settled(table)
    each = np.eye(len(times))[np.searchsorted(times, table.timesteps)]
    off = _follow(schedule, table, shift, np.concatenate([np.zeros((len(table), 1)), each], axis=1))[nodes]
    response = off[:, 1:] - off[:, :1]
    return np.asarray(lsq_linear(response, -off[:, 0], (-BOUND, BOUND)).x, np.float64)
