"""The compiled kernels for CPU tensors: the functions of ``reference.py``, bit for bit, in C++.

What only the kernel sees (an arm or a row out of range) is a ValueError, raised before anything is written.

``BDK_ISA=baseline``, ``avx2`` or ``avx512`` in the environment overrides the choice of instruction set.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from types import ModuleType

import torch

from .compiled import CompiledOps


def _gomp_parallel() -> int:
    """Address of ``GOMP_parallel`` in the OpenMP runtime that torch brought, 0 where it uses another one."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except (AttributeError, OSError, TypeError):
        return 0


def _load() -> tuple[ModuleType | None, str]:
    """The compiled module, or None and the reason."""
    try:
        module = importlib.import_module("bdkernels._native")
        module.use_gomp_parallel(_gomp_parallel())
        if "BDK_ISA" in os.environ:
            module.set_isa(os.environ["BDK_ISA"])
    except ModuleNotFoundError:
        return None, (
            "bdkernels._native was not built: install a C++17 compiler (g++ 12 or clang 15, or newer) and run "
            "`pip install .` again, or `python setup.py build_ext --inplace` in a checkout"
        )
    except (ImportError, ValueError) as error:
        return None, f"bdkernels._native does not load: {error}"
    return module, ""


_native, _reason = _load()


def available() -> bool:
    """Whether the compiled module was found and loads."""
    return _native is not None


def reason() -> str:
    """Why the compiled module is missing and what to do about it, in one sentence; empty where it is there."""
    return _reason


def _module() -> ModuleType:
    if _native is None:
        raise RuntimeError(_reason)
    return _native


def isa() -> str:
    """The instruction set in use: ``avx512``, ``avx2`` or ``baseline`` (128-bit vectors)."""
    return str(_module().isa())


def isas() -> list[str]:
    """The instruction sets that run here, the fastest first."""
    return list(_module().isas())


def set_isa(name: str) -> None:
    """Use another instruction set. All of them make the same bits; meant for tests and measurements."""
    _module().set_isa(name)


_ops = CompiledOps(_module, lambda tensor: torch.get_num_threads())
normal = _ops.normal
fused_step = _ops.fused_step
fused_step_ = _ops.fused_step_
bind_step = _ops.bind_step
fused_noising = _ops.fused_noising
fused_loss = _ops.fused_loss
