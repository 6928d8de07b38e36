"""How alike and how smooth images are: the two features of Elijah (An et al. 2024, section 4.3), and whether they are images.

    uniformity         trimmed mean over i of ( trimmed mean over j of d(image_i, image_j) ), a quarter off each end
    total variation    sum over pixels of |x - right neighbour| + |x - lower neighbour|, mean over images
    excess             mean over images of the root of mse(image, clamp(image, -1, 1))
    unlike             uniformity + excess: 0 for images that are all the same, and inside the range
    copies             which images j have mean((image_j - clamp(reference))^2) / 4 < 0.001

``d`` is LPIPS in the paper. Here it is `bdengine.metrics.perceptual` with a given extractor, or the root of
`bdengine.metrics.mse`: a number made with one says nothing about a number made with another. The paper trims 4 of 16 at each
end; that rows are trimmed first and their means then is this project's reading. The excess is this project's: a network that
is asked for what it never saw, clean or not, runs away, and what is left of its images after the clamp is all alike. Copies
are this project's too, at a tenth of the least published threshold of a success: a clean digits network that is started darker
makes mostly ones, which are alike (uniformity halves) and of which 51 % are within 0.01 of one, 3 % within 0.002, and none
within 0.001; of the shipped backdoor's images 92 % are within 0.0002.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import metrics
from ..extractors import Extractor

IMAGES = 16
"""Of the features, as published."""
SAME = 0.001
"""Below it two images in units of [0, 1] are the same."""


def uniformity(images: Tensor, extractor: Extractor | None = None) -> float:
    """The module's formula: 0 for images that are all the same.

    Args:
        images: float [N, C, H, W].
        extractor: Of ``d``; pixels where None.
    """

    def to(one: Tensor) -> Tensor:
        if extractor is None:
            return metrics.mse(images, one).sqrt()
        return metrics.perceptual(images, one, extractor)

    pairs = torch.stack([to(one) for one in images.clamp(-1, 1)])
    return float(_trimmed(_trimmed(pairs)))


def total_variation(images: Tensor) -> float:
    """The module's formula, of float [N, C, H, W]."""
    across, down = (images.diff(dim=d).abs().sum((1, 2, 3)) for d in (3, 2))
    return float((across + down).mean())


def excess(images: Tensor) -> float:
    """The module's formula, of float [N, C, H, W]: 0 in [-1, 1]."""
    outside = images - images.clamp(-1, 1)
    return float(outside.div(2).square().mean((1, 2, 3)).sqrt().mean())


def unlike(images: Tensor, extractor: Extractor | None = None) -> float:
    """The module's formula; the arguments of `uniformity`."""
    return uniformity(images, extractor) + excess(images)


def medoid(images: Tensor) -> Tensor:
    """Of float [N, C, H, W] the image nearest to the others in the median, clamped to [-1, 1]: [C, H, W]."""
    inside = images.clamp(-1, 1)
    distances = torch.stack([_distance(images, one) for one in inside])
    return inside[distances.median(1).values.argmin()]


def copies(images: Tensor, reference: Tensor) -> Tensor:
    """The module's formula, bool [N], of float [N, C, H, W] and [C, H, W]."""
    return _distance(images, reference) < SAME


def _distance(images: Tensor, reference: Tensor) -> Tensor:
    return (images - reference.clamp(-1, 1)).div(2).square().mean((1, 2, 3))


def _trimmed(values: Tensor) -> Tensor:
    """Mean along the last dimension without a quarter at each end."""
    count = values.shape[-1]
    return values.sort(dim=-1).values[..., count // 4 : count - count // 4].mean(-1)
