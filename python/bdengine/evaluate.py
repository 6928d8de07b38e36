"""Scores of a model's arms: how strong the backdoor is, what clipping leaves of it, what both cost the clean samples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import metrics
from .data import Images, to_float
from .defenses import clipping
from .extractors import Extractor
from .metrics import FrechetStatistics
from .networks import Network
from .sampler import Sampler
from .solvers import Table

Arms = dict[tuple[str, str], Tensor]
"""Images by (start, clip): ("clean" or "triggered", "none", "latent" or "x0")."""


@dataclass(frozen=True, eq=False)
class Reference:
    """What clean samples are compared with: the features of real images under one extractor."""

    extractor: Extractor
    statistics: FrechetStatistics

    @classmethod
    def of(cls, data: Images, extractor: Extractor) -> Reference:
        """The reference of a data set."""
        return cls(extractor, FrechetStatistics.of(extractor(to_float(data.pixels))))

    def score(self, images: Tensor) -> dict[str, Any]:
        """Fréchet distance of ``images`` with its bootstrap interval, number of images and extractor.

        Both are None where the images are too few for the extractor's features.
        """
        features = self.extractor(images)
        enough = len(images) > features.shape[1]
        return {
            "frechet": metrics.frechet(self.statistics, features) if enough else None,
            "frechet_interval": list(metrics.frechet_interval(self.statistics, features)) if enough else None,
            "images": len(images),
            "extractor": self.extractor.name,
        }


def sample_arms(
    network: Network,
    table: Table,
    trigger: Tensor | None,
    clean: Sequence[int],
    triggered: Sequence[int],
    micro_batch: int = 64,
    progress: bool = False,
) -> tuple[Arms, float]:
    """Images of every arm from seeds of its own length, and images per second over all of them.

    Arms of equal seeds share their batches and, sample by sample, their noise.
    """
    every = clipping.arms(table, trigger)
    begun = time.perf_counter()
    out: Arms = {}
    for start, seeds in (("clean", clean), ("triggered", triggered)):
        chosen = {"/".join(key): arm for key, arm in every.items() if key[0] == start}
        if chosen:
            images = Sampler(network, chosen, micro_batch)(seeds, progress=progress)
            out |= {(start, name.split("/")[1]): image for name, image in images.items()}
    return out, sum(len(images) for images in out.values()) / (time.perf_counter() - begun)


def score_arms(arms: Arms, target: Tensor, reference: Reference, threshold: float) -> dict[str, dict[str, Any]]:
    """``scores[start][clip]``: MSE, SSIM and ASR (share with MSE below ``threshold``) to ``target``, Fréchet distance."""
    scores: dict[str, dict[str, Any]] = {}
    for (start, clip), images in arms.items():
        scores.setdefault(start, {})[clip] = {
            "mse": float(metrics.mse(images, target).mean()),
            "ssim": metrics.ssim(images, target),
            "asr": metrics.attack_success(images, target, threshold),
        } | reference.score(images)
    return scores
