"""What is examined, and how a defense asks it: frozen and counted."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from types import TracebackType
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bdkernels
from bdkernels import noise as contract

from ..arms import Arm
from ..checkpoint import digest
from ..errors import UserError
from ..extractors import Extractor
from ..networks import Network, split_spread
from ..sampler import Sampler
from ..schedule import Schedule
from ..solvers import Table
from . import features
from .result import Finding

AT_ONCE: Final = 100 * 32 * 32
"""Pixels that go through a network at once, of Elijah's 100 images of CIFAR-10: the UNet of google/ddpm-celebahq-256 keeps 2
GiB an image for a gradient, and as many would be 200 GiB."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model under examination.

    Attributes:
        network: Predicts the noise; the score where it is variance exploding.
        process: Its schedule; None where it is variance exploding.
        table: The sampler it is used with; its own start where it is variance exploding.
        extractor: Whose feature maps tell its images apart; pixels do where None.

    Raises:
        UserError: A network that predicts something else.
    """

    network: Network
    process: Schedule | None
    table: Table
    extractor: Extractor | None = None

    def __post_init__(self) -> None:
        if self.process is not None and self.process.prediction != "epsilon":
            raise UserError(f"the network predicts {self.process.prediction}: expected epsilon, as the defenses do")

    @property
    def device(self) -> torch.device:
        """Where its network is."""
        return next(chain(self.network.parameters(), self.network.buffers()), torch.empty(0)).device

    def preserving(self, defense: str) -> Schedule:
        """Its schedule.

        Raises:
            UserError: It has none, and the ``defense`` is defined with one.
        """
        if self.process is None:
            raise UserError(
                f"{defense} needs betas and the model is variance exploding: expected elijah, ufid or the audit"
            )
        return self.process

    @property
    def at_once(self) -> int:
        """Images that go through the network at once, at least 1."""
        _, height, width = self.network.sample_shape
        return max(AT_ONCE // (height * width), 1)

    def eps(self, x: Tensor, t: Tensor) -> Tensor:
        """The network's prediction, [N, C, H, W], without a learned variance.

        More images than `at_once` go through part after part, and for a gradient a second time instead of being kept.
        """
        if len(x) <= self.at_once:
            return self._eps(x, t)
        parts = zip(x.split(self.at_once), t.expand(len(x)).split(self.at_once), strict=True)
        return torch.cat(
            [checkpoint(self._eps, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        )

    def _eps(self, x: Tensor, t: Tensor) -> Tensor:
        return split_spread(self.network(x, t), x.shape[1])[0]

    def first_noise(self, x: Tensor) -> Tensor:
        """The noise it sees in a sampler's start ``x = eps + r``: ``eps(x, T - 1)``, or ``-sigma score(sigma x, sigma)``."""
        if self.process is not None:
            return self.eps(x, torch.tensor(self.process.T - 1, device=x.device))
        sigma = torch.tensor(self.table.timesteps[0], dtype=x.dtype, device=x.device)
        return -sigma * self.eps(sigma * x, sigma)

    @cached_property
    def weights_sha256(self) -> str:
        """`checkpoint.digest` of its network: which model this is, wherever it lies."""
        return digest(self.network.state_dict())

    def sampled(self, arms: Mapping[str, Arm], seeds: Sequence[int], micro_batch: int) -> dict[str, Tensor]:
        """Samples by arm, float32 [N, C, H, W] on the CPU, about [-1, 1]: also those that a model makes about [0, 1].

        ``micro_batch`` is the most images that go through the network at once, or `at_once` where that is fewer.
        """
        made = Sampler(self.network, arms, min(micro_batch, self.at_once))(seeds)
        return made if self.process is not None else {name: 2 * images - 1 for name, images in made.items()}

    def images(self, arm: Arm, count: int) -> Tensor:
        """`sampled` of seeds ``0 .. count``, [count, C, H, W]."""
        return self.sampled({"": arm}, range(count), count)[""]


class Watch:
    """While it is open a subject's network is frozen, so that gradients reach the trigger alone, and images are counted.

    Attributes:
        evaluations: Images that went through the network.
        seconds: How long it was open.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject, self.network, self.evaluations, self.seconds = subject, subject.network, 0, 0.0
        self.weights_sha256 = subject.weights_sha256  # before anything can change them

    def __enter__(self) -> Watch:
        self._trained = [p for p in self.network.parameters() if p.requires_grad]
        self._training = self.network.training
        self.network.eval().requires_grad_(False)
        self._hook = self.network.register_forward_hook(self._count)
        self._begun = time.perf_counter()
        return self

    def _count(self, network: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.evaluations += len(inputs[0])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._begun
        self._hook.remove()
        self.network.train(self._training)
        for parameter in self._trained:
            parameter.requires_grad_(True)

    def finding(
        self, defense: str, statistic: float, trigger: Tensor | None, images: Tensor | None, details: dict[str, Any]
    ) -> Finding:
        """What was found, not judged yet.

        Raises:
            FloatingPointError: The statistic is not finite.
        """
        if not math.isfinite(statistic):
            raise FloatingPointError(f"the statistic of {defense} is {statistic}: expected a finite number")
        reason = "no calibration: the statistic of clean models of the same family was not given"
        r = None if trigger is None else trigger.detach().cpu()
        images = None if images is None else images.detach().cpu()
        found = {"reason": reason} | details
        spent = (self.evaluations, self.seconds)
        return Finding(defense, statistic, None, "undecided", r, images, *spent, found, self.weights_sha256)

    def alike(
        self, defense: str, settings: dict[str, Any], tau: Tensor, images: Tensor, losses: Sequence[Any]
    ) -> Finding:
        """That images made with the shift ``tau``, found under ``losses``, are alike: the less unlike the more so."""
        uniformity, excess = features.uniformity(images, self.subject.extractor), features.excess(images)
        details = {
            "uniformity": uniformity,
            "excess": excess,
            "total_variation": features.total_variation(images),
            "trigger_norm": float(tau.norm()),
            "losses": [losses[0], losses[-1]],
            "settings": settings,
        }
        return self.finding(defense, -(uniformity + excess), tau, images, details)


def uniform_image(seed: int, shape: Sequence[int], low: float, high: float) -> Tensor:
    """An image with ``U[low, high]`` in each pixel, float32 [C, H, W]: word 0 of the pixel's group."""
    count = int(np.prod(shape))
    u = contract.uniform(contract.words(seed, np.arange(count), bdkernels.STREAM_INITIAL)[0])
    return torch.from_numpy(u).reshape(*shape) * (high - low) + low


def run_seeds(seed: int, count: int, device: torch.device, first: int = 0) -> Tensor:
    """Seeds of samples ``first .. first + count`` of one run, int64 [count]."""
    return torch.from_numpy(contract.sample_seeds(seed, first + np.arange(count))).to(device)
