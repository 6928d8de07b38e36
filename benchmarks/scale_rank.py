"""One of the ranks that `benchmarks.scale` times: rank 0 prints seconds by what was done, medians, as JSON."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Final

import torch

from bdengine.distributed import join
from bdengine.memory import keep_freed
from bdengine.train import Trainer

from .scale import sampler, training

ROUNDS: Final = 7
IMAGES: Final = 256
BATCH: Final = 64


def main() -> None:
    """As torchrun starts it; the first of each is a warm-up."""
    keep_freed()
    torch.set_num_threads(1)
    with join() as ranks:
        run, trainer = sampler(), Trainer(training(BATCH), ranks=ranks)
        works: dict[str, Callable[[], object]] = {
            "sampling": lambda: run(range(IMAGES), ranks=ranks),
            "training": trainer.step,
        }
        taken: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(1 + ROUNDS):
            for name, work in works.items():
                ranks.together(0)
                begun = time.perf_counter()
                work()
                ranks.together(0)
                taken[name].append(time.perf_counter() - begun)
        if ranks.rank == 0:
            print(json.dumps({name: statistics.median(seconds[1:]) for name, seconds in taken.items()}))


if __name__ == "__main__":
    main()
