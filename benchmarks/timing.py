"""Time of several functions side by side: interleaved, calibrated, with their spread, and from cold caches.

Before each call, untimed, a buffer larger than the last cache is passed through: in a sampling or training loop the
network's activations have been there since the last call. The clock is the host's here, a GPU's own in ``device.py``.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

LEAST: Final = 0.02
"""Seconds that one measurement lasts at least."""
WARM_UP: Final = 3
WARM: Final = 0.5
"""Seconds after which a function is warm, however few its calls."""


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median over the repeats and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    def of(self, whole: Callable[[float], float]) -> Timing:
        """That of something whose seconds follow from these."""
        return Timing(whole(self.median), whole(self.p20), whole(self.p80))


@cache
def last_cache() -> int:
    """Bytes of the largest cache that Linux names; 32 MiB where it names none."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    named = [int(size.removesuffix("K")) << 10 for path in sizes if (size := path.read_text().strip()).endswith("K")]
    return max(named, default=32 << 20)


@cache
def _scratch() -> Tensor:
    return torch.empty(3 * last_cache() // 4)


def seconds(run: Callable[[], object], loops: int) -> float:
    """Wall time of ``loops`` calls, each from cold caches."""
    total = 0.0
    for _ in range(loops):
        _scratch().fill_(0)
        start = time.perf_counter()
        run()
        total += time.perf_counter() - start
    return total


Clock = Callable[[Callable[[], object], int], float]
"""Seconds that so many calls of a function take."""


def calibrate(run: Callable[[], object], least: float, clock: Clock = seconds) -> int:
    """How many calls last ``least`` seconds or longer."""
    loops = 1
    while (elapsed := clock(run, loops)) < least:
        loops = min(10 * loops, math.ceil(1.2 * loops * least / elapsed))
    return loops


def warm(run: Callable[[], object], clock: Clock) -> None:
    """Calls it `WARM_UP` times, or until it has taken `WARM` seconds."""
    taken = 0.0
    for _ in range(WARM_UP):
        if (taken := taken + clock(run, 1)) >= WARM:
            return


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    cycle: int = 1,
    least: float = LEAST,
    clock: Clock = seconds,
    within: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> dict[str, Timing]:
    """Times every function once a round, ``repeats`` rounds, so that a busy moment falls on all alike.

    Args:
        cycle: Where it is not 1, a measurement is so many calls, however short: unequal ones that belong together.
        least: Seconds that a measurement of equal calls lasts at least.
        clock: Takes the time.
        within: By name, what a function's calls run in, entered outside of the time taken.
    """
    loops = {}
    for name, run in runs.items():
        with within(name):
            warm(run, clock)
            loops[name] = calibrate(run, least, clock) if cycle == 1 else cycle
    samples: dict[str, list[float]] = {name: [] for name in runs}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(repeats):
            for name, run in runs.items():
                with within(name):
                    samples[name].append(clock(run, loops[name]) / loops[name])
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(*np.percentile(taken, [50, 20, 80]).tolist()) for name, taken in samples.items()}
