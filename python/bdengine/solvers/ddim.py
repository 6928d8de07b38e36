"""DDIM(eta), on any sub-grid.

From node ``t`` to ``t'``, with ``std^2 = eta^2 sigma_t'^2 / sigma_t^2 (1 - alpha_t^2 / alpha_t'^2)``:

    x' = alpha_t' x0 + sqrt(sigma_t'^2 - std^2) eps + std z

``eps`` is the network's own, also where ``x0`` is clamped, but not where it is thresholded. Source: Song et al. 2021
(DDIM), eq. 12 and 16. ``eta = 1`` is DDPM with its small variance.
"""

from __future__ import annotations

import math

from ..errors import UserError
from .nodes import Nodes
from .table import Table


def ddim(nodes: Nodes, eta: float = 0.0) -> Table:
    """The table of DDIM; deterministic where ``eta`` is 0.

    Raises:
        UserError: ``eta`` outside 0..1.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta is {eta}: expected 0 to 1")
    tape = nodes.tape("ddim" + (f"-eta{eta:g}" if eta else ""))
    alpha, sigma = nodes.alpha, nodes.sigma
    for i in range(len(nodes)):
        a, b = nodes.x0_of(i)
        x, m, x0 = tape.evaluate(nodes.time[i], a, b)
        eps = m if nodes.prediction == "epsilon" else ((1 - alpha[i] * a) * x - alpha[i] * b * m) / sigma[i]
        variance = eta**2 * (sigma[i + 1] / sigma[i]) ** 2 * (1 - (alpha[i] / alpha[i + 1]) ** 2)
        tape.advance(alpha[i + 1] * x0 + math.sqrt(max(sigma[i + 1] ** 2 - variance, 0.0)) * eps, math.sqrt(variance))
    return tape.table()
