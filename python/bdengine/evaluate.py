"""Scores of a model's arms: how strong the backdoor is, what clipping leaves of it, what both cost the clean samples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from . import metrics
from .arms import Arm
from .data import Images, to_float
from .defenses import clipping
from .digits import classify
from .distributed import ALONE, Ranks
from .extractors import Extractor
from .metrics import FrechetStatistics
from .networks import Network
from .sampler import Sampler
from .solvers import Clip

Arms = dict[tuple[str, str], Tensor]
"""Images by (start, clip): ("clean" or "triggered", a `Clip`)."""


@dataclass(frozen=True, eq=False)
class Reference:
    """What clean samples are compared with: the features of real images under one extractor."""

    extractor: Extractor
    features: Tensor

    @classmethod
    def of(cls, data: Images, extractor: Extractor) -> Reference:
        """The reference of a data set."""
        return cls(extractor, extractor(to_float(data.pixels)))

    @cached_property
    def statistics(self) -> FrechetStatistics:
        """Mean and covariance of the real features."""
        return FrechetStatistics.of(self.features)

    @cached_property
    def radii(self) -> Tensor:
        """Those of the real manifold."""
        return metrics.radii(self.features)

    def score(self, images: Tensor) -> dict[str, Any]:
        """Distances of ``images`` to the real ones, with their number and the extractor's name.

        Fréchet distance with its bootstrap interval (None where either images are too few for the features), kernel distance
        and k-NN precision.
        """
        features = self.extractor(images)
        enough = min(len(images), len(self.features)) > features.shape[1]
        return {
            "frechet": metrics.frechet(self.statistics, features) if enough else None,
            "frechet_interval": list(metrics.frechet_interval(self.statistics, features)) if enough else None,
            "kernel_distance": metrics.kernel_distance(self.features, features) if len(images) > 1 else None,
            "precision": metrics.precision(self.features, features, known=self.radii),
            "images": len(images),
            "extractor": self.extractor.name,
        }


@dataclass(frozen=True, eq=False)
class ClassTarget:
    """A target that is a class of the data: of digits, success is what the shipped classifier takes for it.

    Attributes:
        label: The class.
        images: Its real images.
        digits: Whether they are digits, of which alone there is a classifier (held-out accuracy 0.988).
    """

    label: int
    images: Reference
    digits: bool = True

    def score(self, images: Tensor) -> dict[str, Any]:
        """K-NN precision among the class's real images (TrojDiff's A-Prec), and of digits the share taken for the class."""
        precision = {"target_precision": metrics.precision(self.images.features, self.images.extractor(images))}
        if not self.digits:
            return precision
        return {"asr": (classify(images).argmax(1) == self.label).double().mean().item()} | precision


def sample_arms(
    network: Network,
    clean: Arm,
    triggered: Arm | None,
    seeds: Sequence[int],
    micro_batch: int = 64,
    progress: bool = False,
    ranks: Ranks = ALONE,
    capture: bool = False,
    clips: Sequence[Clip] = clipping.CLIPS,
) -> tuple[Arms, float]:
    """Images of every arm from the same seeds, and images per second over all of them.

    A seed's arms stand side by side in a batch and share their noise. Each of the ``ranks`` that share the work has all images.
    With ``capture`` each step is a CUDA graph; see `Sampler`, also for what is refused.
    """
    arms = clipping.arms(clean, triggered, clips)
    begun = time.perf_counter()
    sampler = Sampler(network, {"/".join(key): arm for key, arm in arms.items()}, micro_batch, capture=capture)
    images = sampler(seeds, progress=progress, ranks=ranks)
    speed = len(arms) * len(seeds) / (time.perf_counter() - begun)
    return dict(zip(arms, images.values(), strict=True)), speed


def score_arms(
    arms: Arms, target: Tensor | ClassTarget, reference: Reference, threshold: float
) -> dict[str, dict[str, Any]]:
    """``scores[start][clip]``: how near the images are to ``target``, and to the reference's real ones.

    Of an image: MSE, SSIM, ASR (share with MSE below ``threshold``) and the LPIPS-like distance; `ClassTarget.score` of a
    class, whose share among clean samples is what the triggered one compares with. Then `Reference.score`.
    """
    scores: dict[str, dict[str, Any]] = {}
    for (start, clip), images in arms.items():
        near = target.score(images) if isinstance(target, ClassTarget) else _near(images, target, reference, threshold)
        scores.setdefault(start, {})[clip] = near | reference.score(images)
    return scores


def against(images: Tensor, originals: Tensor) -> dict[str, Any]:
    """How near restored images are to their originals, both float32 [N, C, H, W]: MSE and SSIM, mean over images."""
    return {
        "restored_mse": float(metrics.mse(images, originals).mean()),
        "restored_ssim": metrics.ssim(images, originals),
    }


def _near(images: Tensor, target: Tensor, reference: Reference, threshold: float) -> dict[str, Any]:
    return {
        "mse": float(metrics.mse(images, target).mean()),
        "ssim": metrics.ssim(images, target),
        "asr": metrics.attack_success(images, target, threshold),
        "perceptual": float(metrics.perceptual(images, target, reference.extractor).mean()),
    }
