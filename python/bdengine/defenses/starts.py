"""Where an inversion starts: the shift, of some dozens tried, whose images are most alike and still images.

    tau_k = the background of every stamped trigger, alone or with one square of another value
    start = argmin_k  uniformity( images from eps + tau_k ) + excess( the same images )                 see `features`

A trained network answers a shift that it has never seen with anything: 1.25 or -1.25 in every pixel led each of four clean
digits models to images that are all alike and far outside [-1, 1]. A backdoor's are alike and inside.
Between clean and poisoned starts stands a wall, on whose other side no gradient is left, while far more than the trigger
itself opens it: on digits-badiffusion, whose trigger is a white square of 8 pixels, squares of 6 to 12 pixels do, and one
moved by 2 pixels does for 94 % of the images. So a coarse search finds the right side and needs no gradient, and an inversion
that starts there finds the trigger:

    start of Elijah's inversion       -U[0, 1]     -1         1      searched
    cosine with the trigger               0.02   0.58     -0.37          0.92
    images at the target                   0 %    0 %       0 %         100 %

The search takes a model's own sampler as it is, and asks it for `IMAGES` images of each of 69 shifts
from 16 pixels on; below, strides are rounded down to other numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from ..arms import Arm
from . import features
from .subject import Subject, uniform_image

IMAGES: Final = 8
"""Of each shift."""
Grid = tuple[tuple[int, int], ...]
"""Sides of squares and their strides, in eighths of an image's."""
GRID: Final[Grid] = ((2, 2), (4, 2), (6, 1))
MICRO_BATCH: Final = 64


def candidates(subject: Subject, grid: Grid = GRID) -> Tensor:
    """The shifts that are tried, float32 [K, C, H, W]: the background's value, with squares of the range's middle and end."""
    low, high = (-1.0, 1.0) if subject.process is not None else (0.0, 1.0)
    shape = subject.network.sample_shape
    background = torch.full(shape, low)
    shifts = [background]
    for rows, columns in _squares(*shape[1:], grid):
        for value in ((low + high) / 2, high):
            shift = background.clone()
            shift[:, rows, columns] = value
            shifts.append(shift)
    return torch.stack(shifts)


def _squares(height: int, width: int, grid: Grid) -> Iterator[tuple[slice, slice]]:
    for side, stride in grid:
        tall, wide = (max(side * length // 8, 1) for length in (height, width))
        down, across = (max(stride * length // 8, 1) for length in (height, width))
        for top in range(0, height - tall + 1, down):
            for left in range(0, width - wide + 1, across):
                yield slice(top, top + tall), slice(left, left + wide)


def images_from(subject: Subject, shifts: Tensor, count: int = IMAGES) -> Tensor:
    """Samples of seeds ``0 .. count`` from ``eps + tau_k``, float32 [K, count, C, H, W] on the CPU."""
    arms = {str(k): Arm(subject.table, shift) for k, shift in enumerate(shifts.cpu())}
    return torch.stack([*subject.sampled(arms, range(count), MICRO_BATCH).values()])


def searched(subject: Subject) -> Tensor:
    """The module's start, float32 [C, H, W] on the CPU."""
    shifts = candidates(subject)
    unlike = [features.unlike(images, subject.extractor) for images in images_from(subject, shifts)]
    return shifts[min(range(len(unlike)), key=unlike.__getitem__)]


def start_of(subject: Subject, ends: tuple[float, float] | None, seed: int) -> Tensor:
    """Where an inversion starts, float32 [1, C, H, W] on the network's device: uniform between ``ends``, or searched."""
    shape = subject.network.sample_shape
    start = searched(subject) if ends is None else uniform_image(seed, shape, *ends)
    return start.to(subject.device)[None]
