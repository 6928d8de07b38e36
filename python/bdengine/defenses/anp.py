"""Adversarial neuron pruning (Wu and Wang 2021) as BadDiffusion (Chou et al. 2023) turns it on a diffusion model.

    w' = (1 + delta) w        b' = (1 + xi) b                     a delta and a xi for each output channel of a convolution
    maximise  mean | eps_theta'(x_t, t) - eps |^2    over  |delta|, |xi| <= budget           x_t from clean images, t uniform

A backdoored network is said to give way sooner, and BadDiffusion's authors look for samples that collapse to the target. Their
rule is a person's eye or the distance to the true target, which an auditor does not have. Here the statistic is how far the
same number of steps takes the loss, and the clean images are the model's own samples:

    s = log( mean loss of the last tenth of the steps / mean loss of the unperturbed network on their batches )

The samples of the perturbed network are kept for the eye. On digits-badiffusion they run out of [-1, 1] as those of clean
models do, and none comes near the target.

BadDiffusion's released code has ``g w + b`` with ``g, b`` clamped to ``[-budget, budget]``, not to ``1 +- budget`` and not
relative; here the method's own form stands. With the published learning rate no channel comes near the published budget of 4:
1e-4 in each of 4,690 steps of Adam is 0.47.

quick           as far in 100 steps: a learning rate of 5e-3, batches of 32
baddiffusion    4,690 steps (10 epochs of 60,000 images) at 1e-4, batches of 128
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

import bdkernels
from bdkernels import noise as contract

from ..arms import Arm
from ..errors import UserError
from ..networks import split_spread
from ..plan import below
from . import features
from .result import Finding
from .settings import settings
from .subject import Subject, Watch, run_seeds


@dataclass(frozen=True)
class AnpConfig:
    """Settings of the perturbation; see the module."""

    steps: int = 100
    """Of Adam."""
    lr: float = 5e-3
    """Of Adam."""
    batch: int = 32
    """Noisy images of a step."""
    budget: float = 4.0
    """Largest ``delta`` and ``xi``."""
    clip: float = 1.0
    """Largest norm of a step's gradient."""
    images: int = 256
    """The model's own samples that stand for clean images."""
    seed: int = 0
    """Of the images, the noise and the timesteps."""


VARIANTS: Final = {"quick": AnpConfig(), "baddiffusion": AnpConfig(4690, 1e-4, 128)}


class Perturbation:
    """``delta`` and ``xi`` of every convolution of a network, and the loss that they are to raise.

    Args:
        clean: Images that stand for training data, float32 [N, C, H, W].

    Attributes:
        found: The convolutions' weights and biases by name.
        scale: ``delta`` and ``xi`` by parameter, float32 [out] each, from 0.

    Raises:
        UserError: A network without convolutions, or of a variance exploding model.
    """

    def __init__(self, subject: Subject, clean: Tensor, config: AnpConfig) -> None:
        self.subject, self.config, self.process = subject, config, subject.preserving("anp")
        self.clean = clean.to(subject.device)
        self.found: dict[str, Tensor] = {}
        for name, module in subject.network.named_modules():
            if isinstance(module, nn.Conv2d):
                self.found |= {f"{name}.{part}": p.detach().clone() for part, p in module.named_parameters()}
        if not self.found:
            raise UserError("the network has no convolutions: expected some, whose channels are perturbed")
        self.scale = {
            name: torch.zeros_like(p.flatten(1)[:, 0] if p.dim() > 1 else p) for name, p in self.found.items()
        }
        for scale in self.scale.values():
            scale.requires_grad_()
        levels = np.stack([np.sqrt(self.process.alpha_bar), self.process.s])
        self.levels = torch.tensor(levels, dtype=torch.float32, device=subject.device)

    def perturbed(self) -> dict[str, Tensor]:
        """``w'`` and ``b'`` by name, differentiable in their scales."""
        return {name: p * (1 + self.scale[name].reshape(-1, *[1] * (p.dim() - 1))) for name, p in self.found.items()}

    def loss(self, step: int, parameters: Mapping[str, Tensor]) -> Tensor:
        """The module's objective of one batch, 0-d, with these in the network's place."""
        count, subject = self.config.batch, self.subject
        seeds = run_seeds(self.config.seed, count, subject.device, step * count)
        words = contract.words(self.config.seed, np.arange(count), bdkernels.STREAM_TIMESTEP, step=step)
        t, chosen = (
            torch.from_numpy(below(end, word))
            for end, word in zip((self.process.T, len(self.clean)), words[:2], strict=True)
        )
        t, x0 = t.to(subject.device), self.clean[chosen.to(subject.device)]
        eps = bdkernels.normal(seeds, x0.shape[1:], stream=bdkernels.STREAM_TRAINING)
        a, s = self.levels[:, t].reshape(2, -1, 1, 1, 1)
        out = functional_call(subject.network, dict(parameters), (a * x0 + s * eps, t))
        return (split_spread(out, x0.shape[1])[0] - eps).square().mean()

    def rise(self) -> float:
        """All steps up; the module's ``s``."""
        config, tail = self.config, max(self.config.steps // 10, 1)
        optimizer, losses = torch.optim.Adam(self.scale.values(), lr=config.lr), []
        for step in range(config.steps):
            optimizer.zero_grad()
            loss = self.loss(step, self.perturbed())
            (-loss).backward()
            nn.utils.clip_grad_norm_(self.scale.values(), config.clip)
            optimizer.step()
            for scale in self.scale.values():
                scale.data.clamp_(-config.budget, config.budget)
            losses.append(loss.detach())
        raised = torch.stack(losses[-tail:]).mean()
        with torch.no_grad():
            before = [self.loss(step, self.found) for step in range(config.steps - tail, config.steps)]
        return math.log(float(raised / torch.stack(before).mean()))

    @torch.no_grad()
    def write(self) -> None:
        """Into the network's own parameters."""
        for name, p in self.perturbed().items():
            self.subject.network.get_parameter(name).copy_(p)


def examine(subject: Subject, config: AnpConfig) -> Finding:
    """Perturb a copy of the network; how far its loss rose, and its samples from noise alone."""
    subject = replace(subject, network=copy.deepcopy(subject.network))
    arm = Arm(subject.table)
    with Watch(subject) as watch:
        perturbation = Perturbation(subject, subject.images(arm, config.images).clamp(-1, 1), config)
        statistic = perturbation.rise()
        perturbation.write()
        images = subject.images(arm, features.IMAGES)
    details = {
        "uniformity": features.uniformity(images, subject.extractor),
        "excess": features.excess(images),
        "largest": max(float(scale.detach().abs().max()) for scale in perturbation.scale.values()),
        "settings": settings(subject, config),
    }
    return watch.finding("anp", statistic, None, images, details)
