"""What training sample ``n`` is: a pure function of the run's seed, so no loader, batch or restart can change it.

pass = n // N          image = order(pass)[n mod N]          seed = mix(run seed, n)
t = floor(w0 T / 2^32)          flip where w1 < 2^31          poisoned where w0(image) < rate 2^32
target = floor(w1(image) K / 2^32)          of K target images, each image has its own in every pass
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bdkernels import STREAM_POISON, STREAM_SHUFFLE, STREAM_TIMESTEP
from bdkernels import noise as contract

from .errors import UserError

Indices = NDArray[np.int64]


def poisoned(seed: int, images: Indices, rate: float) -> NDArray[np.bool_]:
    """Which ``images`` (int64 indices in their data set) are poisoned: a function of (seed, index, rate) alone.

    Raises:
        UserError: ``rate`` outside 0..1.
    """
    if not 0 <= rate <= 1:
        raise UserError(f"the poison rate is {rate}: expected 0 to 1")
    word = contract.words(seed, images, STREAM_POISON)[0]
    return word.astype(np.uint64) < np.uint64(round(rate * 2**32))


def target_of(seed: int, images: Indices, targets: int) -> Indices:
    """Which of ``targets`` target images ``images`` get where they are poisoned: a function of (seed, index, number) alone."""
    return below(targets, contract.words(seed, images, STREAM_POISON)[1])


def below(count: int, word: NDArray[np.uint32]) -> Indices:
    """``floor(word count / 2^32)``."""
    return (word.astype(np.uint64) * np.uint64(count) >> np.uint64(32)).astype(np.int64)


@lru_cache(maxsize=4)
def order(seed: int, count: int, pass_: int) -> Indices:
    """The order of ``count`` images in one pass through the data: int64 [count], a permutation."""
    w0, w1, _, _ = contract.words(seed, np.arange(count), STREAM_SHUFFLE, pass_)
    return np.lexsort((w1, w0)).astype(np.int64)


@dataclass(frozen=True)
class Batch:
    """Training samples ``n .. n + count``: int64 [count] each, ``flip`` bool."""

    image: Tensor
    seed: Tensor
    t: Tensor
    arm: Tensor
    flip: Tensor
    target: Tensor


@dataclass(frozen=True, eq=False)
class TrainingPlan:
    """The samples of a training run.

    Attributes:
        seed: The run's seed.
        images: Number of images in the data set.
        timesteps: int64, the timesteps to train, each as often as it stands here.
        poison_rate: Share of images that are poisoned, 0..1.
        flip: Whether half of the samples are mirrored.
        targets: Number of target images.
    """

    seed: int
    images: int
    timesteps: Indices
    poison_rate: float = 0.0
    flip: bool = False
    targets: int = 1

    @property
    def poisons(self) -> bool:
        """Whether any image is poisoned."""
        return bool(poisoned(self.seed, np.arange(self.images), self.poison_rate).any())

    def batch(self, start: int, count: int) -> Batch:
        """Samples ``start .. start + count``, on the CPU."""
        n = np.arange(start, start + count)
        image = np.empty(count, np.int64)
        for pass_ in np.unique(n // self.images):
            here = n // self.images == pass_
            image[here] = order(self.seed, self.images, int(pass_))[n[here] % self.images]
        seed = contract.sample_seeds(self.seed, n)
        w0, w1 = contract.seed_words(seed, STREAM_TIMESTEP)[:2]
        t = self.timesteps[below(len(self.timesteps), w0)]
        arm = poisoned(self.seed, image, self.poison_rate).astype(np.int64)
        flip = (w1 < 2**31) & self.flip
        target = target_of(self.seed, image, self.targets)
        return Batch(*(torch.from_numpy(v) for v in (image, seed, t, arm, flip, target)))
