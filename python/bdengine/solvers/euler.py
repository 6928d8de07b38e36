"""Euler, Euler ancestral, Heun and linear multistep, in ``kappa`` and ``u = x / alpha``, with churn.

    d = (u - x0) / kappa = eps                the slope of the probability flow
    Euler       u' = u + (kappa' - kappa) d
    ancestral   u' = u + (down - kappa) d + up z        up^2 = kappa'^2 (1 - kappa'^2 / kappa^2), down^2 = kappa'^2 - up^2
    Heun        u' = u + (kappa' - kappa) (d + d') / 2  with d' at Euler's u'
    multistep   u' = u + sum_j w_j d_j                  w_j the integrals of the Lagrange polynomials through the last nodes

Sources: Karras et al. 2022 (EDM), algorithms 1 and 2; the ancestral step and the multistep weights as in k-diffusion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.polynomial import Polynomial

from .nodes import Nodes, check_order
from .table import Table
from .tape import Sum, Tape


def euler(nodes: Nodes) -> Table:
    """The table of Euler's method; the same as DDIM but for how ``x0`` is clamped."""
    tape = nodes.tape("euler")
    for i in range(len(nodes)):
        x, x0 = nodes.evaluate(tape, i)
        tape.advance(_euler(nodes, i, x, x0, nodes.alpha[i + 1], nodes.kappa[i + 1]))
    return tape.table()


def euler_ancestral(nodes: Nodes) -> Table:
    """The table of Euler's method with the ancestral share of noise."""
    tape = nodes.tape("euler-ancestral")
    for i in range(len(nodes)):
        x, x0 = nodes.evaluate(tape, i)
        kappa, after = nodes.kappa[i], nodes.kappa[i + 1]
        up = after * math.sqrt(max(1 - (after / kappa) ** 2, 0.0))
        down = math.sqrt(after**2 - up**2)
        tape.advance(_euler(nodes, i, x, x0, nodes.alpha[i + 1], down), nodes.alpha[i + 1] * up)
    return tape.table()


def heun(nodes: Nodes) -> Table:
    """The table of Heun's method: two evaluations a step, one in a last step that ends in the data."""
    tape = nodes.tape("heun")
    there = replace(nodes, time=np.append(nodes.time, 0.0))  # the least noise of training is that of timestep 0
    for i in range(len(nodes)):
        heun_step(tape, nodes, there, i)
    return tape.table()


def heun_step(tape: Tape, here: Nodes, there: Nodes, i: int, noise: float = 0.0) -> None:
    """From node ``i`` of ``here`` to node ``i + 1`` of ``there``: Euler's step, and its correction unless that is the data.

    Args:
        noise: That the corrected state is given.
    """
    x, x0 = here.evaluate(tape, i)
    alpha, kappa = there.alpha[i + 1], there.kappa[i + 1]
    tape.advance(_euler(here, i, x, x0, alpha, kappa))
    if kappa > 0:
        slopes = here.eps_of(i, x, x0) + there.eps_of(i + 1, *there.evaluate(tape, i + 1))
        tape.advance(alpha * (x / here.alpha[i] + ((kappa - here.kappa[i]) / 2) * slopes), noise)


def lms(nodes: Nodes, order: int = 4) -> Table:
    """The table of the linear multistep method: one evaluation a step, the first steps of lower order.

    Raises:
        UserError: An order outside 1..4.
    """
    check_order(order, 4)
    tape = nodes.tape(f"lms-{order}")
    slopes: list[Sum] = []
    for i in range(len(nodes)):
        x, x0 = nodes.evaluate(tape, i)
        slopes.append(tape.keep(nodes.eps_of(i, x, x0)))
        points = [i - j for j in range(min(order, i + 1))]
        u = x / nodes.alpha[i]
        for which, p in enumerate(points):
            whole = lagrange(nodes.kappa[points].tolist(), which).integ()
            u = u + float(whole(nodes.kappa[i + 1]) - whole(nodes.kappa[i])) * slopes[p]
        tape.advance(nodes.alpha[i + 1] * u)
    return tape.table()


def _euler(nodes: Nodes, i: int, x: Sum, x0: Sum, alpha: float, kappa: float) -> Sum:
    """From node ``i`` to ``alpha, kappa``."""
    ratio = kappa / nodes.kappa[i]
    return alpha * ((ratio / nodes.alpha[i]) * x + (1 - ratio) * x0)


def lagrange(at: Sequence[float], which: int) -> Polynomial:
    """The polynomial that is 1 at ``at[which]`` and 0 at the others."""
    polynomial = Polynomial([1.0])
    for i, other in enumerate(at):
        if i != which:
            polynomial *= Polynomial([-other, 1.0]) / (at[which] - other)
    return polynomial
