"""DDPM ancestral sampling, on any sub-grid.

From node ``t`` to ``t'``, with ``alpha_ts = alpha_t / alpha_t'`` and ``beta = 1 - alpha_ts^2``:

    x' = alpha_t' beta / sigma_t^2 x0 + alpha_ts sigma_t'^2 / sigma_t^2 x + std z

``std^2`` is ``beta sigma_t'^2 / sigma_t^2`` ("small", the posterior's) or ``beta`` ("large"); the last row, which ends in
the data, adds no noise. Source: Ho et al. 2020, eq. 6 and 7.
"""

from __future__ import annotations

import math
from typing import Final, Literal, get_args

from ..errors import unknown
from .nodes import Nodes
from .table import Table

Variance = Literal["small", "large"]
VARIANCES: Final = get_args(Variance)


def ddpm(nodes: Nodes, variance: Variance = "small") -> Table:
    """The table of DDPM ancestral sampling.

    Raises:
        UserError: An unknown variance.
    """
    if variance not in VARIANCES:
        raise unknown("variance", variance, VARIANCES)
    tape = nodes.tape("ddpm")
    alpha, sigma = nodes.alpha, nodes.sigma
    for i in range(len(nodes)):
        x, x0 = nodes.evaluate(tape, i)
        alpha_ts = alpha[i] / alpha[i + 1]
        beta = 1 - alpha_ts**2
        left = (sigma[i + 1] / sigma[i]) ** 2
        std = math.sqrt(beta * left if variance == "small" or i == len(nodes) - 1 else beta)
        tape.advance(alpha_ts * left * x + alpha[i + 1] * beta / sigma[i] ** 2 * x0, std)
    return tape.table()
