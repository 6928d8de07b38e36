"""The ranks of one run, as torchrun starts them: ``torchrun --nproc-per-node 4 -m bdengine sample ...``.

Work is cut into parts without regard to ranks, and rank ``r`` of ``w`` takes parts ``r, r + w, r + 2 w, ...``: what a part
holds does not depend on who makes it. All that ranks exchange lies in host memory (counts, finished images), so they
speak gloo with and without GPUs.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import UserError

PATIENCE: Final = timedelta(days=7)
"""How long a rank that is done waits for one that is not. A death closes the connection, which ends the wait at once."""
_NEEDED: Final = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_POLL: Final = 0.02


class Stopped(UserError):
    """Another rank ended early, so that this one cannot or may not go on."""


@dataclass(frozen=True)
class Ranks:
    """One of the ranks of a run, and what they do together."""

    rank: int = 0
    world: int = 1

    def share(self, count: int) -> range:
        """This rank's parts of ``count``."""
        return range(self.rank, count, self.world)

    def together(self, *counts: int) -> list[int]:
        """The sum of each count over the ranks; returns when all have called it.

        Raises:
            Stopped: Another rank ended.
        """
        total = torch.tensor(counts, dtype=torch.int64)
        self._sum(total)
        return total.tolist()

    def fill_in(self, images: Tensor) -> None:
        """Puts into ``images`` what other ranks hold there, in place and to the bit.

        Args:
            images: float32, contiguous, on the CPU; zero where another rank's are.

        Raises:
            Stopped: Another rank ended.
        """
        # As integers: a sum of floats would turn -0 into 0.
        self._sum(images.view(torch.int32))

    def _sum(self, x: Tensor) -> None:
        if self.world == 1:
            return
        try:
            work = dist.all_reduce(x, async_op=True)
            while not work.is_completed():  # not `wait`, in which Python hears no signal
                time.sleep(_POLL)
            work.wait()
        except RuntimeError as error:
            raise Stopped("another rank ended early") from error


ALONE: Final = Ranks()


@contextmanager
def join() -> Iterator[Ranks]:
    """The ranks that torchrun started; one rank without it. On GPUs each takes the one of its local rank.

    Raises:
        UserError: Part of torchrun's environment is missing, or there are fewer GPUs than ranks on this machine.
        Stopped: In the block: torchrun asks this rank to end because another did.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE
        return
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {world} without {', '.join(missing)}: expected all of them, as torchrun sets them"
        )
    local = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            found = torch.cuda.device_count()
            raise UserError(f"rank {local} of this machine finds {found} GPUs: expected --nproc-per-node {found}")
        torch.cuda.set_device(local)
    before = signal.signal(signal.SIGTERM, _stop)
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), world)
    finally:
        dist.destroy_process_group()
        signal.signal(signal.SIGTERM, before)


def _stop(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what follows says what is missing
    raise Stopped("another rank ended early")
