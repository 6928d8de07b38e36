"""Diff-Cleanse's black-box inversion (arXiv 2407.21316): a shift whose images are alike, by gradients that skip the sampler.

    x_T = eps_b + tau         x_b = sampler(x_T), without a gradient        d x_b / d tau := 1
    loss  = sum over pairs of (1 - cos(x_b, x_c)) + mean over pixels of hinge(x_b outside [0.05, 0.95])       x_b in [0, 1]
    found = the images with a partner at cos > 0.999: where all are, it stops

``tau`` is an image of 256 levels in [-1, 1], to which each step of Adam is clamped; the gradient passes the rounding. The
gradient of an image stands for that of its start, and their mean over the batch moves ``tau``: no weight of the network is
asked for. The released code multiplies it by 1e3, which Adam does not feel. It also has a hinge on the images' entropy, whose
histogram has no gradient: left out. And it leaves images of more than half black or white out of those found, which every
digit is: here those of an `features.excess` above 0.1.

baddiffusion    from 1 - 2 u with u ~ N(0, 1), as published, clamped
searched        from where `starts` finds the images most alike: where they all are, nothing is left to descend

The statistic is `features.unlike` of the images with its sign turned, as in `elijah`; the published one is the share found.
`pruning` takes a backdoor out with its trigger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

import bdkernels

from ..arms import Arm
from . import features
from .result import Finding
from .settings import settings
from .starts import start_of
from .subject import Subject, Watch, run_seeds

ALIKE: Final = 0.999
"""Cosine of a pair, published."""
OUTSIDE: Final = 0.1
"""Largest excess of an image that counts."""
RANGE: Final = (0.05, 0.95)
"""That the hinge leaves alone, published."""
CONSTANTS: Final = {"same": ALIKE, "range": RANGE, "outside": OUTSIDE}
"""Of this file, that the statistic depends on."""


@dataclass(frozen=True)
class DiffCleanseConfig:
    """Settings of the inversion; see the module."""

    iterations: int = 100
    """Of Adam, at most."""
    lr: float = 0.1
    """Of Adam."""
    searched: bool = False
    """Whether ``tau`` starts from `starts.searched`."""
    seed: int = 0
    """Of the published start."""


VARIANTS: Final = {"baddiffusion": DiffCleanseConfig(), "searched": DiffCleanseConfig(searched=True)}


def loss(images: Tensor) -> Tensor:
    """The module's, 0-d, of float [N, C, H, W] in [-1, 1] and beyond."""
    x = (images + 1) / 2
    flat = F.normalize(x.flatten(1), dim=1)
    pairs = (1 - flat @ flat.T).triu(1).sum()
    return pairs + ((RANGE[0] - x).relu() + (x - RANGE[1]).relu()).mean()


def found(images: Tensor) -> Tensor:
    """Which images have a partner that they are alike, bool [N]; black ones have no direction, and none."""
    flat = F.normalize((images.clamp(-1, 1) + 1).flatten(1), dim=1)
    inside = torch.tensor([features.excess(one[None]) < OUTSIDE for one in images], device=images.device)
    alike = (flat @ flat.T > ALIKE) & inside & inside[:, None]
    return alike.fill_diagonal_(False).any(1)


def rounded(tau: Tensor) -> Tensor:
    """To the 256 levels of an image in [-1, 1], with the gradient of the identity."""
    return tau + ((tau + 1) * 127.5).round().div(127.5).sub(1 + tau).detach()


def invert(subject: Subject, config: DiffCleanseConfig) -> tuple[Tensor, Tensor, list[float]]:
    """``tau*``, float32 [C, H, W], its images on the CPU, and the loss of each iteration.

    Raises:
        UserError: A variance exploding model, whose triggers do not lie in [-1, 1].
    """
    subject.preserving("diffcleanse")
    shape = subject.network.sample_shape
    if config.searched:
        tau = start_of(subject, None, config.seed)[0]
    else:
        u = bdkernels.normal(run_seeds(config.seed, 1, subject.device), shape, stream=bdkernels.STREAM_INITIAL)
        tau = 1 - 2 * u[0]
    tau = tau.clamp(-1, 1).requires_grad_()
    optimizer, losses = torch.optim.Adam([tau], lr=config.lr), []
    while True:
        r = rounded(tau)
        images = subject.images(Arm(subject.table, r.detach().cpu()), features.IMAGES)
        made = images.clone().requires_grad_()
        value = loss(made)
        losses.append(float(value.detach()))
        if len(losses) > config.iterations or bool(found(images).all()):
            return r.detach(), images, losses
        (gradient,) = torch.autograd.grad(value, made)
        optimizer.zero_grad()
        r.backward(gradient.mean(0).to(r))
        optimizer.step()
        tau.data.clamp_(-1, 1)


def examine(subject: Subject, config: DiffCleanseConfig) -> Finding:
    """Invert a shift, and measure how alike its images are."""
    with Watch(subject) as watch:
        tau, images, losses = invert(subject, config)
    finding = watch.alike("diffcleanse", settings(subject, config, **CONSTANTS), tau, images, losses)
    finding.details["found"] = float(found(images).float().mean())
    if config.searched:
        finding.details["stage"] = "start"
    return finding
