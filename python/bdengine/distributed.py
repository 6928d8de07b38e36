"""The ranks of one run, as torchrun starts them: ``torchrun --nproc-per-node 4 -m bdengine sample ...``.

Work is cut into parts without regard to ranks, so what a part holds does not depend on who makes it: of ``w`` ranks, rank ``r``
samples parts ``r, r + w, r + 2 w, ...``, and trains the ``r``-th of ``w`` equal runs of each batch. What lies in host memory
(counts, finished images) goes over gloo, with and without GPUs; gradients on GPUs go over NCCL.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from .errors import UserError
from .gradient import in_pairs

PATIENCE: Final = timedelta(days=7)
"""How long a rank that is done waits for one that is not. A death closes the connection, which ends the wait at once."""
_NEEDED: Final = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_POLL: Final = 0.0005


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
        if self.world > 1:
            _finish(dist.all_reduce, x)

    def add_up(self, vector: Tensor) -> None:
        """Puts the ranks' sum, in the order of `in_pairs`, into each rank's ``vector``, in place.

        Each rank adds up its part of all vectors and hands it on, so the bytes sent are those of a ring's all-reduce.

        Args:
            vector: float [n], contiguous.

        Raises:
            Stopped: Another rank ended.
        """
        if self.world == 1:
            return
        mine = functional.pad(vector, (0, -len(vector) % self.world))
        theirs = torch.empty_like(mine)
        _finish(dist.all_to_all_single, theirs, mine)
        _finish(dist.all_gather, [*mine.chunk(self.world)], in_pairs(theirs.chunk(self.world)))
        vector.copy_(mine[: len(vector)])

    def agree(self, x: Tensor) -> None:
        """Puts the first rank's ``x``, contiguous, into that of every rank, in place.

        Raises:
            Stopped: Another rank ended.
        """
        if self.world > 1:
            _finish(dist.broadcast, x, 0)


def _finish(exchange: Callable[..., dist.Work], into: Tensor | list[Tensor], *rest: Any) -> None:
    on_gpu = (into if isinstance(into, Tensor) else into[0]).is_cuda
    try:
        work = exchange(into, *rest, async_op=True)
        while not (on_gpu or work.is_completed()):  # not `wait`, in which Python hears no signal
            time.sleep(_POLL)
        work.wait()  # on a GPU its stream waits, and the host goes on
    except RuntimeError as error:
        raise _stopped() from error


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
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), world)
    finally:
        dist.destroy_process_group()
        signal.signal(signal.SIGTERM, before)


def _stop(*_: object) -> None:
    raise _stopped()


def _stopped() -> Stopped:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what follows says what is missing
    return Stopped("another rank ended early")
