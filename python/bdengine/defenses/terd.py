"""TERD (Mo et al., ICML 2024): two noises see the same shift, and their difference does not.

    x_i = sqrt(alpha_bar_t) x0 + s_t gamma e_i + mu
    F(x0, t, mu) = 1/2 sum | (e_1 - eps(x_1)) - (e_2 - eps(x_2)) |^2

    stage 1    F(x0, t in [T - 10, T), mu) - lam |mu|_1                                     x0 ~ N(0, I)
    stage 2    ( F(x0, t in [T - 10, T), mu) + F(x0, t in [0, 10), 0) ) / 2 - lam |mu|_1    x0 = 10 DDIM steps of gamma eps + mu

``F`` is a mean over the batch; the unknown ``c_t R`` of the network's answer cancels in it. The norm is subtracted: it pushes
``mu`` away from the benign solution 0. gamma is 1 but for TrojDiff, where it is learned, a value a pixel, above 0.

    model    k = KL( N(mu, gamma^2) || N(0, 1) ) = -log gamma + (gamma^2 + mu^2 - 1) / 2    M_r = mean k, V_r = var k, of pixels
    input    backdoored where log N(x; mu, gamma^2) > log N(x; 0, 1), with gamma = 1 where x mu > |mu|^2 / 2

With the true ``mu`` the error of the input test is ``Phi(-|mu| / 2)`` on either side. The statistic of the model is ``M_r``:
the published normalisers of ``M_r`` and ``V_r`` are of another family of models, and without them ``M_r >= 0`` always.

An optimal network has ``F`` flat in ``mu`` as long as every ``x_i`` is poisoned, or every one clean, with a wall between: ``F``
drives ``mu`` out of the wall, and the rest is left of the start. On a clean one ``mu`` is the start, which is like a trigger
with a background of -1 (cosine 0.84 to a grey box): compare statistics, not pictures.

Where the paper says nothing: stage 2 keeps the learning rate and the cosine of stage 1, TrojDiff's mu starts from U[0, 1], and
its DDIM has the trigger in every step. So read, stage 2 can lose what stage 1 found: DDIM does not follow a backdoor made for
DDPM. On a UNet with a grey box ``M_r`` was 0.28 after stage 1 and 0.015 after both; on a clean one 0.02 and 0.04.

baddiffusion    both stages, as published
trojdiff        both, with gamma
surrogate       stage 1 alone, not published so
searched        200 iterations of it from where `starts` finds the images most alike; not published

On digits-badiffusion the last ends at ``M_r`` 0.44 with all images at the target, on digits-clean at 0.15: trained, ``F`` is
not flat, and leads back from a shift that no backdoor holds. From the published start they end at 0.08 and 0.07.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from scipy.special import ndtr
from torch import Tensor

import bdkernels
from bdkernels import Step
from bdkernels import noise as contract

from ..arms import Arm
from ..attacks.exact import path_of
from ..chain import Chain
from ..plan import below
from ..schedule import Schedule
from ..solvers import Nodes, Table, ddim
from ..solvers.table import blank
from . import features
from .result import Finding
from .settings import settings
from .starts import start_of
from .subject import Subject, Watch, run_seeds

WINDOW: Final = 10
"""Timesteps at either end of the process that the losses draw from."""
DDIM_STEPS: Final = 10
CONSTANTS: Final = {"window": WINDOW, "ddim_steps": DDIM_STEPS}
"""Of this file, that the statistic depends on."""
STREAMS: Final = (bdkernels.STREAM_INITIAL, bdkernels.STREAM_TRAINING, bdkernels.STREAM_STEP)
"""Of ``x0`` or the noise that it is sampled from, of ``e_1`` and of ``e_2``; the noise contract's step is the iteration."""


@dataclass(frozen=True)
class TerdConfig:
    """Settings of the inversion; see the module."""

    surrogate: int = 3000
    """Iterations of stage 1."""
    refinement: int = 1000
    """Iterations of stage 2."""
    batch: int = 16
    """Of images of any size; published: 16 at 32 pixels, 2 at 256."""
    lr: float = 0.5
    """Of ``mu``; a cosine takes it to 0 in each stage."""
    lam: float | None = None
    """Weight of the norm; 5e-5 up to 32 pixels and 5e-4 above, as published, where absent."""
    clip: float | None = None
    """Largest norm of a gradient in stage 2; 0.2 from 256 pixels and 0.01 below, as published, where absent."""
    start: tuple[float, float] | None = (-1.0, 0.0)
    """Ends of the uniform law that ``mu`` starts from; `starts.searched` where None."""
    gamma_lr: float = 0.0
    """Of gamma, which starts from 0; where 0 gamma is 1."""
    seed: int = 0
    """Of everything drawn."""


VARIANTS: Final = {
    "baddiffusion": TerdConfig(),
    "trojdiff": TerdConfig(start=(0.0, 1.0), gamma_lr=1e-3),
    "surrogate": TerdConfig(refinement=0),
    "searched": TerdConfig(surrogate=200, refinement=0, start=None),
}


class Inversion:
    """``mu`` and ``gamma`` on their way, and the losses that move them.

    Attributes:
        mu: float32 [1, C, H, W].
        gamma: float32 [1, C, H, W]; None where it is 1.
    """

    def __init__(self, subject: Subject, config: TerdConfig) -> None:
        process = subject.preserving("terd")
        device, self.config, self.subject = subject.device, config, subject
        self.T, size = process.T, subject.network.sample_shape[-1]
        self.lam = (5e-5 if size <= 32 else 5e-4) if config.lam is None else config.lam
        self.largest = (0.2 if size >= 256 else 0.01) if config.clip is None else config.clip
        self.mu = start_of(subject, config.start, config.seed).requires_grad_()
        self.gamma = torch.zeros_like(self.mu).requires_grad_() if config.gamma_lr else None
        self.noising = torch.tensor(shifted_rows(process), dtype=torch.float32, device=device)
        self.seeds = run_seeds(config.seed, config.batch, device)
        self.chain = Chain(generating_table(process, self.gamma is not None), device)

    def drawn(self, iteration: int) -> list[Tensor]:
        """What `STREAMS` holds, float32 [B, C, H, W] each."""
        shape = self.subject.network.sample_shape
        return [bdkernels.normal(self.seeds, shape, step=iteration, stream=stream) for stream in STREAMS]

    def times(self, iteration: int) -> tuple[Tensor, Tensor]:
        """Timesteps in the last and in the first `WINDOW`, int64 [B] each."""
        words = contract.words(
            self.config.seed, np.arange(self.config.batch), bdkernels.STREAM_TIMESTEP, step=iteration
        )
        early, late = (below(WINDOW, word) for word in words[:2])
        late = late + self.T - WINDOW
        return torch.from_numpy(late).to(self.mu.device), torch.from_numpy(early).to(self.mu.device)

    def disagreement(self, x0: Tensor, t: Tensor, e: tuple[Tensor, Tensor], shifted: bool = True) -> Tensor:
        """``F(x0, t, mu)``, 0-d; without the shift and its gamma where not ``shifted``."""
        both, twice = torch.cat(e), t.repeat(2)
        noise = both if self.gamma is None or not shifted else self.gamma * both
        arm, seeds = torch.zeros_like(twice), self.seeds.repeat(2)
        x = bdkernels.fused_step(
            x0.repeat(2, 1, 1, 1), noise, self.noising, arm, twice, seeds, trigger=self.mu if shifted else None
        )
        left = both - self.subject.eps(x, twice)
        one, other = left.chunk(2)
        return 0.5 * (one - other).square().sum((1, 2, 3)).mean()

    def generate(self, eps: Tensor) -> Tensor:
        """``x0`` from ``gamma eps + mu``, differentiable in both."""
        if self.gamma is None:
            return self.chain(self.subject.eps, eps + self.mu, self.seeds)[1]
        return self.chain(self.subject.eps, self.gamma * eps + self.mu, self.seeds, self.mu, self.gamma)[1]

    def surrogate_loss(self, iteration: int) -> Tensor:
        """Stage 1's."""
        x0, *e = self.drawn(iteration)
        late, _ = self.times(iteration)
        return self.disagreement(x0, late, (e[0], e[1])) - self.lam * self.mu.abs().sum()

    def refinement_loss(self, iteration: int) -> Tensor:
        """Stage 2's."""
        eps, *e = self.drawn(iteration)
        late, early = self.times(iteration)
        x0 = self.generate(eps)
        ends = self.disagreement(x0, late, (e[0], e[1])) + self.disagreement(x0, early, (e[0], e[1]), shifted=False)
        return ends / 2 - self.lam * self.mu.abs().sum()

    def run(self) -> dict[str, list[float]]:
        """Both stages; the first and last loss of each."""
        config = self.config
        first = self._descend(self.surrogate_loss, range(config.surrogate), 0.0, math.inf)
        numbers = range(config.surrogate, config.surrogate + config.refinement)
        second = self._descend(self.refinement_loss, numbers, 0.9, self.largest)
        return {"surrogate": first, "refinement": second}

    def _descend(
        self, loss: Callable[[int], Tensor], iterations: Sequence[int], momentum: float, largest: float
    ) -> list[float]:
        learned = {self.mu: self.config.lr}
        if self.gamma is not None:
            learned[self.gamma] = self.config.gamma_lr
        groups = [{"params": [tensor], "lr": lr} for tensor, lr in learned.items()]
        optimizer = torch.optim.SGD(groups, momentum=momentum)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(len(iterations), 1))
        seen = []
        for iteration in iterations:
            optimizer.zero_grad()
            value = loss(iteration)
            value.backward()
            if math.isfinite(largest):
                torch.nn.utils.clip_grad_norm_(list(learned), largest)
            optimizer.step()
            cosine.step()
            if self.gamma is not None:
                self.gamma.data.clamp_(min=0)
            seen.append(value.detach())
        return torch.stack([seen[0], seen[-1]]).tolist() if seen else []


def shifted_rows(process: Schedule) -> np.ndarray:
    """``sqrt(alpha_bar_t) x + s_t m + r`` as rows of the fused step, float64 [1, T, STEP_COLUMNS]."""
    rows = blank(np.arange(process.T).tolist())
    rows[:, Step.P], rows[:, Step.S], rows[:, Step.R] = np.sqrt(process.alpha_bar), process.s, 1
    return rows[None]


def generating_table(process: Schedule, trojan: bool) -> Table:
    """DDIM in `DDIM_STEPS`, with TrojDiff's trigger in every step where ``trojan``."""
    table = ddim(Nodes.of(process, DDIM_STEPS))
    return table.shifted(path_of(process, table, process.s)) if trojan else table


def _scale(mu: Tensor, gamma: Tensor | None) -> Tensor:
    """``gamma``, float64 as ``mu``; of 0, whose ``k`` is infinite, the least normal float32."""
    return torch.ones_like(mu) if gamma is None else gamma.double().clamp(min=torch.finfo(torch.float32).tiny)


def divergence(mu: Tensor, gamma: Tensor | None = None) -> tuple[float, float]:
    """``M_r`` and ``V_r`` of the module's ``k``."""
    mu = mu.double()
    sigma = _scale(mu, gamma)
    k = -sigma.log() + (sigma.square() + mu.square() - 1) / 2
    return float(k.mean()), float(k.var(unbiased=False))


def log_ratio(x: Tensor, mu: Tensor, gamma: Tensor | None = None) -> Tensor:
    """``log N(x; mu, gamma^2) - log N(x; 0, 1)``, float64 [N]: an input is taken for a backdoored one where it is above 0.

    Args:
        x: Starts of a sampler, float [N, C, H, W].
        mu: The shift, float [C, H, W].
        gamma: Its noise's scale, of the same shape; 1 where None.
    """
    x, mu = x.double(), mu.double()
    sigma = _scale(mu, gamma)
    return (-sigma.log() - ((x - mu) / sigma).square() / 2 + x.square() / 2).sum((1, 2, 3))


def predicted_errors(mu: Tensor, shift: Tensor) -> tuple[float, float]:
    """Shares that `log_ratio` gets wrong for gamma = 1: clean starts flagged, and starts ``eps + shift`` let pass.

    ``Phi(-|mu| / 2)`` and ``Phi((|mu|^2 / 2 - shift mu) / |mu|)``; with ``mu = shift`` both are ``Phi(-|shift| / 2)``.
    """
    length, along = float(mu.double().norm()), float((shift.double() * mu.double()).sum())
    return float(ndtr(-length / 2)), float(ndtr((length**2 / 2 - along) / length))


def examine(subject: Subject, config: TerdConfig) -> Finding:
    """Both stages, the statistic, and what is made of ``eps + mu``."""
    with Watch(subject) as watch:
        inversion = Inversion(subject, config)
        losses = inversion.run()
        mu, gamma = inversion.mu.detach()[0], None if inversion.gamma is None else inversion.gamma.detach()[0]
        if gamma is None:
            images = subject.images(Arm(subject.table, mu.cpu()), features.IMAGES)
        else:
            with torch.no_grad():
                images = inversion.generate(inversion.drawn(0)[0])
    mean, variance = divergence(mu, gamma)
    details = {
        "M_r": mean,
        "V_r": variance,
        "uniformity": features.uniformity(images, subject.extractor),
        "trigger_norm": float(mu.norm()),
        "gamma": None if gamma is None else float(gamma.mean()),
        "losses": losses,
        "settings": settings(subject, config, **CONSTANTS),
    }
    found = watch.finding("terd", mean, mu, images, details)
    return found if gamma is None else replace(found, gamma=gamma.cpu())
