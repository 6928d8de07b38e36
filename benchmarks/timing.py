"""Wall time of several functions side by side: interleaved, calibrated, with their spread."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

LEAST: Final = 0.02
"""Seconds that one measurement lasts at least."""
WARM_UP: Final = 3


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median over the repeats and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def seconds(run: Callable[[], object], loops: int) -> float:
    """Wall time of ``loops`` calls."""
    start = time.perf_counter()
    for _ in range(loops):
        run()
    return time.perf_counter() - start


def calibrate(run: Callable[[], object], least: float) -> int:
    """How many calls last ``least`` seconds or longer."""
    loops = 1
    while (elapsed := seconds(run, loops)) < least:
        loops = min(10 * loops, math.ceil(1.2 * loops * least / elapsed))
    return loops


def interleaved(runs: Mapping[str, Callable[[], object]], repeats: int, least: float = LEAST) -> dict[str, Timing]:
    """Times every function once a round, ``repeats`` rounds, so that a busy moment falls on all alike."""
    for run in runs.values():
        seconds(run, WARM_UP)
    loops = {name: calibrate(run, least) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(repeats):
            for name, run in runs.items():
                samples[name].append(seconds(run, loops[name]) / loops[name])
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(*np.percentile(taken, [50, 20, 80]).tolist()) for name, taken in samples.items()}
