"""Filling a folder with images, by one rank or many: what is missing is sampled, and written beside the sampling."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from torch import Tensor
from tqdm import tqdm

from .data import to_uint8
from .distributed import Ranks, Stopped
from .metrics import FrechetStatistics
from .sampler import Sampler
from .seeds import Seeds
from .shards import PngFiles, Shards
from .streamed import Streamed
from .writer import Writer

SAID: Final = 4
"""Missing parts of a rank that are named."""


def fill(
    folder: PngFiles | Shards,
    sampler: Sampler,
    ranks: Ranks,
    streamed: Streamed | None = None,
    to_range: Callable[[Tensor], Tensor] = lambda images: images,
) -> tuple[int, int]:
    """Samples this rank's share of what is missing, part by part, and writes it.

    A part is sampled whole and from its beginning, so its micro-batches are always the same ones.

    Args:
        folder: Where to.
        sampler: Of one arm.
        ranks: Those that share the work.
        streamed: Keep the statistics of each shard.
        to_range: From the sampler's images to [-1, 1].

    Returns:
        How many images of all ranks were made, and how many were there.

    Raises:
        UserError: As the sampler and `write_atomic`; parts that are done stay.
        Stopped: Another rank ended; says what is missing.
    """
    try:
        made, there = _fill(folder, sampler, ranks, streamed, to_range)
        made, there = ranks.together(made, there)
    except Stopped as error:
        # Two ranks tell of all, so that one is left to tell of the other's death.
        raise Stopped(f"{error}: {missing(folder, ranks)}" if ranks.rank < 2 else str(error)) from error
    return made, there


def missing(folder: PngFiles | Shards, ranks: Ranks) -> str:
    """What each rank leaves undone, in words."""
    words = []
    for rank in range(ranks.world):
        parts = [k for k in Ranks(rank, ranks.world).share(len(folder)) if not folder.there(k)]
        if parts:
            said = Seeds(one for k in parts[:SAID] for one in folder.part(k).ranges)
            more = f" and {len(parts) - SAID} more" if len(parts) > SAID else ""
            words.append(f"rank {rank} lacks {len(parts)} of seeds {said}{more}")
    what = f"of {len(folder)} parts, {'; '.join(words)}" if words else "nothing is missing but the index"
    return f"{what}; expected all, and the same command with any number of ranks makes the rest"


def _fill(
    folder: PngFiles | Shards,
    sampler: Sampler,
    ranks: Ranks,
    streamed: Streamed | None,
    to_range: Callable[[Tensor], Tensor],
) -> tuple[int, int]:
    silent, made, there, undone = ranks.rank > 0, 0, 0, []
    share = ranks.share(len(folder))
    for k in tqdm(share, desc="checking what is there", unit="part", delay=2, leave=False, disable=silent):
        lacking = folder.missing(k)
        made, there = made + lacking, there + len(folder.part(k)) - lacking
        if lacking:
            undone.append(k)
        elif streamed:
            streamed.load(k)

    def keep(k: int, pixels: Tensor, statistics: FrechetStatistics | None) -> None:
        folder.write(k, pixels)
        if streamed and statistics:
            streamed.save(k, statistics)

    name = "sampling" if ranks.world == 1 else f"sampling, rank {ranks.rank} of {ranks.world}"
    total = sum(len(folder.part(k)) for k in undone)
    with Writer() as writer, tqdm(total=total, unit="img", desc=name, disable=silent or not undone) as bar:
        for k in undone:
            seeds = folder.part(k)
            pixels = torch.empty(len(seeds), *sampler.shape, dtype=torch.uint8)
            for at, images in sampler.batches(seeds):
                pixels[at : at + len(images)] = to_uint8(to_range(images))
                bar.update(len(images))
            writer.put(partial(keep, k, pixels, streamed.of(pixels) if streamed else None))
    return made, there
