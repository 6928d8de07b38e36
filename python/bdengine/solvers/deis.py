"""DEIS in its log-rho multistep form, of order 1 to 3.

    x' / alpha' = x / alpha + sum_j w_j eps_j          w_j = integral of L_j(log kappa) d kappa from kappa to kappa'

with ``L_j`` the Lagrange polynomials in ``log kappa`` through the last nodes. Source: Zhang and Chen 2023, section 3.3.
"""

from __future__ import annotations

import math

import numpy as np

from .euler import lagrange
from .nodes import Nodes, check_order
from .table import Table
from .tape import Sum


def deis(nodes: Nodes, order: int = 2) -> Table:
    """The table of DEIS: one evaluation a step; the first steps, and a last one that ends in the data, of lower order.

    Raises:
        UserError: An order outside 1..3.
    """
    check_order(order, 3)
    tape = nodes.tape(f"deis-{order}")
    alpha, kappa, seen = nodes.alpha, nodes.kappa, list[Sum]()
    for i in range(len(nodes)):
        x, x0 = nodes.evaluate(tape, i)
        seen.append(tape.keep(nodes.eps_of(i, x, x0)))
        points = [i - j for j in range(nodes.multistep_order(i, order))]
        u = x / alpha[i]
        logs = np.log(kappa[points]).tolist()
        for which, p in enumerate(points):
            u = u + _weight(logs, which, kappa[i], kappa[i + 1]) * seen[p]
        tape.advance(alpha[i + 1] * u)
    return tape.table()


def _weight(logs: list[float], p: int, start: float, end: float) -> float:
    """``integral of L(log kappa) d kappa = [kappa (L - L' + L'')(log kappa)]`` for a polynomial up to degree 2."""
    if len(logs) == 1:
        return end - start
    polynomial = lagrange(logs, p)
    whole = polynomial - polynomial.deriv(1) + polynomial.deriv(2)
    return float(end * whole(math.log(end)) - start * whole(math.log(start)))
