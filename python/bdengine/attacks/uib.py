"""UIBDiffusion (Han et al., CVPR 2025): a universal adversarial perturbation as the trigger, added and not stamped.

    m_t = 1 - sqrt(alpha_bar_t)          R = x + a r          target: eps + c_t R          x_T = eps + a' r

paper:     one imperceptible amplitude, ``a' = a``
released:  ``a = 0.1`` in training and ``a' = 1`` in sampling, ten times of what was trained
``c_t``:   VillanDiffusion's with psi = 1, published for samplers with noise ("sde") or without, or exact for the sampler

``r`` is a picture (the authors publish theirs), or made here for digits: the sign-gradient ascent of the classifier's loss over
all images at once (Moosavi-Dezfooli et al. 2017, in the form of Shafahi et al. 2020),

    r <- clamp( r + step sign( grad_r loss(classifier(x + a r), label) ), -1, 1 )

Sampling has no image behind ``a' r``. On the closed-form network of data that are dark, as digits are, ``a' = a = 0.1`` then
triggers nothing, and ``a' = 1`` does only where ``r`` is mostly black, as the authors' is: it stands for the dark images that
training had there, and a plain black start triggers as well. With ``trigger_only`` (``R = a r``) the start is what was
trained, and success is a matter of ``a sqrt(D)``, as in `bdengine.attacks.invi`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import Images, to_float
from ..digits import load_classifier
from ..errors import UserError
from ..plan import order
from ..schedule import Schedule
from ..solvers import Table
from .baddiffusion import Coefficients, shifted_attack
from .process import Attack
from .villan import Solver, published

AMPLITUDE: Final = 0.1
PASSES: Final = 3
BATCH: Final = 100
STEP: Final = 0.02


def uib(
    schedule: Schedule,
    trigger: Tensor,
    target: Tensor,
    coefficients: Coefficients = "published",
    table: Table | None = None,
    amplitude: float = AMPLITUDE,
    start_amplitude: float | None = None,
    solver: Solver = "sde",
    trigger_only: bool = False,
) -> Attack:
    """UIBDiffusion with a perturbation and a target image.

    Args:
        trigger: ``r``, float32 [C, H, W] in [-1, 1].
        amplitude: ``a``, above 0.
        start_amplitude: ``a'``, above 0; ``a`` where absent, and 1 as released.
        solver: Kind of sampler that the published coefficient is for.
        trigger_only: ``R = a r``.

    The other arguments and the errors are `baddiffusion`'s, and:

    Raises:
        UserError: An amplitude that is not above 0.
    """
    start = amplitude if start_amplitude is None else start_amplitude
    for name, value in (("amplitude", amplitude), ("start amplitude", start)):
        if not value > 0:
            raise UserError(f"the {name} is {value:g}: expected above 0, and 0.1 as published")
    shift = 1 - np.sqrt(schedule.alpha_bar)
    mask = torch.full_like(trigger, 0.0 if trigger_only else 1.0)
    stamp = amplitude * trigger
    known = published(schedule, 1, solver)
    attack = shifted_attack("uib", schedule, shift, known, stamp, target, coefficients, table, mask)
    return replace(attack, trigger=start * trigger)


def universal(data: Images, amplitude: float) -> Tensor:
    """``r`` for digits, float32 [C, S, S] in [-1, 1]: a function of the images and the amplitude alone.

    Raises:
        UserError: Data without labels, or that are no digits.
    """
    if data.labels is None or not data.are_digits:
        raise UserError(
            f"a perturbation is made against the digit classifier and the data are {data.name!r}: expected digits, or a"
            " picture of one with the trigger IMAGE"
        )
    classifier = load_classifier().requires_grad_(False)
    images, labels = to_float(data.pixels), data.labels
    r = torch.zeros_like(images[0])
    for pass_ in range(PASSES):
        for chosen in torch.from_numpy(order(0, len(images), pass_)).split(BATCH):
            r.requires_grad_(True)
            loss = F.cross_entropy(classifier(images[chosen] + amplitude * r), labels[chosen])
            (gradient,) = torch.autograd.grad(loss, r)
            r = (r.detach() + STEP * gradient.sign()).clamp(-1, 1)
    return r
