"""Fréchet statistics of images in shards: a file beside each shard, added up in the shards' order.

    shard-000007.frechet.safetensors    of which shard and extractor, n, sum of features, sum of outer products

An image is what its shard holds, so its features are those of the bytes, and the distance is that of `metrics.frechet` over
the images read back.
"""

from __future__ import annotations

from functools import reduce
from operator import add
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .data import to_float
from .extractors import CHUNK, Extractor
from .files import write_atomic
from .metrics import FrechetStatistics
from .shards import Shards


def statistics_of(pixels: Tensor, extractor: Extractor, device: str = "cpu") -> FrechetStatistics:
    """The statistics of uint8 [N, C, H, W], of which only a chunk is made float at once."""
    return FrechetStatistics.of(torch.cat([extractor(to_float(part.to(device))).cpu() for part in pixels.split(CHUNK)]))


class Streamed:
    """The statistics of a folder's shards under one extractor, each computed once.

    Args:
        shards: The folder.
        extractor: Its name tells its statistics from those of others.
        device: Where it runs.
    """

    def __init__(self, shards: Shards, extractor: Extractor, device: str) -> None:
        self.shards, self.extractor, self.device = shards, extractor, device

    def of(self, pixels: Tensor) -> FrechetStatistics:
        """The statistics of uint8 [N, C, H, W]."""
        return statistics_of(pixels, self.extractor, self.device)

    def path(self, k: int) -> Path:
        """The file of shard ``k``'s statistics."""
        return self.shards.path(k).with_suffix(".frechet.safetensors")

    def save(self, k: int, statistics: FrechetStatistics) -> None:
        """Writes the statistics of shard ``k``, which is there."""
        tensors = {"n": torch.tensor(statistics.n), "total": statistics.total, "outer": statistics.outer}
        write_atomic(self.path(k), safetensors.torch.save(tensors, self._about(k)))

    def load(self, k: int) -> FrechetStatistics:
        """The statistics of shard ``k``: from their file, or from the shard where that is not of this shard and extractor."""
        try:
            with safe_open(self.path(k), "pt") as file:
                if file.metadata() == self._about(k):
                    return FrechetStatistics(int(file.get_tensor("n")), *map(file.get_tensor, ("total", "outer")))
        except (OSError, SafetensorError):
            pass  # missing, or no such file
        statistics = self.of(self.shards.read(k))
        self.save(k, statistics)
        return statistics

    def total(self) -> FrechetStatistics:
        """Those of all shards, added in their order, so that no rank count moves a bit."""
        return reduce(add, map(self.load, range(len(self.shards))))

    def _about(self, k: int) -> dict[str, str]:
        # One entry: safetensors writes several in an order of chance.
        return {"of": f"{self.extractor.name} {self.shards.checksum(k)}"}
