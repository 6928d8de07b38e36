"""Inference-time clipping, the defense of the BadDiffusion paper (Chou et al. 2023, section 5).

    latent    x' = clamp(x', -1, 1) at every step: what the paper describes
    x0        x0 = clamp(x0, -1, 1) at every step: what its released code, and most samplers' ``clip_sample``, does

The triggered start ``eps + r`` leaves [-1, 1]; clamping the latent destroys the shift. Both are columns of a sampler's
table (`Table.clipped`), so they cost nothing and apply to any sampler. Clipping detects nothing: `examine` says what it costs
clean samples, ``mean |u(clipped) - u(x)|^2`` over samples of equal noise, with `bdengine.metrics.mse`'s ``u``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from .. import metrics
from ..arms import Arm
from ..solvers import Clip
from . import features
from .result import Finding
from .settings import settings
from .subject import Subject, Watch

CLIPS: Final[tuple[Clip, ...]] = ("none", "latent", "x0")


def arms(clean: Arm, triggered: Arm | None, clips: Sequence[Clip] = CLIPS) -> dict[tuple[str, str], Arm]:
    """Every (start, clip) arm: clean and, where given, triggered; under each of the ``clips``."""
    starts = {"clean": clean} | ({} if triggered is None else {"triggered": triggered})
    return {(start, clip): arm.clipped(clip) for start, arm in starts.items() for clip in clips}


@dataclass(frozen=True)
class ClippingConfig:
    """Which clip."""

    clip: Clip = "latent"
    """See the module."""


VARIANTS: Final = {"latent": ClippingConfig(), "x0": ClippingConfig("x0")}


def examine(subject: Subject, config: ClippingConfig) -> Finding:
    """Clean samples as the clip makes them, and how far it moves them: a cost, no evidence.

    Raises:
        UserError: A variance exploding model, whose states do not lie in [-1, 1].
    """
    subject.preserving("clipping")
    arm = Arm(subject.table)
    with Watch(subject) as watch:
        plain, clipped = (subject.images(one, features.IMAGES) for one in (arm, arm.clipped(config.clip)))
    cost = float(metrics.mse(clipped, plain.clamp(-1, 1)).mean())
    details = {"reason": "clipping detects nothing: it is for sampling", "settings": settings(subject, config)}
    return watch.finding("clipping", cost, None, clipped, details)
