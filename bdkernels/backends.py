"""Which implementation runs an op: the compiled kernels where they serve, the torch reference everywhere else.

``BDK_BACKEND`` in the environment or `use_backend` forces one for the whole process or a block of code.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

from . import native, reference

BACKENDS: Final = ("cpu", "reference")
"""Every backend's name, as ``BDK_BACKEND`` and `use_backend` take it."""

_warned: set[str] = set()


def _valid(name: str | None, source: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}: expected one of {', '.join(BACKENDS)}")
    return name


_forced: str | None = _valid(os.environ.get("BDK_BACKEND") or None, "BDK_BACKEND")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on the backend ``name``.

    Raises:
        ValueError: ``name`` is not one of `BACKENDS`.
        RuntimeError: That backend is not present, with the reason and what to install.
    """
    global _forced
    _valid(name, "the backend")
    if name == "cpu" and not native.available():
        raise RuntimeError(native.reason())
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def backend_for(device: torch.device, dtype: torch.dtype) -> Any:
    """The module that implements the ops on ``device``; float64 is the reference's alone."""
    if device.type != "cpu" or dtype == torch.float64 or _forced == "reference":
        return reference
    if native.available():
        return native
    if _forced == "cpu":
        raise RuntimeError(native.reason())
    if "cpu" not in _warned:
        _warned.add("cpu")
        warnings.warn(f"{native.reason()}; running the plain torch reference", RuntimeWarning, stacklevel=3)
    return reference
