"""PNDM and PLMS: Adams-Bashforth on the predicted noise, moved by DDIM's formula.

    x' = move(x, e') = alpha' / alpha x + (sigma' - alpha' kappa) e'
    e' = (55 e_0 - 59 e_1 + 37 e_2 - 9 e_3) / 24          of lower order at first

PLMS takes its first step again with the mean of both ends' noise; PNDM takes its first three by Runge and Kutta's method,
four evaluations each. Source: Liu et al. 2022 (PNDM), eq. 9 to 13.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ..errors import UserError
from .nodes import Nodes
from .table import Table
from .tape import Sum, Tape

_ADAMS: Final = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
RUNGE_KUTTA_STEPS: Final = 3


def plms(nodes: Nodes) -> Table:
    """The table of PLMS: one evaluation more than it has steps.

    Raises:
        UserError: Fewer than 2 steps.
    """
    if len(nodes) < 2:
        raise UserError(f"plms has {len(nodes)} steps: expected at least 2")
    tape = nodes.tape("plms")
    x, first = _noise(tape, nodes, 0)
    tape.advance(_move(nodes, 0, 1, x, first))
    tape.advance(_move(nodes, 0, 1, x, 0.5 * (first + _noise(tape, nodes, 1)[1])))
    _adams(tape, nodes, range(1, len(nodes)), [first])
    return tape.table()


def pndm(nodes: Nodes) -> Table:
    """The table of PNDM: 9 evaluations more than it has steps.

    Args:
        nodes: With a node in the middle of each of the first three steps (`Nodes.of` with ``halved=3``).

    Raises:
        UserError: Fewer than 4 steps.
    """
    steps = len(nodes) - RUNGE_KUTTA_STEPS
    if steps <= RUNGE_KUTTA_STEPS:
        raise UserError(f"pndm has {steps} steps: expected at least {RUNGE_KUTTA_STEPS + 1}")
    tape = nodes.tape("pndm", steps)
    seen: list[Sum] = []
    for start in range(0, 2 * RUNGE_KUTTA_STEPS, 2):
        middle, end = start + 1, start + 2
        x, e_1 = _noise(tape, nodes, start)
        seen.append(e_1)
        tape.advance(_move(nodes, start, middle, x, e_1))
        # The step's own x is found again from where it led: keeping it too would take a fifth slot in the third step.
        x_2, e_2 = _noise(tape, nodes, middle)
        tape.advance(_move(nodes, start, middle, _back(nodes, start, middle, x_2, e_1), e_2))
        x_3, e_3 = _noise(tape, nodes, middle)
        x = _back(nodes, start, middle, x_3, e_2)
        most = tape.keep(_move(nodes, start, end, x, e_1 / 6 + e_2 / 3 + e_3 / 3))
        tape.advance(_move(nodes, start, end, x, e_3))
        _, e_4 = _noise(tape, nodes, end)
        tape.advance(most + _move(nodes, start, end, Sum({}), e_4 / 6))
    _adams(tape, nodes, range(2 * RUNGE_KUTTA_STEPS, len(nodes)), seen)
    return tape.table()


def _adams(tape: Tape, nodes: Nodes, steps: Sequence[int], seen: list[Sum]) -> None:
    for i in steps:
        x, e = _noise(tape, nodes, i)
        seen.append(e)
        weights = _ADAMS[min(len(seen), len(_ADAMS)) - 1]
        mean = Sum({})
        for weight, past in zip(weights, reversed(seen), strict=False):
            mean = mean + weight * past
        tape.advance(_move(nodes, i, i + 1, x, mean))


def _noise(tape: Tape, nodes: Nodes, i: int) -> tuple[Sum, Sum]:
    x, x0 = nodes.evaluate(tape, i)
    return x, tape.keep(nodes.eps_of(i, x, x0))


def _move(nodes: Nodes, i: int, to: int, x: Sum, eps: Sum) -> Sum:
    ratio = nodes.alpha[to] / nodes.alpha[i]
    return ratio * x + (nodes.sigma[to] - ratio * nodes.sigma[i]) * eps


def _back(nodes: Nodes, i: int, to: int, x: Sum, eps: Sum) -> Sum:
    """The ``x`` that ``_move`` with ``eps`` led from."""
    return _move(nodes, to, i, x, eps)
