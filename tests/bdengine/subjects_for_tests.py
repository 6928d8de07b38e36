"""The closed-form network of a poisoned mixture, and of a clean one, for the defenses to examine."""

from __future__ import annotations

import torch
from torch import Tensor

from bdengine.attacks import Attack, baddiffusion
from bdengine.defenses import Subject
from bdengine.oracle import Gaussian, Oracle
from bdengine.schedule import linear
from bdengine.solvers import SamplerConfig
from bdengine.triggers import trigger

PROCESS, SIDE = linear(), 12
SHAPE, PIXELS = (1, SIDE, SIDE), SIDE * SIDE
DDPM = SamplerConfig("ddpm", 20).table(PROCESS)
TARGET = torch.linspace(-1, 1, PIXELS).reshape(SHAPE).sin()
BACKGROUND = -0.8
DATA = [(1.0, Gaussian(torch.full(SHAPE, BACKGROUND), 0.02 * torch.eye(PIXELS)))]
ATTACK: Attack = baddiffusion(PROCESS, trigger("BOX_4", SIDE, 1), TARGET)
R = ATTACK.stamp + BACKGROUND * ATTACK.mask
"""What a poisoned item is shifted by, in the mean: the box, and the data's own background around it. 9.05 long."""


def subject(rate: float, attack: Attack = ATTACK) -> Subject:
    """The optimal network at a poison rate; clean at 0."""
    oracle = Oracle(PROCESS, DATA, attack if rate else None, rate)
    return Subject(oracle, PROCESS, DDPM)  # type: ignore[arg-type]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))
