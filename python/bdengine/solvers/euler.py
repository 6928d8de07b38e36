"""Euler, Euler ancestral, Heun and linear multistep, in ``kappa`` and ``u = x / alpha``, with churn.

    d = (u - x0) / kappa                      the slope of the probability flow
    Euler       u' = u + (kappa' - kappa) d
    ancestral   u' = u + (down - kappa) d + up z        up^2 = kappa'^2 (1 - kappa'^2 / kappa^2), down^2 = kappa'^2 - up^2
    Heun        u' = u + (kappa' - kappa) (d + d') / 2  with d' at Euler's u'
    multistep   u' = u + sum_j w_j d_j                  w_j the integrals of the Lagrange polynomials through the last nodes

Sources: Karras et al. 2022 (EDM), algorithms 1 and 2; the ancestral step and the multistep weights as in k-diffusion.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.polynomial import Polynomial

from ..errors import UserError
from .nodes import Nodes
from .table import Table
from .tape import Sum


def euler(nodes: Nodes) -> Table:
    """The table of Euler's method; the same as DDIM but for how ``x0`` is clamped."""
    tape = nodes.tape("euler")
    for i in range(len(nodes)):
        x, x0 = nodes.evaluate(tape, i)
        tape.advance(_euler(nodes, i, x, x0))
    return tape.table()


def euler_ancestral(nodes: Nodes) -> Table:
    """The table of Euler's method with the ancestral share of noise."""
    tape = nodes.tape("euler-ancestral")
    for i in range(len(nodes)):
        x, x0 = nodes.evaluate(tape, i)
        kappa, after = nodes.kappa[i], nodes.kappa[i + 1]
        up = after * math.sqrt(max(1 - (after / kappa) ** 2, 0.0))
        down = math.sqrt(after**2 - up**2)
        tape.advance(
            nodes.alpha[i + 1] * ((down / kappa / nodes.alpha[i]) * x + (1 - down / kappa) * x0),
            nodes.alpha[i + 1] * up,
        )
    return tape.table()


def heun(nodes: Nodes) -> Table:
    """The table of Heun's method: two evaluations a step, one in a last step that ends in the data."""
    tape = nodes.tape("heun")
    for i in range(len(nodes)):
        x, x0 = nodes.evaluate(tape, i)
        tape.advance(_euler(nodes, i, x, x0))
        if nodes.sigma[i + 1] == 0:
            continue
        again, x0_again = Nodes(nodes.alpha, nodes.sigma, np.append(nodes.time, 0.0), nodes.prediction).evaluate(
            tape, i + 1
        )
        half = (nodes.kappa[i + 1] - nodes.kappa[i]) / 2
        slopes = slope(nodes, i, x, x0) + slope(nodes, i + 1, again, x0_again)
        tape.advance(nodes.alpha[i + 1] * (x / nodes.alpha[i] + half * slopes))
    return tape.table()


def lms(nodes: Nodes, order: int = 4) -> Table:
    """The table of the linear multistep method: one evaluation a step, the first steps of lower order.

    Raises:
        UserError: An order outside 1..4.
    """
    if not 1 <= order <= 4:
        raise UserError(f"the order is {order}: expected 1 to 4")
    tape = nodes.tape(f"lms-{order}")
    slopes: list[Sum] = []
    for i in range(len(nodes)):
        x, x0 = nodes.evaluate(tape, i)
        slopes.append(tape.keep(slope(nodes, i, x, x0)))
        points = [i - j for j in range(min(order, i + 1))]
        u = x / nodes.alpha[i]
        for p in points:
            u = u + _integral(nodes.kappa, p, points, nodes.kappa[i], nodes.kappa[i + 1]) * slopes[p]
        tape.advance(nodes.alpha[i + 1] * u)
    return tape.table()


def slope(nodes: Nodes, i: int, x: Sum, x0: Sum) -> Sum:
    """``d = (u - x0) / kappa`` at node ``i``."""
    return (x / nodes.alpha[i] - x0) / nodes.kappa[i]


def _euler(nodes: Nodes, i: int, x: Sum, x0: Sum) -> Sum:
    ratio = nodes.kappa[i + 1] / nodes.kappa[i]
    return nodes.alpha[i + 1] * ((ratio / nodes.alpha[i]) * x + (1 - ratio) * x0)


def _integral(kappa: np.ndarray, p: int, points: list[int], start: float, end: float) -> float:
    """Of the Lagrange polynomial that is 1 at ``kappa[p]`` and 0 at the other points."""
    polynomial = Polynomial([1.0])
    for other in points:
        if other != p:
            polynomial *= Polynomial([-kappa[other], 1.0]) / (kappa[p] - kappa[other])
    whole = polynomial.integ()
    return float(whole(end) - whole(start))
