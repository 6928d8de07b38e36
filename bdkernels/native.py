"""The compiled kernels for CPU tensors: the functions of ``reference.py``, bit for bit, in C++.

What only the kernel sees (an arm or a row out of range) is a ValueError, raised before anything is written.

``BDK_ISA=baseline``, ``avx2`` or ``avx512`` in the environment overrides the choice of instruction set.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from types import ModuleType
from typing import Final

import torch
from torch import Tensor

from . import reference
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


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def serves_norm(x: Tensor) -> bool:
    """Whether `group_norm` has a kernel for ``x``."""
    fits: bool = x.dtype == torch.float32 and x.shape[1] <= _module().MOST_CHANNELS
    return fits and x.is_contiguous(memory_format=torch.channels_last)


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, shift: Tensor | None, silu: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """See `bdkernels.group_norm`; and mean and inverse deviation of each group, float32 [N, groups, 2]."""
    out, statistics = torch.empty_like(x), torch.empty(len(x), groups, 2)
    _norm(x, out, weight, bias, statistics, groups, eps, shift, silu, ())
    return out, statistics


def group_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    groups: int,
    shift: Tensor | None,
    silu: bool,
    rest: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in ``x``, to which ``rest`` is added, ``weight`` and ``bias``."""
    dx, (dweight, dbias) = torch.empty_like(x), torch.empty(2, len(x), x.shape[1])
    dy, rest = _channels_last(dy), None if rest is None else _channels_last(rest)
    _norm(x, x, weight, bias, statistics, groups, 0.0, shift, silu, (dy, rest, dx, dweight, dbias))
    return dx, dweight.sum(0), dbias.sum(0)


def _norm(
    x: Tensor,
    out: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    groups: int,
    eps: float,
    shift: Tensor | None,
    silu: bool,
    backward: tuple[Tensor | None, ...],
) -> None:
    stride = 0 if shift is None or len(shift) == 1 else x.shape[1]
    _module().group_norm(
        x.data_ptr(),
        out.data_ptr(),
        _address(shift),
        stride,
        weight.data_ptr(),
        bias.data_ptr(),
        statistics.data_ptr(),
        tuple(x.shape),
        groups,
        eps,
        silu,
        *(map(_address, backward) if backward else (0,) * 5),
        torch.get_num_threads(),
    )


def serves_conv(x: Tensor, filters: int) -> bool:
    """Whether `conv` has a kernel for ``x``."""
    fits = x.dtype == torch.float32 and x.shape[1] % 16 == 0 and filters % 16 == 0 and x.numel() > 0
    return fits and reference.layout_of(x) == torch.channels_last


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, skip: Tensor | None, upsample: bool = False) -> Tensor:
    """See `bdkernels.conv3x3`; filters of 1 x 1 as well."""
    return _convolved(x, weight, bias, skip, len(weight), doubled=upsample)


def conv_input_gradient(dy: Tensor, weight: Tensor, upsample: bool = False) -> Tensor:
    """Gradient in ``x``."""
    return _convolved(dy, weight, None, None, weight.shape[1], halved=upsample, turned=True)


def _convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    filters: int,
    *,
    doubled: bool = False,
    halved: bool = False,
    turned: bool = False,
) -> Tensor:
    n, c, h, w = x.shape
    shape = (n, c, 2 * h, 2 * w) if doubled else (n, c, h, w)
    high, wide = (h // 2, w // 2) if halved else shape[2:]
    out = torch.empty((n, filters, high, wide), memory_format=torch.channels_last)
    weight, skip = _channels_last(weight), None if skip is None else _channels_last(skip)
    addresses = map(_address, (x, weight, bias, skip, out))
    _module().conv(*addresses, shape, filters, weight.shape[2], doubled, halved, turned, torch.get_num_threads())
    return out


_FEWEST_TILES: Final = 128
"""Over fewer, a weight's gradient is a short sum, and terms that are larger than the plain sum's show: 3 times the error."""


def conv_weight_gradient(dy: Tensor, x: Tensor, upsample: bool = False, side: int = 3) -> tuple[Tensor, Tensor]:
    """Gradients in ``weight``, of ``side`` by ``side``, and ``bias``."""
    n, filters, h, w = dy.shape
    if side == 3 and n * ((h + 1) // 2) * ((w + 1) // 2) < _FEWEST_TILES:
        return reference.conv_weight_gradient(dy, x, upsample)
    dweight = torch.empty((filters, x.shape[1], side, side), memory_format=torch.channels_last)
    dbias = torch.empty(filters)
    dy = _channels_last(dy)
    addresses = map(_address, (x, dy, dweight, dbias))
    _module().conv_filters(*addresses, (n, x.shape[1], h, w), filters, side, upsample, torch.get_num_threads())
    return dweight, dbias
