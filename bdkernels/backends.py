"""Which implementation runs an op: compiled kernels where they serve, the torch reference everywhere else.

CPU tensors run in C++. CUDA tensors run in Triton, or in CUDA C++ on devices whose committed results have it ahead.
``BDK_BACKEND`` in the environment or `use_backend` forces one backend for the whole process or a block of code.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any, Final

import torch
from torch import Tensor

from . import native, reference

BACKENDS: Final = ("cpu", "reference", "triton", "cuda")
"""Every backend's name, as ``BDK_BACKEND`` and `use_backend` take it."""

_FASTER_IN_CUDA: Final[frozenset[str]] = frozenset()
"""Devices, by torch's name, for which ``benchmarks/results`` has CUDA C++ ahead of Triton: none is committed yet."""

_warned: set[str] = set()


def _valid(name: str | None, source: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}: expected one of {', '.join(BACKENDS)}")
    return name


_forced: str | None = _valid(os.environ.get("BDK_BACKEND") or None, "BDK_BACKEND")


def _module(name: str) -> Any:
    """The module of a backend; those for GPUs are imported on first use."""
    return {"cpu": native, "reference": reference}.get(name) or import_module(f"{__package__}.{name}")


def missing(name: str) -> str:
    """Why a backend is not present and what to install, in one sentence; empty where it is present."""
    module = _module(name)
    return "" if module is reference or module.available() else str(module.reason())


def serves(name: str) -> str:
    """Type of the devices whose tensors a compiled backend takes: ``cpu`` or ``cuda``."""
    if name == "triton":
        return str(_module(name).serves())
    return "cuda" if name == "cuda" else "cpu"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on the backend ``name``.

    Tensors that it does not take (float64, or of another type of device) run as if nothing were forced.

    Raises:
        ValueError: ``name`` is not one of `BACKENDS`.
        RuntimeError: That backend is not present, with the reason and what to install.
    """
    global _forced
    _valid(name, "the backend")
    if reason := missing(name):
        raise RuntimeError(reason)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@cache
def _preferred(device: torch.device) -> tuple[str, ...]:
    """Compiled backends for tensors on ``device``, the fastest first."""
    if device.type == "cuda":
        return ("cuda", "triton") if torch.cuda.get_device_name(device) in _FASTER_IN_CUDA else ("triton", "cuda")
    return ("cpu",) if device.type == "cpu" else ()


def name_for(device: torch.device, dtype: torch.dtype) -> str:
    """Name of the backend that runs an op on ``device``; float64 is the reference's alone."""
    if dtype == torch.float64 or _forced == "reference":
        return "reference"
    if _forced is not None:
        if reason := missing(_forced):
            raise RuntimeError(reason)
        if serves(_forced) == device.type:
            return _forced
    names = _preferred(device)
    for name in names:
        if not missing(name) and serves(name) == device.type:
            return name
    if names and device.type not in _warned:
        _warned.add(device.type)
        reasons = "; ".join(filter(None, map(missing, names)))
        warnings.warn(f"{reasons}; running the plain torch reference", RuntimeWarning, stacklevel=4)
    return "reference"


def backend_for(device: torch.device, dtype: torch.dtype) -> Any:
    """The module that implements the ops on ``device``."""
    return _module(name_for(device, dtype))


def norm_backend(x: Tensor) -> Any:
    """Only the CPU has kernels of its own for it, and for float32 in channels-last."""
    backend = backend_for(x.device, x.dtype)
    return backend if backend is native and native.serves_norm(x) else reference


def conv_backend(x: Tensor, filters: int) -> Any:
    """Only the CPU has kernels of its own for it, as for the norm, and for channels and filters in sixteens."""
    backend = backend_for(x.device, x.dtype)
    return backend if backend is native and native.serves_conv(x, filters) else reference
