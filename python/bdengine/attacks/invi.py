"""InviBackdoor (Li et al. 2024, arXiv 2406.00816): a learned trigger too small to see, by bi-level optimisation.

    inner, one step a batch:  x_T = eps + delta          g = sign( grad_delta MSE(sampler(x_T), y) )
                              delta <- clamp( Adam(delta, g), -bound, bound )
    outer, the training:      m_t = 1 - sqrt(alpha_bar_t)          R = delta          target: eps + c_t delta

published:  c_t exact for DDIM with every timestep; bound 0.2, 32 noises, a sampler of 10 steps, Adam at 1e-3, delta = 0 first
exact:      c_t of `exact_coefficient` for the sampler and grid that will be used

The sampler of the inner step is DDIM's table, differentiated through `bdkernels.fused_step` and the network. Its noise is the
initial noise of the batch's own seeds, so a resumed run learns the same trigger. The published learning rate falls once in 200
epochs, which its runs of 50 never reach: here it is constant. BackdoorDM's port stamps its shipped trigger and adds the learned
one (``R = invi + delta``), but samples with the shipped one: that is another attack, and is not made here.

How far a bound carries depends on the number of pixels D: triggered and clean starts differ by ``bound sqrt(D)`` standard
deviations, 11 for CIFAR-10 at 0.2 and 3 for digits of 16 pixels.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

import bdkernels

from ..chain import Chain
from ..errors import UserError
from ..schedule import Floats, Schedule
from ..solvers import Nodes, Table, ddim
from .baddiffusion import Coefficients, shifted_attack
from .exact import exact_coefficient
from .process import Attack

BOUND: Final = 0.2
"""As published, of ``|delta|``."""
LR: Final = 1e-3
STARTS: Final = 32
STEPS: Final = 10


def published(schedule: Schedule, shift: Floats) -> Floats:
    """The coefficient that is exact for DDIM on adjacent timesteps, float64 [T].

    Args:
        shift: ``m_t``, float64 [T].
    """
    return exact_coefficient(schedule, ddim(Nodes.of(schedule, schedule.T)), shift)


def invi(
    schedule: Schedule,
    target: Tensor,
    coefficients: Coefficients = "published",
    table: Table | None = None,
    trigger: Tensor | None = None,
) -> Attack:
    """InviBackdoor with a trigger, or before it is learned, 0 everywhere; the arguments and errors are `baddiffusion`'s."""
    if target.dim() != 3:
        raise UserError(f"the trigger is to be learned for {len(target)} target images: expected one")
    shift, nothing = 1 - np.sqrt(schedule.alpha_bar), torch.zeros_like(target)
    known = published(schedule, shift)
    r = nothing if trigger is None else trigger
    return shifted_attack("invi", schedule, shift, known, r, target, coefficients, table, nothing)


class InnerLoop:
    """The trigger while it is learned.

    Args:
        target: ``y``, float32 [1, C, H, W].
        bound: Largest ``|delta|``, above 0 to 1.

    Attributes:
        delta: float32 [1, C, H, W]; changes in place.

    Raises:
        UserError: A bound out of range.
    """

    def __init__(self, schedule: Schedule, target: Tensor, bound: float = BOUND) -> None:
        if not 0 < bound <= 1:
            raise UserError(f"the bound of the trigger is {bound:g}: expected above 0 to 1, and 0.2 as published")
        self.target, self.bound = target, bound
        self.delta = torch.zeros_like(target).requires_grad_()
        self.adam = torch.optim.Adam([self.delta], lr=LR)
        self.chain = Chain(ddim(Nodes.of(schedule, STEPS)), target.device)

    def effect(self, network: torch.nn.Module, seeds: Tensor) -> Tensor:
        """``MSE(sampler(eps + delta), y)`` of ``seeds`` int64 [N], 0-d, differentiable in ``delta``."""
        _, x = self.chain(network, bdkernels.normal(seeds, self.target.shape[1:]) + self.delta, seeds)
        return (x - self.target).square().mean()

    def step(self, network: torch.nn.Module, seeds: Tensor) -> Tensor:
        """One step of ``delta`` against ``network``, which stays as it is; the effect before it, 0-d.

        Args:
            seeds: int64 [N], those of a training batch; the first 32 are used.
        """
        effect = self.effect(network, seeds[:STARTS])
        (gradient,) = torch.autograd.grad(effect, self.delta)
        self.delta.grad = gradient.sign()
        self.adam.step()
        with torch.no_grad():
            self.delta.clamp_(-self.bound, self.bound)
        return effect.detach()

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        return {"delta": self.delta.detach()} | self.adam.state_dict()["state"].get(0, {})

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `state`."""
        with torch.no_grad():
            self.delta.copy_(tensors["delta"])
        moments = {name: value for name, value in tensors.items() if name != "delta"}
        groups = self.adam.state_dict()["param_groups"]
        self.adam.load_state_dict({"state": {0: moments} if moments else {}, "param_groups": groups})
