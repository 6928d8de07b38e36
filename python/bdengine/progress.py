"""What a run hears and tells while it goes on: Ctrl-C, and ``stats.jsonl``."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor
from tqdm import tqdm

from .files import write_atomic


class Interrupt:
    """Turns the first Ctrl-C into a request to stop after the step in progress; a second one acts at once."""

    def __enter__(self) -> Interrupt:
        self.asked = False
        self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self.before)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.before)


class Stats:
    """The lines of ``stats.jsonl``, one at each multiple of ``every`` images and one at the end, and a bar.

    Args:
        path: The file. Lines after ``images_seen`` are dropped: a killed run may have written some, the last in part, after its
            last save. None writes nothing, as all ranks but the first do.
        images: Length of the run.
        images_seen: Where it goes on.
        batch: Images of a step.
        every: Images between lines.
        bar: Show it.
    """

    def __init__(self, path: Path | None, images: int, images_seen: int, batch: int, every: int, bar: bool) -> None:
        if path is not None and path.exists():
            whole = (line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n"))
            write_atomic(path, "".join(line for line in whole if json.loads(line)["images"] <= images_seen))
        self.file = (path or Path(os.devnull)).open("a")
        self.bar = tqdm(total=images, initial=images_seen, unit="img", desc="training", disable=not bar)
        self.images, self.batch, self.every = images, batch, every
        self._begin()

    def _begin(self) -> None:
        self.losses: list[Tensor] = []
        self.begun = time.perf_counter()

    def __enter__(self) -> Stats:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.file.close()

    def add(self, loss: Tensor, images_seen: int, lr: float) -> None:
        """A step that ended at ``images_seen``; ``loss``, 0-d, is read where a line is due.

        Raises:
            FloatingPointError: The mean loss since the last line is not finite.
        """
        self.losses.append(loss)
        self.bar.update(self.batch)
        if images_seen < self.images and images_seen // self.every == (images_seen - self.batch) // self.every:
            return
        mean = float(torch.stack(self.losses).mean())
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss is {mean} after {images_seen} images")
        rate = len(self.losses) * self.batch / (time.perf_counter() - self.begun)
        line = {"images": images_seen, "loss": mean, "lr": lr, "images_per_second": round(rate, 1)}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self.bar.set_postfix(loss=f"{mean:.4f}")
        self._begin()
