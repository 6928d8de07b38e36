"""PureDiffusion (arXiv 2409.13945 and 2502.19047): Elijah's shift at many timesteps, and outputs that agree.

    x_T = eps_b + tau          x_t' = sampler step of (x_t, eps_theta(x_t, t))
    shift          mean over t of  mean over pixels | mean_b eps_theta(x_t, t) - lambda_t tau |
    consistency    mean over pixels of  var_b x_0
    tau* = argmin  shift + weight consistency

``lambda_t`` is what a backdoored network adds to its prediction, in units of the trigger: BadDiffusion's ``c_t``. The sampler
is the DDIM(sigma) that follows the backdoor's path with this ``c_t`` on a coarse grid, with ``m_t = 1 - sqrt(alpha_bar_t)``:

    x_t' = a x_t + (k - a s_t) eps_theta + sqrt(s_t'^2 - k^2) z
    a = sqrt(alpha_bar_t' / alpha_bar_t)      k = clamp( a s_t - (a m_t - m_t') / c_t, -s_t', s_t' )

The marginals of clean samples are right for any ``k``. With DDPM on such a grid, for which ``rho_t`` is not exact, the path is
lost, and with it the trigger: of a UNet with a grey box it was found with a cosine of -0.61, against 0.98.

baddiffusion    c_t = rho_t, as published for DDPM
ode             c_t = 2 rho_t, as VillanDiffusion has it for samplers without noise
exact           c_t exact for the model's own sampler
searched        the same, from where `starts` finds the images most alike, in 30 iterations; not published

No code of the authors is public. From the papers: the shift at many timesteps with a scale of each, the consistency of
outputs from different noises, detection by trigger and images together, and amplification. This project's reading, which may
differ from theirs: that sampler in 10 steps, which gradients pass through, new noise in each iteration, the absolute value, the
variance, the weight, Adam at Elijah's rate for 100 iterations, and the start at -1, the background of every stamped trigger. So
a figure made here is not one of the papers'.

The statistic is `features.unlike` of the images with its sign turned, as in `elijah`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
import torch
from torch import Tensor

import bdkernels
from bdkernels import Step

from ..arms import Arm
from ..attacks import exact_coefficient
from ..attacks.baddiffusion import rho
from ..chain import Chain
from ..errors import UserError, unknown
from ..schedule import Floats, Schedule, grid
from ..solvers import Table
from ..solvers.table import blank
from . import features
from .result import Finding
from .settings import settings
from .starts import start_of
from .subject import Subject, Watch, run_seeds

Amplification = Literal["replace", "add"]
AMPLIFICATIONS: Final = get_args(Amplification)
Kind = Literal["baddiffusion", "ode", "exact"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)


@dataclass(frozen=True)
class PureDiffusionConfig:
    """Settings of the inversion; see the module."""

    coefficient: Kind = "baddiffusion"
    """``c_t``: see the module."""
    steps: int = 10
    """Of the chain."""
    batch: int = 16
    """Noises of an iteration, at least 2."""
    iterations: int = 100
    """Of Adam."""
    lr: float = 0.1
    """Of Adam."""
    weight: float = 1.0
    """Of the consistency."""
    start: tuple[float, float] | None = (-1.0, -1.0)
    """Ends of the uniform law that ``tau`` starts from; `starts.searched` where None."""
    seed: int = 0
    """Of the noises and the start."""


VARIANTS: Final = {kind: PureDiffusionConfig(kind) for kind in KINDS} | {
    "searched": PureDiffusionConfig("exact", iterations=30, start=None)
}


class Objective:
    """The module's losses on one model.

    Attributes:
        scale: ``lambda_t`` of each row of the chain, float32 [rows].
    """

    def __init__(self, subject: Subject, config: PureDiffusionConfig) -> None:
        if config.batch < 2:
            raise UserError(f"the batch is {config.batch}: expected at least 2 noises, whose outputs are compared")
        process = subject.preserving("purediffusion")
        self.subject, self.config = subject, config
        if config.coefficient == "exact":
            coefficient = exact_coefficient(process, subject.table, 1 - np.sqrt(process.alpha_bar))
        else:
            coefficient = (1 if config.coefficient == "baddiffusion" else 2) * rho(process)
        table = following(process, config.steps, coefficient)
        self.chain = Chain(table, subject.device)
        scale = coefficient[table.timesteps.astype(np.int64)]
        self.scale = torch.tensor(scale, dtype=torch.float32, device=subject.device)

    def __call__(self, tau: Tensor, iteration: int) -> tuple[Tensor, Tensor]:
        """Shift and consistency, 0-d each, differentiable in ``tau`` [1, C, H, W]."""
        config = self.config
        seeds = run_seeds(config.seed, config.batch, tau.device, iteration * config.batch)
        predicted, x0 = self.chain(self.subject.eps, bdkernels.normal(seeds, tau.shape[1:]) + tau, seeds)
        means = torch.stack([m.mean(0) for m in predicted])
        shift = (means - self.scale[:, None, None, None] * tau).abs().mean()
        return shift, x0.var(0).mean()


def following(process: Schedule, steps: int, coefficient: Floats) -> Table:
    """The module's sampler that follows BadDiffusion's path with ``coefficient``, as near as ``k_t`` allows.

    Args:
        coefficient: ``c_t``, float64 [T].
    """
    t = grid(process.T, steps)
    alpha, sigma, m, c = np.sqrt(process.alpha_bar[t]), process.s[t], 1 - np.sqrt(process.alpha_bar[t]), coefficient[t]
    after, sigma_after = np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0)
    a = after / alpha
    kept = np.clip(a * sigma - (a * m - (1 - after)) / c, -sigma_after, sigma_after)
    rows = blank(t.tolist())
    rows[:, Step.P], rows[:, Step.S] = a, kept - a * sigma
    rows[:, Step.Z] = np.sqrt(sigma_after**2 - kept**2)
    return Table(rows, f"following-{steps}")


def invert(
    subject: Subject, config: PureDiffusionConfig, start: Tensor | None = None
) -> tuple[Tensor, list[tuple[float, float]]]:
    """``tau*``, float32 [C, H, W], and both losses before each step.

    From ``start``, float32 [1, C, H, W] on the network's device, or the configuration's. The network's weights must not
    require gradients: see `Watch`.
    """
    tau = (start_of(subject, config.start, config.seed) if start is None else start.clone()).requires_grad_()
    objective, seen = Objective(subject, config), []
    optimizer = torch.optim.Adam([tau], lr=config.lr)
    for iteration in range(config.iterations):
        optimizer.zero_grad()
        shift, consistency = objective(tau, iteration)
        (shift + config.weight * consistency).backward()
        optimizer.step()
        seen.append((float(shift.detach()), float(consistency.detach())))
    return tau.detach()[0], seen


def amplify(trigger: Tensor, inverted: Tensor, how: Amplification = "replace") -> Tensor:
    """What an attacker starts sampling from in place of the trigger: the inverted one, or both together.

    Args:
        trigger, inverted: float32 [C, H, W].

    Raises:
        UserError: Shapes that differ, or an unknown way.
    """
    if how not in AMPLIFICATIONS:
        raise unknown("amplification", how, AMPLIFICATIONS)
    if trigger.shape != inverted.shape:
        raise UserError(
            f"the inverted trigger has shape {tuple(inverted.shape)}: expected the trigger's {tuple(trigger.shape)}"
        )
    return inverted if how == "replace" else trigger + inverted


def examine(subject: Subject, config: PureDiffusionConfig) -> Finding:
    """Invert a shift, make `features.IMAGES` images with it, and measure how alike they are."""
    with Watch(subject) as watch:
        tau, losses = invert(subject, config)
        images = subject.images(Arm(subject.table, tau.cpu()), features.IMAGES)
    return watch.alike("purediffusion", settings(subject, config), tau, images, losses)
