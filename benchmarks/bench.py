"""What a benchmark is made of: providers of one op, each with the check that it must pass before it is timed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, ParamSpec, TypeVar

import torch
from torch import Tensor

Shape = tuple[int, int, int, int]
P = ParamSpec("P")
Result = TypeVar("Result")

CPU, CPU_GRAPH, REFERENCE, CEILING = "cpu", "cpu+graph", "reference", "ceiling"
PEERS: Final = ("diffusers", "torch", "compile")
PROVIDERS: Final = (*PEERS, CPU, CPU_GRAPH, REFERENCE, CEILING)
"""Everything a table can have as a row; the ``cpu`` rows run on the backend that the caller has forced, the second of a
network under `torch.compile`."""

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
    """

    run: Callable[[], object]
    check: Callable[[], None] = nothing_to_check
    cycle: int = 1


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
