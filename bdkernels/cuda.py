"""The compiled kernels for CUDA tensors: the functions of ``reference.py``, bit for bit, in CUDA C++.

Calls are queued on torch's current stream of the tensors' device, and nothing is read back. A step of `normal` is taken
modulo 2^32.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .compiled import CompiledOps


def _load() -> tuple[ModuleType | None, str]:
    """The compiled module, or None and the reason."""
    try:
        return importlib.import_module("bdkernels._cuda"), ""
    except ModuleNotFoundError:
        return None, (
            "bdkernels._cuda was not built: install the CUDA toolkit (nvcc on PATH, or CUDA_HOME) and run "
            "`pip install .` again, or `python setup.py build_ext --inplace` in a checkout"
        )
    except ImportError as error:
        return None, f"bdkernels._cuda does not load: {error}"


_cuda, _reason = _load()


def built() -> bool:
    """Whether the compiled module was found and loads; it does so without a device or a driver."""
    return _cuda is not None


def available() -> bool:
    """Whether the kernels can run: the module is there, torch sees a device, and the driver takes what nvcc made."""
    return not reason()


def reason() -> str:
    """Why nothing can run and what to do about it, in one sentence; empty where all is well."""
    if not built():
        return _reason
    if not torch.cuda.is_available():
        return (
            "torch sees no CUDA device: run on a machine with an NVIDIA GPU and its driver, with a CUDA build of torch"
        )
    return _refusal()


@cache
def _refusal() -> str:
    """What the module's own CUDA runtime, which can be newer than torch's, says against the driver; empty for nothing."""
    try:
        _module().require_device()
    except RuntimeError as error:
        return str(error)
    return ""


def _module() -> ModuleType:
    if _cuda is None:
        raise RuntimeError(_reason)
    return _cuda


def _place(tensor: Tensor) -> tuple[int, int]:
    """Device and stream."""
    return tensor.get_device(), torch.cuda.current_stream(tensor.device).cuda_stream


_ops = CompiledOps(_module, _place)
normal = _ops.normal
fused_step = _ops.fused_step
fused_step_ = _ops.fused_step_
bind_step = _ops.bind_step
fused_noising = _ops.fused_noising
fused_loss = _ops.fused_loss
