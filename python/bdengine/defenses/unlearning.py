"""Unlearning of an inverted trigger at every timestep: ours, not published.

    start       L = mse(eps_theta(x_t), eps_0(x_t)) + mse(eps_theta(x_t + m_t tau), eps_0(x_t) + c_t tau)          t uniform
    in steps    L = mse(eps_theta(x_t), eps_0(x_t)) + mse(eps_theta(sqrt(alpha_bar_t) x0 + s_t (gamma eps + mu)), eps)

``eps_0`` is the network as it was found. ``m_t`` and ``c_t`` are those of BadDiffusion with the coefficient that is exact for
the sampler, ``mu`` and ``gamma`` are TrojDiff's: what an attack would train whose target is the image itself. A sampler with
the trigger is led to images of the data, and everything else stays as it was.

The published removal says that the last timestep's answer shall be the one without ``tau``, so ``tau`` stays in the state
and grows. With the true trigger of digits-badiffusion (5,500 images, 2e-4, batches of 32, 256 samples) its triggered samples
are white blobs, at a Fréchet distance of 10.9 where unlearning's are at 1.6; clean ones are at 0.61 against 0.35. Nor need
``tau`` be precise: with what Elijah inverts from a searched start, at a cosine of 0.92 to the trigger, the published removal
leaves an ASR of 100 %, also after three times as many steps, unlearning one of 0 %, its clean samples at 0.29 and its triggered
ones at 0.84.

What is owed to a shift of the start is known from ``eps_0`` without noise, and 22 passes at 5e-4 are enough: of a zoo model
that stood at 0.89, clean samples are at 1.36 after 11 passes at 2e-4, at 1.18 after 11 at 5e-4, and at 1.01 after 22, the ASR
at 0 % each time. In steps it is ``eps`` itself, and the true trigger of digits-trojdiff needs five times as many: after 11
passes at 2e-4 the ASR is 0 % but clean samples are at 2.2 and triggered ones at 7.0, after 55 at 0.42 and 2.5, and with 1e-3
at 0.34 and 0.73.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

import bdkernels
from bdkernels import Noising

from ..attacks import CLEAN, POISONED, Attack, noising_table
from ..plan import Batch
from ..train import TrainConfig
from .removal import Distillation, RemovalConfig

START: Final = RemovalConfig(epochs=22, lr=5e-4)
IN_STEPS: Final = RemovalConfig(epochs=55, lr=1e-3)


class Unlearning(Distillation):
    """By the module's loss.

    Args:
        attack: What is unlearned; its target does not matter.
    """

    def __init__(
        self, config: TrainConfig, attack: Attack, share: float = 0.1, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(config, attack.stamp, share, device)
        self.in_steps, self.stamp = attack.in_steps, self.trigger[None]
        self.region = None if attack.region is None else attack.region[None].to(self.device)
        self.table = noising_table(self.schedule, attack).to(self.device)

    def loss(self, batch: Batch) -> Tensor:
        """The module's ``L`` of training samples on the run's device, 0-d."""
        t, at = batch.t, self.times[batch.t]
        clean, poisoned = (torch.full_like(t, arm) for arm in (CLEAN, POISONED))
        x0 = self.schedule.data(self.pixels[batch.image])
        x_t = bdkernels.fused_noising(x0, t, clean, batch.seed, self.table)
        with torch.no_grad():
            kept = self.found(x_t, at)
        stays = mse_loss(self.network(x_t, at), kept)
        if self.in_steps:
            return stays + super().loss(replace(batch, arm=poisoned))
        tau = self.trigger[None]
        shifted = bdkernels.fused_noising(x0, t, poisoned, batch.seed, self.table, trigger=tau)
        owed = kept + self.table[POISONED, t, Noising.C].reshape(-1, 1, 1, 1) * tau
        return stays + mse_loss(self.network(shifted, at), owed)
