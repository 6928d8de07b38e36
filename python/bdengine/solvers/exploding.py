"""Samplers of variance-exploding models: score-SDE's ancestral and predictor-corrector, and EDM's Heun with churn.

    predictor    x' = x + (sigma^2 - sigma'^2) score + std z                  std^2 = sigma^2 - sigma'^2, or for "ancestral"
                                                                              (sigma^2 - sigma'^2) sigma'^2 / sigma^2
    corrector    x' = x + e score + sqrt(2 e) z                               e = 2 (snr |z| / |score|)^2
    EDM          x^ = x + S_noise sqrt(sigma^^2 - sigma^2) z, then Heun from sigma^ = (1 + gamma) sigma

A corrector's ``e`` depends on norms, so its rows are no table: they are marked in `Table.corrector` and the loop makes
them, sample by sample, where the published code takes norms over the batch. The noise of ``x^`` is drawn by the row before.
Sources: Song et al. 2021 (score SDE), algorithms 2 and 3, eq. 46 and 47; Karras et al. 2022 (EDM), algorithm 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from .euler import heun_step
from .nodes import Nodes
from .table import Table


def score_sde(nodes: Nodes, *, ancestral: bool = False, corrector_steps: int = 0, snr: float = 0.075) -> Table:
    """The table of the predictor, alone or after ``corrector_steps`` Langevin steps at each level; the end has no noise.

    Args:
        nodes: Variance-exploding.
        snr: Of the corrector: ``r`` in algorithm 3.
    """
    name = "ve-ancestral" if ancestral else "ve"
    tape = nodes.tape(f"{name}-pc{corrector_steps}" if corrector_steps else name)
    marks: list[float] = []
    for i in range(len(nodes)):
        for _ in range(corrector_steps):
            x, _ = nodes.evaluate(tape, i)
            tape.advance(x)
            marks.append(snr)
        x, x0 = nodes.evaluate(tape, i)
        sigma, after = nodes.sigma[i], nodes.sigma[i + 1]
        gone = sigma**2 - after**2
        std = math.sqrt(gone) * (after / sigma if ancestral else 1.0)
        tape.advance(x + (gone / sigma**2) * (x0 - x), std if after > 0 else 0.0)
        marks.append(0.0)
    return replace(tape.table(), start=float(nodes.sigma[0]), corrector=np.array(marks) if corrector_steps else None)


@dataclass(frozen=True)
class Churn:
    """EDM's stochasticity: how much noise is added before a step, at which sigmas, and by how much more than it claims."""

    amount: float = 0.0
    low: float = 0.0
    high: float = math.inf
    noise: float = 1.0

    def raised(self, sigma: float, steps: int) -> float:
        """``sigma^``."""
        gamma = min(self.amount / steps, math.sqrt(2) - 1) if self.low <= sigma <= self.high else 0.0
        return sigma * (1 + gamma)


def edm(nodes: Nodes, churn: Churn | None = None) -> Table:
    """The table of EDM's Heun sampler: two evaluations a step, one in the last.

    Args:
        nodes: Variance-exploding.
    """
    churn = churn or Churn()
    tape = nodes.tape("edm" if churn.amount == 0 else f"edm-churn{churn.amount:g}")
    raised = np.array([churn.raised(sigma, len(nodes)) for sigma in nodes.sigma[:-1]])
    added = churn.noise * np.sqrt(raised**2 - nodes.sigma[:-1] ** 2)
    hats = Nodes.exploding(raised, nodes.prediction)  # type: ignore[arg-type]
    for i in range(len(nodes)):
        heun_step(tape, hats, nodes, i, float(added[i + 1]) if i + 1 < len(nodes) else 0.0)
    return replace(tape.table(), start=float(math.hypot(nodes.sigma[0], added[0])))
