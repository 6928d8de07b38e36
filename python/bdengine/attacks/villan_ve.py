"""VillanDiffusion (Chou, Chen and Ho, NeurIPS 2023), variance exploding: a backdoor of score networks.

    x_t = y + sigma_t eps + sigma_t r          -sigma_t score(x_t, sigma_t) is trained towards eps + c_t r

published:  c_t = w sigma_t / (sigma_t + sigma_(t-1)), w at the least noise: exact for a predictor alone, w as in `villan`
exact:      c_t with which the whole level, its correctors and then its predictor, leads from sigma_t r to sigma_(t-1) r

A corrector follows the true score, whose ``c`` is 0: with ``c`` it pulls the trigger's share from ``sigma_t`` towards
``(1 - c) sigma_t``, and the more so the more steps it has. So the exact ``c`` is smaller. With ``q = sigma_(t-1) / sigma_t``,
``k`` corrector steps and ``e`` of each as a share of ``sigma_t^2``, on the path

    c = (1 - q) / (1 - q^2 (1 - e)^k)          e = 2 snr^2 / (1 + c^2 mean(r^2))

which is the published one for ``k = 0`` and 0.24 instead of 0.50 for score-SDE's 2,000 levels, ``k = 1`` and ``snr`` 0.075. The
published ``c`` ends there at 0.66 of the trigger's share. `exact_exploding` also follows the variance of the noise, which the
predictor of few levels leaves above ``sigma^2`` and a corrector near it.

What no coefficient can fix: ``e`` is each sample's own, since its norms are, so the share is kept in the mean alone, with a
spread of the order of ``e c sqrt(2 / D)``; it is made for one ``k``, ``snr`` and ``mean(r^2)``, and leaves the path with
others; with the image behind the trigger (``R = M x + r``) the last differs between images. So here, as in every published
recipe of this kind, the trigger is bare. Images and triggers lie in [0, 1], the background is 0, ``x_T = sigma_T (eps + r)``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bdkernels import Step

from ..errors import UserError, unknown
from ..schedule import Floats
from ..solvers import Table
from .baddiffusion import Coefficients
from .process import Attack, check_shape
from .villan import Solver, weight_of


class Share(NamedTuple):
    """What a state has of the trigger, and the variance of its noise, after the data are taken off."""

    trigger: float
    variance: float


def published(sigmas: Floats, solver: Solver = "sde") -> Floats:
    """The released code's ``c_t``, float64 [T]; the errors are `weight_of`'s."""
    return weight_of(solver) * sigmas / (sigmas + np.append(0.0, sigmas[:-1]))


def villan_ve(
    sigmas: Floats,
    trigger: Tensor,
    target: Tensor,
    coefficients: Coefficients = "published",
    table: Table | None = None,
    solver: Solver = "sde",
) -> Attack:
    """VillanDiffusion of a variance-exploding process with a bare trigger and a target image.

    Args:
        sigmas: float64 [T], positive and ascending: the noise levels of training.
        trigger: ``r``, float32 [C, H, W], 0 where it is background.
        target: ``y``, float32 [C, H, W] or [K, C, H, W].
        coefficients: "published" or "exact".
        table: Of `bdengine.solvers.score_sde`: the sampler to be exact for; needed for "exact" only.
        solver: Kind of sampler that the published coefficient is for.

    Raises:
        UserError: Shapes that differ, an unknown coefficient or solver, or "exact" without a table or with EDM's.
    """
    check_shape("target", target.shape[-3:], trigger)
    if coefficients not in ("published", "exact"):
        raise unknown("coefficient", coefficients, ("published", "exact"))
    c = published(sigmas, solver)
    if coefficients == "exact":
        if table is None:
            raise UserError("exact coefficients depend on the sampler: expected its table")
        c = exact_exploding(table, sigmas, float(trigger.double().square().mean()))
    return Attack("villan-ve", sigmas, c, 1.0, trigger, trigger, torch.zeros_like(trigger), target)


def exact_exploding(table: Table, sigmas: Floats, power: float) -> Floats:
    """``c_t`` that keeps the trigger's share at ``sigma`` through every level of ``table``; float64 [T], see the module.

    Linear in sigma between the sampler's levels, constant beyond the first and last.

    Args:
        table: A predictor with or without correctors, for a network that returns the score.
        power: Mean square of ``r``.
    """
    from scipy.optimize import brentq

    at, found = Share(table.start, table.start**2), []
    levels = _levels(table)
    times = [rows[0][1] for rows in levels]
    if (np.diff(times) >= 0).any():
        raise UserError(
            f"the sampler {table.name} is no predictor, which exact coefficients are for: expected published ones, of the"
            " solver ode where it has no noise"
        )

    def off(c: float, rows: Rows, share: Share, after: float) -> float:
        return through(rows, share, c, power).trigger - after

    for rows, sigma, after in zip(levels, times, [*times[1:], 0.0], strict=True):
        on_path = Share(sigma, at.variance)
        # On the path c is 1 / (1 + q) at most, and below 0 the trigger's share would grow.
        found.append(float(brentq(off, -1.0, 2.0, args=(rows, on_path, after), xtol=1e-14)))
        at = through(rows, on_path, found[-1], power)
    return np.interp(sigmas, times[::-1], found[::-1])


Rows = list[tuple[NDArray[np.float64], float, float]]
"""A level's row, sigma and signal-to-noise ratio (0 for the predictor)."""


def through(rows: Rows, share: Share, c: float, power: float) -> Share:
    """The state after some rows with the coefficient ``c``, in the mean over samples and pixels."""
    u, variance = share
    for row, sigma, snr in rows:
        score = -(c + u / sigma - 1) / sigma
        if snr:
            e = 2 * snr**2 / (variance / sigma**4 + score**2 * power)
            u, variance = u + e * score, (1 - e / sigma**2) ** 2 * variance + 2 * e
        else:
            kept, gain = float(row[Step.P] + row[Step.Q] * row[Step.A]), float(row[Step.S] + row[Step.Q] * row[Step.B])
            u, variance = kept * u + gain * score, (kept - gain / sigma**2) ** 2 * variance + float(row[Step.Z]) ** 2
    return Share(u, variance)


def _levels(table: Table) -> list[Rows]:
    """The rows of each noise level: correctors, then the predictor."""
    marks = np.zeros(len(table)) if table.corrector is None else table.corrector
    each: list[Rows] = [[]]
    for row, sigma, snr in zip(table.rows, table.timesteps, marks, strict=True):
        each[-1].append((row, float(sigma), float(snr)))
        if not snr:
            each.append([])
    return each[:-1]
