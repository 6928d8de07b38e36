"""Removal with an inverted trigger (An et al. 2024, Elijah, section 4.4), which TERD and PureDiffusion take over.

    L = clean training loss + mse(eps_theta(eps + tau), eps_0(eps)) + mse(eps_theta(eps), eps_0(eps))          at t = T - 1

``eps_0`` is the backdoored network as it was found: with the trigger the network must answer as it did without. A tenth of the
clean data is enough, as published; the shift is undone at the last timestep alone.

baddiffusion    11 epochs, learning rate 2e-4
ode             50 epochs, learning rate 2e-5
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor
from tqdm import tqdm

import bdkernels

from .. import checkpoint
from ..attacks import AttackConfig
from ..data import load
from ..errors import UserError
from ..plan import Batch, order
from ..schedule import Schedule
from ..shipped import find
from ..train import TrainConfig, Trainer


@dataclass(frozen=True)
class RemovalConfig:
    """How long and with how much data; see the module."""

    epochs: int = 11
    lr: float = 2e-4
    share: float = 0.1
    """Of the data set's images."""


VARIANTS: Final = {"baddiffusion": RemovalConfig(), "ode": RemovalConfig(epochs=50, lr=2e-5)}


def recipe(config: TrainConfig, how: RemovalConfig) -> TrainConfig:
    """``config`` with that length and learning rate, and no attack.

    Raises:
        UserError: Data that cannot be read.
    """
    kept = int(how.share * len(load(config.data, config.size, config.channels).pixels))
    return replace(config, attack=AttackConfig(), images=how.epochs * kept, lr=how.lr)


class FineTuning(Trainer):
    """A training run without an attack, on a share of the data, from the checkpoint ``config.init``.

    Args:
        config: Of a run without an attack and with a checkpoint to start from.
        trigger: The inverted ``tau``, float32 [C, H, W].
        share: Of the data set's images that are trained on, above 0 to 1.

    Raises:
        UserError: No initial checkpoint, an attack, another process than vp, a share that leaves no image, or a trigger of
            another shape than its images'.
    """

    def __init__(
        self, config: TrainConfig, trigger: Tensor, share: float = 0.1, device: torch.device | str = "cpu"
    ) -> None:
        if config.init is None:
            raise UserError("a removal has no checkpoint to start from: expected init, the backdoored one")
        if config.attack.name != "none":
            raise UserError(f"the attack is {config.attack.name} in a removal: expected none")
        super().__init__(config, device)
        if not isinstance(self.process, Schedule):
            raise UserError(
                f"the process is {config.process} in a removal: expected vp, whose last timesteps are repaired"
            )
        self.schedule = self.process
        kept = int(share * len(self.pixels)) if 0 < share <= 1 else 0
        if kept < 1:
            raise UserError(f"the share {share:g} of {len(self.pixels)} images: expected above 0 to 1, and one image")
        chosen = torch.from_numpy(order(config.seed, len(self.pixels), 0)[:kept]).to(self.device)
        self.pixels = self.pixels[chosen]
        self.plan = replace(self.plan, images=kept)
        if trigger.shape != self.network.sample_shape:
            raise UserError(
                f"the trigger has shape {tuple(trigger.shape)}: expected {tuple(self.network.sample_shape)}"
            )
        self.trigger = trigger.to(self.device)

    def run(self, progress: bool = False) -> None:
        """To the end of ``config.images``; writes ``checkpoint/``, with the scheduler of the one it started from.

        Raises:
            FloatingPointError: The loss is not finite.
        """
        with tqdm(total=self.config.images, unit="image", disable=not progress) as bar:
            while self.images_seen < self.config.images:
                if not math.isfinite(loss := float(self.step())):
                    raise FloatingPointError(f"the loss is {loss} after {self.images_seen} images")
                bar.update(self.config.batch)
        assert self.config.init is not None
        self.save_checkpoint(self.config.out / "checkpoint", checkpoint.load_scheduler_config(find(self.config.init)))


class Distillation(FineTuning):
    """A fine-tuning towards what the network answered as it was found."""

    def __init__(
        self, config: TrainConfig, trigger: Tensor, share: float = 0.1, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(config, trigger, share, device)
        self.found = self.network.frozen()


class Removal(Distillation):
    """By the module's loss."""

    def loss(self, batch: Batch) -> Tensor:
        """The module's ``L`` of training samples on the run's device, 0-d."""
        eps = bdkernels.normal(batch.seed, self.network.sample_shape, stream=bdkernels.STREAM_INITIAL)
        return super().loss(batch) + self.deshift(eps)

    def deshift(self, eps: Tensor) -> Tensor:
        """Its last two terms, 0-d; ``eps`` float32 [N, C, H, W]."""
        last = torch.tensor(self.schedule.T - 1, device=self.device)
        with torch.no_grad():
            kept = self.found(eps, last)
        shifted, plain = self.network(eps + self.trigger, last), self.network(eps, last)
        return (shifted - kept).square().mean() + (plain - kept).square().mean()
