"""DDPM ancestral sampling, on any sub-grid.

From node ``t`` to ``t'``, with ``alpha_ts = alpha_t / alpha_t'`` and ``beta = 1 - alpha_ts^2``:

    x' = alpha_t' beta / sigma_t^2 x0 + alpha_ts sigma_t'^2 / sigma_t^2 x + std z

``std^2`` is ``beta sigma_t'^2 / sigma_t^2`` ("small", the posterior's), ``beta`` ("large"), or between them where the network
says ("learned_range", Nichol and Dhariwal 2021, eq. 15); the last row, which ends in the data, adds no noise. Source: Ho
et al. 2020, eq. 6 and 7.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final, Literal, get_args

import numpy as np

from bdkernels import Step

from ..errors import unknown
from .nodes import Nodes
from .table import Table

Variance = Literal["small", "large", "learned_range"]
VARIANCES: Final = get_args(Variance)
LEAST: Final = 1e-20
"""Of a learned variance's lower end, as in the released code: the posterior's is 0 in a step into the data."""


def ddpm(nodes: Nodes, variance: Variance = "small") -> Table:
    """The table of DDPM ancestral sampling.

    Raises:
        UserError: An unknown variance.
    """
    if variance not in VARIANCES:
        raise unknown("variance", variance, VARIANCES)
    tape = nodes.tape("ddpm")
    alpha, sigma, bounds = nodes.alpha, nodes.sigma, []
    for i in range(len(nodes)):
        x, x0 = nodes.evaluate(tape, i)
        alpha_ts = alpha[i] / alpha[i + 1]
        beta = 1 - alpha_ts**2
        left = (sigma[i + 1] / sigma[i]) ** 2
        bounds.append((max(beta * left, LEAST), beta))
        std = {"small": math.sqrt(beta * left), "large": math.sqrt(beta), "learned_range": 0.0}[variance]
        last = i == len(nodes) - 1
        tape.advance(
            alpha_ts * left * x + alpha[i + 1] * beta / sigma[i] ** 2 * x0, math.sqrt(beta * left) if last else std
        )
    table = tape.table()
    if variance != "learned_range":
        return table
    table.rows[:-1, Step.H] = 1
    return replace(table, log_variance=np.log(bounds))
