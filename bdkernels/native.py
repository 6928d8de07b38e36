"""The compiled kernels for CPU tensors: the functions of ``reference.py``, bit for bit, in C++.

Arguments have been checked by ``ops.py``: dtypes, shapes, devices; ``x``, ``model_output``, ``x0``, ``prediction`` and
each slot of ``history`` contiguous or channels-last, everything else contiguous, images ``[1 or N, C, H, W]``. What only
the kernel sees (an arm or a row out of range) is a ValueError, raised before anything is written.

``BDK_ISA=baseline``, ``avx2`` or ``avx512`` in the environment overrides the choice of instruction set.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Final

import torch
from torch import Tensor

from .columns import HISTORY_SLOTS

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
_ABSENT = (0, 0)


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


def _view(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 2 * _TYPES[tensor.dtype] + (not tensor.is_contiguous())


def _image(tensor: Tensor | None) -> tuple[int, int]:
    return _ABSENT if tensor is None else (tensor.data_ptr(), tensor.shape[0])


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def normal(seeds: Tensor, step: Tensor, stream: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """See `bdkernels.normal`."""
    out = torch.empty((len(seeds), *shape), dtype=dtype if dtype in _TYPES else torch.float32)
    flat = (len(seeds), 1, 1, math.prod(shape))
    threads = torch.get_num_threads()
    _module().normal(flat, _view(out), seeds.data_ptr(), step.data_ptr(), step.ndim, stream, threads)
    return out.to(dtype)


def _fused_step(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    arm: Tensor,
    steps: Tensor,
    count: int,
    seeds: Tensor,
    trigger: Tensor | None,
    region: Tensor | None,
    arm_inside: Tensor | None,
    history: Tensor | None,
    stores: bool,
    bad_row: Tensor | None,
) -> Callable[[int, int, int], None]:
    """The op on these tensors; a call takes the address and format of ``m`` and which of ``count`` steps it is."""
    return _module().FusedStep(
        tuple(x.shape),
        _view(x),
        _view(out),
        _ABSENT if history is None else _view(history),
        0 if history is None else min(len(history), HISTORY_SLOTS),
        stores,
        table.data_ptr(),
        tuple(table.shape),
        arm.data_ptr(),
        _address(arm_inside),
        steps.data_ptr(),
        count,
        int(steps.numel() != count),
        seeds.data_ptr(),
        _image(trigger),
        _image(region),
        _address(bad_row),
        torch.get_num_threads(),
    )


def fused_step(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    arm: Tensor,
    step: Tensor,
    seeds: Tensor,
    trigger: Tensor | None,
    region: Tensor | None,
    arm_inside: Tensor | None,
    history: Tensor | None,
) -> Tensor:
    """See `bdkernels.fused_step`."""
    out = torch.empty_like(x)
    one = _fused_step(x, out, table, arm, step, 1, seeds, trigger, region, arm_inside, history, False, None)
    one(*_view(model_output), 0)
    return out


def fused_step_(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    arm: Tensor,
    step: Tensor,
    seeds: Tensor,
    trigger: Tensor | None,
    region: Tensor | None,
    arm_inside: Tensor | None,
    history: Tensor | None,
    bad_row: Tensor | None,
) -> None:
    """See `bdkernels.fused_step_`."""
    one = _fused_step(x, x, table, arm, step, 1, seeds, trigger, region, arm_inside, history, True, bad_row)
    one(*_view(model_output), 0)


class BoundStep:
    """See `bdkernels.bind_step`."""

    def __init__(
        self,
        check: Callable[[Tensor], None],
        x: Tensor,
        table: Tensor,
        arm: Tensor,
        steps: Tensor,
        seeds: Tensor,
        trigger: Tensor | None,
        region: Tensor | None,
        arm_inside: Tensor | None,
        history: Tensor | None,
        bad_row: Tensor | None,
    ) -> None:
        tensors = (trigger, region, arm_inside, history)
        self._step = _fused_step(x, x, table, arm, steps, len(steps), seeds, *tensors, True, bad_row)
        self._alive = (x, table, arm, steps, seeds, *tensors, bad_row)
        self._check = check
        self._seen: tuple[object, ...] = ()
        self._format = 0

    def __call__(self, model_output: Tensor, k: int) -> None:
        seen = (model_output.shape, model_output.stride(), model_output.dtype, model_output.is_cpu)
        if seen != self._seen:
            self._check(model_output)
            self._seen, self._format = seen, _view(model_output)[1]
        self._step(model_output.data_ptr(), self._format, k)


def fused_noising(
    x0: Tensor,
    t: Tensor,
    arm: Tensor,
    seeds: Tensor,
    table: Tensor,
    target: Tensor | None,
    trigger: Tensor | None,
    mask: Tensor | None,
    flip: Tensor | None,
    region: Tensor | None,
    arm_inside: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """See `bdkernels.fused_noising`."""
    out = torch.empty_like(x0, dtype=dtype)
    _module().fused_noising(
        tuple(x0.shape),
        _view(x0),
        _view(out),
        t.data_ptr(),
        arm.data_ptr(),
        _address(arm_inside),
        seeds.data_ptr(),
        table.data_ptr(),
        tuple(table.shape),
        _image(target),
        _image(trigger),
        _image(mask),
        _image(region),
        _address(flip),
        torch.get_num_threads(),
    )
    return out


def fused_loss(
    prediction: Tensor,
    x0: Tensor,
    t: Tensor,
    arm: Tensor,
    seeds: Tensor,
    table: Tensor,
    trigger: Tensor | None,
    mask: Tensor | None,
    flip: Tensor | None,
    region: Tensor | None,
    arm_inside: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `bdkernels.fused_loss`: the loss of each sample and the gradient in ``prediction``."""
    losses = torch.empty(len(prediction))
    gradient = torch.empty_like(prediction)
    _module().fused_loss(
        tuple(x0.shape),
        _view(prediction),
        _view(x0),
        _view(gradient),
        losses.data_ptr(),
        t.data_ptr(),
        arm.data_ptr(),
        _address(arm_inside),
        seeds.data_ptr(),
        table.data_ptr(),
        tuple(table.shape),
        _image(trigger),
        _image(mask),
        _image(region),
        _address(flip),
        scale,
        torch.get_num_threads(),
    )
    return losses, gradient


MOST_CHANNELS: Final = 2048
"""Of an image in `group_norm`'s kernel, which keeps a few numbers a channel on its stack."""


def serves_norm(x: Tensor) -> bool:
    """Whether `group_norm` has a kernel for ``x``."""
    fits = x.dtype == torch.float32 and x.shape[1] <= MOST_CHANNELS
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in ``x``, ``weight`` and ``bias``."""
    dx, (dweight, dbias) = torch.empty_like(x), torch.empty(2, len(x), x.shape[1])
    dy = dy.contiguous(memory_format=torch.channels_last)
    _norm(x, x, weight, bias, statistics, groups, 0.0, shift, silu, (dy, dx, dweight, dbias))
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
    backward: tuple[Tensor, ...],
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
        *([tensor.data_ptr() for tensor in backward] or [0] * 4),
        torch.get_num_threads(),
    )
