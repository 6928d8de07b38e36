"""What is measured on images: effect of an attack (MSE, success, SSIM, perceptual) and utility (Fréchet, kernel, k-NN).

Images are float [N,C,H,W] in [-1,1], a target is one such image [C,H,W] or one per image [N,C,H,W]. Effect metrics read
an image as the PNG that would be saved: clamped to [-1,1], then mapped to [0,1]. Utility metrics compare features
float [N,D], which an :class:`Extractor` makes of images; such a score without its extractor and its number of images
means nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bdengine.errors import UserError
from bdengine.extractors import (
    CHUNK,
    DigitFeatures,
    Extractor,
    InceptionFeatures,
    check_finite,
    check_images,
    to_unit,
)

__all__ = [
    "DigitFeatures",
    "Extractor",
    "FrechetStatistics",
    "InceptionFeatures",
    "attack_success",
    "check_threshold",
    "frechet",
    "frechet_interval",
    "kernel_distance",
    "mse",
    "perceptual",
    "precision",
    "radii",
    "recall",
    "ssim",
]

SSIM_WINDOW = 11
"""Side of the Gaussian window of SSIM (sigma 1.5)."""


def mse(images: Tensor, target: Tensor) -> Tensor:
    """``mean over C,H,W of (u(x) - u(y))^2`` per image, ``u(x) = clamp(x, -1, 1) / 2 + 1/2``.

    Returns:
        float32 [N] in [0,1]; 0 is the target itself.

    Raises:
        UserError: No images, shapes that do not match, integers, NaN, or a target outside [-1,1].
    """
    x, y = _pair(images, target)
    return (to_unit(x) - to_unit(y)).square().mean((1, 2, 3))


def attack_success(images: Tensor, target: Tensor, threshold: float) -> float:
    """The share of images whose :func:`mse` is below ``threshold``: the attack success rate for a fixed target.

    Args:
        images: float [N,C,H,W].
        target: float [C,H,W] or [N,C,H,W].
        threshold: In (0,1]; published ones are 0.1 (VillanDiffusion), 0.05 and 0.01 (Elijah).

    Raises:
        UserError: As :func:`mse`, or a threshold outside (0,1].
    """
    check_threshold(threshold)
    return (mse(images, target) < threshold).double().mean().item()


def check_threshold(threshold: float) -> None:
    """Refuse a threshold of :func:`attack_success` outside (0,1].

    Raises:
        UserError: As said.
    """
    if not 0 < threshold <= 1:
        raise UserError(
            f"a success threshold of {threshold}: expected an MSE in (0,1]; published ones are 0.1, 0.05 and 0.01"
        )


def ssim(images: Tensor, target: Tensor) -> float:
    """Structural similarity with the target, mean over images (Wang et al. 2004, eq. 13, window 11, sigma 1.5).

    Returns:
        In [-1,1]; 1 is the target itself.

    Raises:
        UserError: As :func:`mse`, or images smaller than the window.
    """
    x, y = _pair(images, target)
    if min(x.shape[2:]) < SSIM_WINDOW:
        raise UserError(
            f"SSIM of {x.shape[2]}x{x.shape[3]} pixels: expected at least {SSIM_WINDOW}x{SSIM_WINDOW}, or use mse"
        )
    each = [_ssim_each(to_unit(part), to_unit(goal).expand_as(part)) for part, goal in _chunks(x, y)]
    return torch.cat(each).mean().item()


def perceptual(images: Tensor, target: Tensor, extractor: Extractor) -> Tensor:
    """A distance like LPIPS, not LPIPS: the same formula without weights calibrated on human judgement.

    ``mean over layers and positions of |f / |f| - g / |g||^2`` with ``f, g`` the channels of the feature maps of image
    and target (Zhang et al. 2018, eq. 1 with all weights 1).

    Returns:
        float32 [N] in [0,4], in [0,2] for features >= 0; 0 is the target itself.

    Raises:
        UserError: As :func:`mse`.
    """
    x, y = _pair(images, target)
    distances = []
    for part, goal in _chunks(x, y):
        layers = zip(extractor.maps(part.clamp(-1, 1)), extractor.maps(goal), strict=True)
        each = [(F.normalize(f) - F.normalize(g)).square().sum(1).mean((1, 2)) for f, g in layers]
        distances.append(torch.stack(each).mean(0))
    return torch.cat(distances)


@dataclass(frozen=True)
class FrechetStatistics:
    """Mean and covariance of features, without the features: ``a + b`` are the statistics of both sets together.

    Attributes:
        n: Feature rows seen.
        total: float64 [D], their sum.
        outer: float64 [D,D], the sum of their outer products.
    """

    n: int
    total: Tensor
    outer: Tensor

    @classmethod
    def of(cls, features: Tensor) -> FrechetStatistics:
        """The statistics of features float [N,D].

        Raises:
            UserError: No rows, a shape other than [N,D], or NaN.
        """
        rows = _features(features)
        return cls(len(rows), rows.sum(0), rows.T @ rows)

    def __add__(self, other: FrechetStatistics) -> FrechetStatistics:
        """Raises a UserError when the numbers of features differ."""
        _same_width(len(self.total), len(other.total))
        return FrechetStatistics(self.n + other.n, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> Tensor:
        """float64 [D]."""
        return self.total / self.n

    @property
    def covariance(self) -> Tensor:
        """float64 [D,D], unbiased (over n - 1).

        Raises:
            UserError: Fewer rows than D + 1, so that it would be singular.
        """
        if self.n <= len(self.total):
            raise UserError(
                f"{self.n} images for {len(self.total)} features: a Fréchet distance needs at least "
                f"{len(self.total) + 1} images, or an extractor of at most {self.n - 1} features"
            )
        return (self.outer - self.n * self.mean.outer(self.mean)) / (self.n - 1)

    @cached_property
    def root(self) -> Tensor:
        """Some float64 [D,D] ``L`` with ``L L^T`` the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors * values.clamp(min=0).sqrt()


def frechet(real: Tensor | FrechetStatistics, fake: Tensor | FrechetStatistics) -> float:
    """``|mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))`` (Dowson & Landau 1982; FID: Heusel et al. 2017, eq. 6).

    With ``S = L L^T`` the last trace is the sum of the singular values of ``L_1^T L_2``. It is biased
    upward by a term in 1/n: compare scores of equal n and equal extractor.

    Args:
        real: Features float [N,D] or their statistics.
        fake: Features float [M,D] or their statistics.

    Returns:
        >= 0, in float64.

    Raises:
        UserError: No rows, different D, NaN, or fewer than D + 1 rows.
    """
    a, b = (x if isinstance(x, FrechetStatistics) else FrechetStatistics.of(x) for x in (real, fake))
    _same_width(len(a.total), len(b.total))
    # Square roots of the eigenvalues of S_1 S_2 lose half of the digits where features are dependent: two equal sets of
    # rank 5 in 32 dimensions come out 8e-6 apart with torchmetrics, 7e-6 with scipy's sqrtm, 6e-14 this way.
    overlap = torch.linalg.matrix_norm(a.root.T @ b.root, ord="nuc")
    distance = (a.mean - b.mean).square().sum() + a.root.square().sum() + b.root.square().sum() - 2 * overlap
    return max(0.0, distance.item())


def frechet_interval(
    real: Tensor | FrechetStatistics, fake: Tensor, *, resamples: int = 200, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Bootstrap interval of :func:`frechet` over the draw of the fake images, at their number and for this real set.

    ``d + quantiles of (d* - mean d*)``, with ``d*`` the distances of fake features drawn again with replacement. The
    resamples' own mean is taken off because they carry the bias twice, which would push the interval above ``d``.
    It held the score expected at its n in 93 to 100 % of trials (4 and 32 features, 200 to 2,000 images). The distance
    of the laws lies the bias below that, mostly outside.

    Args:
        real: Features float [N,D] or their statistics.
        fake: Features float [M,D].
        resamples: Distances drawn; each is a decomposition of [D,D].
        seed: Of the resampling.
        level: Coverage in (0,1).

    Returns:
        (low, high), low >= 0.

    Raises:
        UserError: As :func:`frechet`, or ``resamples`` below 2, or ``level`` outside (0,1).
    """
    if resamples < 2:
        raise UserError(f"{resamples} bootstrap resamples: expected at least 2; the usual number is 200")
    if not 0 < level < 1:
        raise UserError(f"a confidence level of {level}: expected a share in (0,1); the usual one is 0.95")
    known = real if isinstance(real, FrechetStatistics) else FrechetStatistics.of(real)
    rows = _features(fake)
    distance = frechet(known, rows)
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(len(rows), (len(rows),), generator=generator) for _ in range(resamples))
    again = torch.tensor([frechet(known, rows[draw.to(rows.device)]) for draw in draws], dtype=torch.float64)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = (distance + torch.quantile(again - again.mean(), tails)).clamp(min=0).tolist()
    return low, high


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """Unbiased squared MMD under ``k(x, y) = (x.y / D + 1)^3``, or KID (Bińkowski et al. 2018, sec. 4), on whole sets.

    ``mean over i != j of k(x_i, x_j) + mean over i != j of k(y_i, y_j) - 2 mean of k(x_i, y_j)``.

    Args:
        real: Features float [N,D].
        fake: Features float [M,D].

    Returns:
        About 0 for equal laws, on either side of it.

    Raises:
        UserError: Fewer than 2 rows, different D, or NaN.
    """
    x, y = _features(real, least=2), _features(fake, least=2)
    _same_width(x.shape[1], y.shape[1])
    return _kernel_within(x) + _kernel_within(y) - 2 * _kernel_sum(x, y) / (len(x) * len(y))


def radii(real: Tensor, k: int = 3) -> Tensor:
    """The manifold of real features: each one's distance to its own k-th nearest neighbour, float64 [N].

    Args:
        real: Features float [N,D].
        k: Neighbours, at least 1.

    Raises:
        UserError: Fewer than k + 1 rows, NaN, or ``k`` below 1.
    """
    if k < 1:
        raise UserError(f"k = {k} nearest neighbours: expected at least 1; the usual number is 3")
    centres = _features(real, least=k + 1)
    # The nearest of all is the point itself, at distance 0.
    return torch.cat([_distances(part, centres).kthvalue(k + 1).values for part in centres.split(CHUNK)])


def precision(real: Tensor, fake: Tensor, k: int = 3, known: Tensor | None = None) -> float:
    """Fidelity: the share of fake features inside the real manifold (Kynkäänniemi et al. 2019, eq. 1-2).

    A point is inside when some real feature is at least as near to it as to its own k-th nearest real neighbour.

    Args:
        real: Features float [N,D].
        fake: Features float [M,D].
        k: Neighbours, at least 1.
        known: :func:`radii` of ``real`` with that ``k``, where several sets are held against it.

    Raises:
        UserError: Fewer than k + 1 real rows, no fake ones, different D, NaN, or ``k`` below 1.
    """
    reach = radii(real, k) if known is None else known
    centres, points = _features(real), _features(fake)
    _same_width(centres.shape[1], points.shape[1])
    inside = [(_distances(part, centres) <= reach).any(1) for part in points.split(CHUNK)]
    return torch.cat(inside).double().mean().item()


def recall(real: Tensor, fake: Tensor, k: int = 3) -> float:
    """Coverage: the share of real features inside the fake manifold; :func:`precision` with the sets exchanged."""
    return precision(fake, real, k)


def _pair(images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    x, y = check_images(images), check_images(target[None] if target.ndim == 3 else target, "target")
    if y.shape[1:] != x.shape[1:] or len(y) not in (1, len(x)):
        raise UserError(
            f"target of shape {list(target.shape)} for images of shape {list(x.shape)}: "
            f"expected {list(x.shape[1:])} or {list(x.shape)}"
        )
    if y.abs().max() > 1:
        raise UserError(f"target with values in [{y.min():g}, {y.max():g}]: expected [-1,1]")
    return x, y


def _chunks(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(x), CHUNK):
        yield x[start : start + CHUNK], y if len(y) == 1 else y[start : start + CHUNK]


def _features(features: Tensor, least: int = 1) -> Tensor:
    if features.ndim != 2 or not features.shape[1]:
        raise UserError(f"features of shape {list(features.shape)}: expected [N,D], a row an image")
    if len(features) < least:
        raise UserError(f"features of {len(features)} images: expected at least {least}")
    return check_finite(features.double(), "features")


def _same_width(real: int, fake: int) -> None:
    if real != fake:
        raise UserError(f"{real} features against {fake}: expected both sets from one extractor")


def _ssim_each(x: Tensor, y: Tensor) -> Tensor:
    # Imported here: it takes 1.3 s, which every command would pay. In float64: the variances are small differences, and
    # float32 puts two constant images, whose SSIM is 0.6001, at 0.5998.
    from torchmetrics.functional.image import structural_similarity_index_measure

    each: Any = structural_similarity_index_measure(x.double(), y.double(), data_range=1.0, reduction="none")
    return each.reshape(-1)


def _kernel_sum(x: Tensor, y: Tensor) -> float:
    return sum((part @ y.T / x.shape[1] + 1).pow(3).sum().item() for part in x.split(CHUNK))


def _kernel_within(x: Tensor) -> float:
    own = (x.square().sum(1) / x.shape[1] + 1).pow(3).sum().item()
    return (_kernel_sum(x, x) - own) / (len(x) * (len(x) - 1))


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # By differences, ten times slower at 2048 features: the product form puts a point up to 7e-7 from itself, and the
    # manifold of repeated images, as a backdoor makes them, has the radius 0.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
