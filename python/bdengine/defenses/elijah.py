"""Elijah (An et al., AAAI 2024): the shift that a sampler's first step would leave, inverted from the network alone.

    tau* = argmin_tau  mean over pixels | mean_b eps_theta(eps_b + tau, T - 1) - lambda tau |          eps_b ~ N(0, I), fixed

A backdoored network predicts ``eps + c_t R`` on ``eps + R``; a clean one predicts its input, and ``tau`` shrinks to noise.
Where the optimal network takes every input for a poisoned one, ``mean_b eps_theta = eps_bar + tau - (m_t - c_t) R``, so

    tau* = ((m_t - c_t) R - eps_bar) / (1 - lambda)

which is ``R`` for ``c_t = lambda = 0.5``, up to twice the mean of the noise. Where it takes them for clean ones ``R`` is 0, so
the start decides: see `starts`. With ``lambda`` near 1, for models of samplers without noise, the optimum is ill-conditioned
and only the first steps say something.

baddiffusion    lambda = 0.5, tau from -U[0, 1], Adam at 0.1, 100 noises, 100 iterations
trojdiff        from U[0, 1]; images by TrojDiff's own sampler, with the gamma that is assumed
ode             lambda = 1, from U[-1, 1], 10 iterations: models for DDIM, and latent ones
ncsn            input sigma (eps + tau), -sigma score for eps_theta, from U[0, 1]
background      from -1, not published
searched        from where `starts` finds the images most alike, not published

The statistic is `features.unlike` of the images with its sign turned: a backdoor makes them alike. The paper decides by a
random forest on uniformity and total variation, trained on backdoored models, which an auditor does not have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

import bdkernels

from ..arms import Arm
from ..attacks import trojdiff
from ..attacks.trojdiff import BLEND_GAMMA
from . import features
from .result import Finding
from .settings import settings
from .starts import start_of
from .subject import Subject, Watch, run_seeds


@dataclass(frozen=True)
class ElijahConfig:
    """Settings of the inversion; see the module."""

    lam: float = 0.5
    """``lambda``."""
    start: tuple[float, float] | None = (-1.0, 0.0)
    """Ends of the uniform law that ``tau`` starts from; `starts.searched` where None."""
    noises: int = 100
    """Fixed noises, of images of any size; published: 100 at 32 pixels, 50 at 128, 20 at 256 (see `Subject.eps`)."""
    iterations: int = 100
    """Of Adam."""
    lr: float = 0.1
    """Of Adam."""
    gamma: float | None = None
    """Noise scale of a sampler that has the trigger in every step; in the start alone where absent."""
    seed: int = 0
    """Of the noises and the start."""


VARIANTS: Final = {
    "baddiffusion": ElijahConfig(),
    "trojdiff": ElijahConfig(start=(0.0, 1.0), gamma=BLEND_GAMMA),
    "ode": ElijahConfig(lam=1.0, start=(-1.0, 1.0), iterations=10),
    "ncsn": ElijahConfig(start=(0.0, 1.0)),
    "background": ElijahConfig(start=(-1.0, -1.0)),
    "searched": ElijahConfig(start=None),
}


def loss(subject: Subject, tau: Tensor, eps: Tensor, lam: float) -> Tensor:
    """The module's objective, 0-d, differentiable in ``tau`` [1, C, H, W]; ``eps`` [B, C, H, W]."""
    return (subject.first_noise(eps + tau).mean(0) - lam * tau[0]).abs().mean()


def invert(subject: Subject, config: ElijahConfig, start: Tensor | None = None) -> tuple[Tensor, list[float]]:
    """``tau*``, float32 [C, H, W], and the objective before each step.

    From ``start``, float32 [1, C, H, W] on the network's device, or the configuration's. The network's weights must not
    require gradients: see `Watch`.
    """
    shape, device = subject.network.sample_shape, subject.device
    tau = (start_of(subject, config.start, config.seed) if start is None else start.clone()).requires_grad_()
    seeds = run_seeds(config.seed, config.noises, device)
    eps = bdkernels.normal(seeds, shape, stream=bdkernels.STREAM_TRAINING)
    optimizer, losses = torch.optim.Adam([tau], lr=config.lr), []
    for _ in range(config.iterations):
        optimizer.zero_grad()
        objective = loss(subject, tau, eps, config.lam)
        objective.backward()
        optimizer.step()
        losses.append(objective.detach())
    return tau.detach()[0], torch.stack(losses).tolist()


def arm_of(subject: Subject, tau: Tensor, gamma: float | None) -> Arm:
    """How samples with the inverted shift are made: from ``eps + tau``, or with ``tau`` in every step."""
    tau = tau.cpu()
    if gamma is None:
        return Arm(subject.table, tau)
    process = subject.preserving("a trigger in every step")
    delta = tau / (1 - gamma) if gamma < 1 else tau
    return trojdiff(process, delta, torch.zeros_like(tau), gamma=gamma).arm(process, subject.table)


def examine(subject: Subject, config: ElijahConfig) -> Finding:
    """Invert a shift, make `features.IMAGES` images with it, and measure how alike they are."""
    with Watch(subject) as watch:
        tau, losses = invert(subject, config)
        images = subject.images(arm_of(subject, tau, config.gamma), features.IMAGES)
    return watch.alike("elijah", settings(subject, config), tau, images, losses)
