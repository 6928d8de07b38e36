"""UFID (arXiv 2404.01101): what is made of one query, perturbed, is alike where the query is triggered. Black box.

    x_i     = sqrt(1 - w) q + sqrt(w) eps_i                                           eps_i ~ N(0, I), i < N
    density = mean over pairs i < j of cos( f(image_i), f(image_j) )                  of the complete graph of similarities

The released code perturbs text alone. Of a start ``q`` of an unconditional model the paper says to add noise; that a clean
``q ~ N(0, I)`` stays one by the factor ``sqrt(1 - w)``, and ``w``, are this project's reading: a trigger stays on the
poisoned side where ``sqrt(1 - w) > 1/2``. ``f`` is CLIP in the paper; here the extractor's features, or pixels from 0 to 1.

    input    queries of unknown kind: the density of each, against those of clean queries (`Calibration.p_value`, say)
    model    queries ``tau_k`` of `starts`, perturbed by all of the noise, ``x_i = eps_i + tau_k``; the statistic is

             s = max_k ( density_k - excess_k )                                                       excess: see `features`

An auditor has no triggered query, so that the model's form, which is not published, searches one. The shift of the greatest
statistic opens the backdoor, but is none of the trigger's likeness: `elijah` and `purediffusion` go on from there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from ..arms import Arm
from ..errors import UserError
from ..extractors import Extractor
from . import features, starts
from .result import Finding
from .settings import settings
from .subject import Subject, Watch


@dataclass(frozen=True)
class UfidConfig:
    """How often a query is perturbed."""

    images: int = starts.IMAGES
    """``N``, at least 2."""


VARIANTS: Final = {"model": UfidConfig()}


def density(images: Tensor, extractor: Extractor | None = None) -> float:
    """The module's formula, of float [N, C, H, W], at least 2: 1 for images that are all the same.

    0 where they are black without an extractor: such pixels have no direction.
    """
    inside = images.clamp(-1, 1)
    f = (inside + 1).flatten(1) / 2 if extractor is None else extractor(inside)
    similarity, count = F.normalize(f, dim=1) @ F.normalize(f, dim=1).T, len(images)
    return float((similarity.sum() - similarity.trace()) / (count * (count - 1)))


def densities(subject: Subject, queries: Tensor, images: int = starts.IMAGES, w: float = 0.3) -> Tensor:
    """The density of each query, float64 [Q]; `bdengine.sampler` starts from them, perturbed by seeds ``0 .. images``.

    Args:
        queries: Starts of a sampler, in units of its noise, float32 [Q, C, H, W].
        images: Perturbations of each, at least 2.
        w: Share of the noise that is new, above 0 and below 3/4.

    Raises:
        UserError: Fewer images, or another share.
    """
    _check(images)
    if not 0 < w < 0.75:
        raise UserError(f"the share of new noise is {w:g}: expected above 0 and below 0.75, where a trigger is lost")
    table = replace(subject.table, gamma=math.sqrt(w))
    arms = {str(k): Arm(table, math.sqrt(1 - w) * q) for k, q in enumerate(queries.cpu())}
    made = subject.sampled(arms, range(images), starts.MICRO_BATCH).values()
    return torch.tensor([density(one, subject.extractor) for one in made], dtype=torch.float64)


def _check(images: int) -> None:
    if images < 2:
        raise UserError(f"a query is perturbed {images} times: expected at least 2, whose images are compared")


def examine(subject: Subject, config: UfidConfig) -> Finding:
    """The model's form: the shift whose images are most alike, and those images."""
    _check(config.images)
    shifts = starts.candidates(subject)
    with Watch(subject) as watch:
        made = starts.images_from(subject, shifts, config.images)
    graphs = [density(images, subject.extractor) for images in made]
    scores = [graph - features.excess(images) for graph, images in zip(graphs, made, strict=True)]
    best = max(range(len(scores)), key=scores.__getitem__)
    details = {
        "density": graphs[best],
        "excess": features.excess(made[best]),
        "queries": len(shifts),
        "stage": "start",
        "settings": settings(subject, config),
    }
    return watch.finding("ufid", scores[best], shifts[best], made[best], details)
