"""What differs by device: where tensors are, how time is taken, and what else can be told of a call there."""

from __future__ import annotations

import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, Final

import torch
from torch.autograd.profiler import emit_nvtx
from torch.profiler import ProfilerActivity, profile

from bdengine.errors import UserError

from . import timing
from .bench import COPY, HOST, Provider

DEVICES: Final = ("cpu", "cuda")
HOST_ROUNDS: Final = 25
_LAUNCH: Final = re.compile(r"cu(da)?(Launch|GraphLaunch)")
"""Calls of the CUDA runtime and driver that put a kernel, or a graph of them, on a stream."""


class Device(ABC):
    """A device that rows are measured on.

    Attributes:
        where: The providers' tensors are there.
        name: For the results.
        caches: What state they are in at the start of a call, in words.
        activities: What a profiler can record there.
    """

    where: torch.device
    name: str
    caches: str
    activities: Sequence[ProfilerActivity]

    @abstractmethod
    def seconds(self, run: Callable[[], object], loops: int) -> float:
        """Time of ``loops`` calls, each from cold caches."""

    @abstractmethod
    def wait(self) -> None:
        """Until all that was queued is done."""

    @abstractmethod
    def copy(self, moved: float) -> dict[str, Provider]:
        """A plain copy that moves as many bytes, to hold the other rows against."""

    @abstractmethod
    def host(self, provider: Provider) -> dict[str, float]:
        """What a call costs the host, by column."""

    @abstractmethod
    def nvtx(self) -> Any:
        """A context in which ops and ranges are marked for Nsight, and whose work is what it profiles.

        Raises:
            UserError: Nsight cannot see this device.
        """


class Cpu(Device):
    """Calls end when they return, so their time is the host's."""

    where, name, activities = HOST, "cpu", (ProfilerActivity.CPU,)

    def __init__(self) -> None:
        self.caches = f"cold before each call, last level {timing.last_cache() >> 20} MiB"

    def seconds(self, run: Callable[[], object], loops: int) -> float:
        """See `timing.seconds`."""
        return timing.seconds(run, loops)

    def wait(self) -> None:
        """Nothing is queued."""

    def copy(self, moved: float) -> dict[str, Provider]:
        """None: the ceiling moves the same bytes."""
        return {}

    def host(self, provider: Provider) -> dict[str, float]:
        """None: it is the time itself."""
        return {}

    def nvtx(self) -> Any:
        """Refused."""
        raise UserError("--nvtx marks ranges for Nsight, which sees CUDA devices: this run is on the CPU")


class Cuda(Device):
    """Calls are queued: their time is between two events on the stream, the host's is how long the queueing takes."""

    activities = (ProfilerActivity.CPU, ProfilerActivity.CUDA)

    def __init__(self) -> None:
        self.where = torch.device("cuda", torch.cuda.current_device())
        found = torch.cuda.get_device_properties(self.where)
        self.name = f"{found.name} (sm_{found.major}{found.minor}, CUDA {torch.version.cuda})"
        self.caches = f"cold before each call, L2 {found.L2_cache_size >> 20} MiB"
        self._more_than_l2 = torch.zeros(3 * found.L2_cache_size // 4, device=self.where)  # three times its bytes
        self._sum = torch.zeros((), device=self.where)

    def _evict(self) -> None:
        # A flush and not copies of the buffers in turn: any provider can be timed, however large and whatever state it
        # keeps, and the host gets ahead by the flush, so that one launch is not timed as the wait for it. It reads:
        # lines that a flush had written would have to be written back on the next call's account.
        torch.sum(self._more_than_l2, dim=0, out=self._sum)

    def seconds(self, run: Callable[[], object], loops: int) -> float:
        """Time on the device, gaps included in which it waits for a host that is slower."""
        return between_events(run, loops, self._evict, lambda: torch.cuda.Event(enable_timing=True), self.wait)

    def wait(self) -> None:
        """For the whole device."""
        torch.cuda.synchronize(self.where)

    def copy(self, moved: float) -> dict[str, Provider]:
        """Half of the bytes read, half written."""
        source = torch.zeros(int(moved) // 2, dtype=torch.uint8, device=self.where)
        out = torch.empty_like(source)
        return {COPY: Provider(lambda: out.copy_(source))}

    def host(self, provider: Provider) -> dict[str, float]:
        """Kernels, or graphs of them, launched, and microseconds until all is queued, both a step of a call.

        A provider that reads a result back waits for the device, and that counts.
        """
        run, calls = provider.queued or provider.run, provider.cycle
        taken = queueing(run, calls, self.wait)
        with profile(activities=self.activities) as recorded:
            for _ in range(calls):
                run()
            self.wait()
        steps = calls * provider.steps
        launched = launches(event.name for event in recorded.events() or ())
        return {"launches": round(launched / steps, 2), "host_us": round(1e6 * taken / provider.steps, 2)}

    @contextmanager
    def nvtx(self) -> Iterator[None]:
        """Between ``cudaProfilerStart`` and ``cudaProfilerStop``, for tools that were told to wait for them."""
        with torch.cuda.profiler.profile(), emit_nvtx():
            yield


def between_events(
    run: Callable[[], object],
    loops: int,
    evict: Callable[[], object],
    event: Callable[[], Any],
    wait: Callable[[], object],
) -> float:
    """Seconds between an event before and one after each call; all are read at the end, so nothing waits in between."""
    pairs = []
    for _ in range(loops):
        evict()
        before, after = event(), event()
        before.record()
        run()
        after.record()
        pairs.append((before, after))
    wait()
    return float(sum(before.elapsed_time(after) for before, after in pairs)) / 1e3


def queueing(run: Callable[[], object], calls: int, wait: Callable[[], object]) -> float:
    """Seconds of the host a call: the median of rounds of ``calls`` that begin with an empty queue, or it would fill up."""
    taken = []
    for _ in range(HOST_ROUNDS):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        taken.append((time.perf_counter() - start) / calls)
    wait()
    return median(taken)


def launches(names: Iterator[str]) -> int:
    """How many of a profiler's events are launches."""
    return sum(_LAUNCH.match(name) is not None for name in names)


def find(name: str, kept: bool = False) -> Device:
    """One of `DEVICES`; the CPU, with a sentence on stderr, where torch finds no CUDA device.

    Raises:
        UserError: It finds none and the rows are to be ``kept`` in a file, which would be taken for a GPU's.
    """
    if name == "cpu":
        return Cpu()
    if torch.cuda.is_available():
        return Cuda()
    if kept:
        raise UserError("the device cuda was asked for with --json and torch finds none: expected --device cpu")
    print(
        "benchmarks: torch finds no CUDA device: the rows that follow are the CPU's, none is a GPU's", file=sys.stderr
    )
    return Cpu()
