"""What a benchmark is made of: providers of one op, each with the check that it must pass before it is timed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from bdkernels import use_backend
from bdkernels.backends import BACKENDS, missing, serves
from bdkernels.noise import sample_seeds

Shape = tuple[int, int, int, int]
P = ParamSpec("P")
Result = TypeVar("Result")

HOST: Final = torch.device("cpu")
CPU, TRITON, CUDA = "cpu", "triton", "cuda"
CPU_GRAPH, CAPTURED = "cpu+graph", "captured"
REFERENCE, CEILING, COPY = "reference", "ceiling", "copy"
PEERS: Final = ("diffusers", "torch", "compile")
OURS: Final = {"cpu": (CPU,), "cuda": (TRITON, CUDA)}
"""Our compiled backends by the type of device whose rows they are."""
FUSED: Final = (CPU, TRITON, CUDA, CAPTURED)
"""The rows that are ours, the plain torch reference and a network under `torch.compile` apart."""
PROVIDERS: Final = (*PEERS, *FUSED, CPU_GRAPH, REFERENCE, CEILING)
"""Everything that can be asked for as a row; those named like a backend run on it, see `backend_of`."""

PEER_TOLERANCE: Final = 1e-4
"""Largest distance of a peer from float64 truth, for values of order 1: stock coefficients lose 5.5e-5 at t=1."""
_SIGMAS: Final = 6


def nothing_to_check() -> None:
    """The check of a ceiling, which computes nothing that could be wrong."""


@dataclass(frozen=True)
class Provider:
    """One way to do an op.

    Attributes:
        run: Does it once.
        check: Raises AssertionError where its result is wrong.
        cycle: Calls after which it is back where it began, 1 where all calls are alike.
        steps: Network evaluations of a call, over which the host's share of it is divided.
        queued: Does it once without reading a result back; None where ``run`` reads none.
        whole: Seconds of the op from those of ``run``, where that does a part of it; such a time is calculated.
        share: A column's name and what does a part of ``run`` alone: the column is its share of the time.
    """

    run: Callable[[], object]
    check: Callable[[], None] = nothing_to_check
    cycle: int = 1
    steps: int = 1
    queued: Callable[[], object] | None = None
    whole: Callable[[float], float] | None = None
    share: tuple[str, Callable[[], object]] | None = None


def ours(device: torch.device) -> tuple[str, ...]:
    """Those of our compiled backends that run on ``device`` here."""
    return tuple(name for name in OURS.get(device.type, ()) if not missing(name) and serves(name) == device.type)


def backend_of(provider: str) -> AbstractContextManager[None]:
    """What a provider's calls run in: on the backend it is named after, where there is one."""
    return use_backend(provider) if provider in BACKENDS else contextlib.nullcontext()


def seeds_of(count: int) -> Tensor:
    """A seed a sample, int64 [count]."""
    return torch.from_numpy(sample_seeds(0, np.arange(count)))


def in_full(run: Callable[[], Result]) -> Result:
    """Its result without TF32, which torch allows in convolutions on a GPU and which leaves 10 bits of each factor."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return run()


def moved(case: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Arguments of an op, their tensors on ``device``."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in case.items()}


def checked(run: Callable[[], Any], check: Callable[..., None]) -> Provider:
    """A provider whose results are what ``check`` is given."""
    return Provider(run, lambda: check(*run()))


def compiled(function: Callable[P, Result]) -> Callable[P, Result]:
    """``function`` under ``torch.compile`` for the one shape it will see, as one graph; compiles at its first call."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def assert_close(name: str, got: Tensor, truth64: Tensor, tolerance: float = PEER_TOLERANCE) -> None:
    """``max |got - truth| <= tolerance``.

    Raises:
        AssertionError: It is not, or is NaN.
    """
    error = float((got.double() - truth64).abs().max())
    if not error <= tolerance:
        raise AssertionError(f"{name} is {error:.1e} from float64 truth: expected at most {tolerance:.0e}")


def assert_standard_normal(name: str, z: Tensor) -> None:
    """Mean 0 and variance 1 to six standard deviations of their estimates.

    Raises:
        AssertionError: One of them is off.
    """
    mean, variance = float(z.double().mean()), float(z.double().square().mean())
    slack = _SIGMAS / math.sqrt(z.numel())
    if not (abs(mean) <= slack and abs(variance - 1) <= slack * math.sqrt(2)):
        raise AssertionError(f"{name} has mean {mean:.4f} and mean square {variance:.4f}: expected 0 and 1")
