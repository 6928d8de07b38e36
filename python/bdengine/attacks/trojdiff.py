"""TrojDiff (Chen, Song and Li, CVPR 2023): a shifted process with its own noise, and its own sampler.

    mu = (1 - gamma) delta          x_t = sqrt(alpha_bar_t) y + s_t (gamma eps + mu)          target: eps

blend:  on every pixel, ``delta`` an image, gamma = 0.6
patch:  in a square in the bottom right corner, gamma = 0.1; outside of it the clean process

The network learns nothing about ``mu``; sampling adds it in every step (`bdengine.solvers.Table.shifted` with ``m_t = s_t``),
inside the square alone for a patch. Published for DDPM with every timestep and DDIM; here any sampler.

D2I:      ``y`` is one image
In-D2D:   each poisoned sample's ``y`` is an image of a class of the training data, 7 as published; success is a sample that
          a classifier takes for that class. Published batches grow by a Trojan copy of every such image; here a plan
          replaces the images at its rate, and 1/11 is what a tenth of the data makes of all
Out-D2D:  it is one of a class that the training data do not have. Published: 50 such images to 100 of each batch

Published training sums the loss over pixels, draws antithetic timesteps and keeps an average of decay 0.9999; here all attacks
are trained by one loop, with the mean of the loss and what `TrainConfig` says.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..schedule import Schedule
from .process import Attack, check_shape

BLEND_GAMMA: Final = 0.6
PATCH_GAMMA: Final = 0.1
"""As published; of a trigger over the whole image and of a patch."""


def trojdiff(
    schedule: Schedule, delta: Tensor, target: Tensor, region: Tensor | None = None, gamma: float | None = None
) -> Attack:
    """TrojDiff with a trigger and a target image.

    Args:
        delta: The trigger, float32 [C, H, W] in [-1, 1].
        target: ``y``, float32 [C, H, W] or [K, C, H, W] in [-1, 1].
        region: bool [C, H, W], the patch; None for a blend.
        gamma: Above 0 to 1; the published one where absent.

    Raises:
        UserError: Shapes that differ, or gamma out of range.
    """
    check_shape("target", target.shape[-3:], delta)
    if region is not None:
        check_shape("region", region.shape, delta)
    gamma = (BLEND_GAMMA if region is None else PATCH_GAMMA) if gamma is None else gamma
    if not 0 < gamma <= 1:
        raise UserError(f"gamma is {gamma:g}: expected above 0, as nothing is sampled without noise, to 1")
    mu = (1 - gamma) * delta
    if region is not None:
        mu = torch.where(region, mu, torch.zeros_like(mu))
    nothing = np.zeros(schedule.T)
    return Attack("trojdiff", schedule.s, nothing, gamma, mu, mu, torch.zeros_like(mu), target, region, in_steps=True)
