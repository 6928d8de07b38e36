"""Inference-time clipping, the defense of the BadDiffusion paper (Chou et al. 2023, section 5).

    latent    x' = clamp(x', -1, 1) at every step: what the paper describes
    x0        x0 = clamp(x0, -1, 1) at every step: what its released code, and most samplers' ``clip_sample``, does

The triggered start ``eps + r`` leaves [-1, 1]; clamping the latent destroys the shift. Both are columns of a sampler's
table (`Table.clipped`), so they cost nothing and apply to any sampler.
"""

from __future__ import annotations

from typing import Final

from ..arms import Arm
from ..solvers import Clip

DEFENSES: Final[tuple[Clip, ...]] = ("none", "latent", "x0")


def arms(clean: Arm, triggered: Arm | None) -> dict[tuple[str, str], Arm]:
    """Every (start, clip) arm: clean and, where given, triggered; unclipped, latent- and x0-clipped."""
    starts = {"clean": clean} | ({} if triggered is None else {"triggered": triggered})
    return {(start, clip): arm.clipped(clip) for start, arm in starts.items() for clip in DEFENSES}
