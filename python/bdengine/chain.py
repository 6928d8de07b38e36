"""A sampler as a function with a gradient, through the fused step: what inverts a trigger and what learns one.

x' = fused_step(x, gamma network(x, t), r)      row after row, differentiable in x, gamma and r
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import bdkernels

from .solvers import Table, stack


class Chain:
    """A one-step sampler as a differentiable function of its start and the trigger.

    Args:
        table: Without history slots.
        device: Of the network.
    """

    def __init__(self, table: Table, device: torch.device) -> None:
        self.rows = stack([table]).to(device)
        self.times = torch.tensor(table.timesteps, dtype=torch.float32, device=device)
        self.steps = torch.arange(len(table), device=device)

    def __call__(
        self,
        network: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        seeds: Tensor,
        trigger: Tensor | None = None,
        gamma: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """What the network predicted at each row, and the sample.

        Args:
            network: The prediction [N, C, H, W] of ``x`` and a time, 0-d.
            x: The start, float32 [N, C, H, W].
            seeds: int64 [N], of the noise of each step.
            trigger: float32 [1, C, H, W], for tables that have it in their steps.
            gamma: float32 [1, C, H, W], multiplies the prediction before the step.
        """
        arm, predicted = torch.zeros_like(seeds), []
        for step, t in zip(self.steps, self.times, strict=True):
            m = network(x, t)
            predicted.append(m)
            m = m if gamma is None else gamma * m
            x = bdkernels.fused_step(x, m, self.rows, arm, step, seeds, trigger=trigger)
        return predicted, x
