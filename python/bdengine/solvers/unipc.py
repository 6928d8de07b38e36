"""UniPC of order 1 to 3: a multistep predictor and a corrector that reuses the next step's evaluation.

    predictor   x'   = P xc + rate (1 - e^q) D_0 - rate B sum_k rho_k (D_k - D_0) / r_k
    corrector   xc'  = P xc + rate (1 - e^q) D_0 - rate B (sum_k rho_k (D_k - D_0) / r_k + rho (D' - D_0))

``D_k`` are the last predictions of ``x0`` (``P = sigma' / sigma, rate = alpha', q = -h``) or of the noise (``P = alpha' /
alpha, rate = sigma', q = h``), ``r_k = (lambda_k - lambda_0) / h``, ``B = q`` (bh1) or ``e^q - 1`` (bh2), ``D'`` the
prediction at ``x'``; ``rho`` solves ``sum_k r_k^(n-1) rho_k = n! phi_n(q) / B``. Source: Zhao et al. 2023, algorithms 1 to 3.
"""

from __future__ import annotations

import math
from typing import Final, Literal, get_args

import numpy as np

from ..errors import unknown
from ..schedule import Floats
from .nodes import Nodes, check_order
from .table import Table
from .tape import Sum

Scale = Literal["bh1", "bh2"]
SCALES: Final = get_args(Scale)


def unipc(nodes: Nodes, order: int = 2, scale: Scale = "bh2", *, noise: bool = False) -> Table:
    """The table of UniPC: one evaluation a step, the first and last steps of lower order.

    Args:
        order: 1 to 3.
        noise: Multistep over the predicted noise instead of ``x0``.

    Raises:
        UserError: An order or a scale that there is not.
    """
    check_order(order, 3)
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    tape = nodes.tape(f"unipc-{order}-{scale}{'-noise' if noise else ''}")
    seen: list[Sum] = []
    now = 0
    corrected = Sum({})
    for i in range(len(nodes)):
        x, x0 = nodes.evaluate(tape, i)
        prediction = tape.keep(nodes.eps_of(i, x, x0)) if noise else x0
        if i > 0:
            x = _step(nodes, scale, noise, corrected, seen, now, prediction)
        corrected = tape.keep(x)
        seen.append(prediction)
        now = min(order, i + 1, len(nodes) - i)
        tape.advance(_step(nodes, scale, noise, corrected, seen, now, None))
    return tape.table()


def _step(nodes: Nodes, scale: Scale, noise: bool, x: Sum, seen: list[Sum], order: int, there: Sum | None) -> Sum:
    """From the node of ``seen[-1]`` to the next, with the prediction ``there`` where it is known."""
    i = len(seen) - 1
    alpha, sigma, kappa, lam = nodes.alpha, nodes.sigma, nodes.kappa, nodes.lam
    latest = seen[i]
    if noise:
        rate, out = sigma[i + 1], (alpha[i + 1] / alpha[i]) * x + (sigma[i + 1] - alpha[i + 1] * kappa[i]) * latest
    else:
        decay = kappa[i + 1] / kappa[i]
        rate, out = alpha[i + 1], (sigma[i + 1] / sigma[i]) * x + alpha[i + 1] * (1 - decay) * latest
    if order == 1 and there is None:
        return out
    h = lam[i + 1] - lam[i]
    q = h if noise else -h
    b = q if scale == "bh1" else math.expm1(q)
    at = np.array([(lam[i - k] - lam[i]) / h for k in range(1, order)] + ([] if there is None else [1.0]))
    slopes = [(seen[i - k] - latest) / at[k - 1] for k in range(1, order)] + ([] if there is None else [there - latest])
    for weight, slope in zip(_weights(at, q, b), slopes, strict=True):
        out = out - (rate * b * weight) * slope
    return out


def _weights(at: Floats, q: float, b: float) -> Floats:
    """``rho``; a single unknown is 1/2 whatever ``h``, as published."""
    if len(at) == 1:
        return np.array([0.5])
    moments, phi = [], math.expm1(q) / q - 1
    for n in range(1, len(at) + 1):
        moments.append(math.factorial(n) * phi / b)
        phi = phi / q - 1 / math.factorial(n + 1)
    return np.linalg.solve(np.vander(at, increasing=True).T, np.array(moments)).astype(np.float64)
