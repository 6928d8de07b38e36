"""How the kernels are launched: one program for each tile of each sample, in a shape chosen by architecture."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Final, NamedTuple

import torch
import triton
from torch import Tensor

from .device import horner

INTERPRETED: Final = not isinstance(horner, triton.JITFunction)
"""Whether the process was started with ``TRITON_INTERPRET=1``: kernels then run in NumPy, on CPU tensors."""

WARPS: Final = {7: 4, 8: 4, 9: 4, 10: 4, 12: 4}
"""Warps of a full-sized program by major compute capability: no device has asked for another number yet."""

GROUPS_PER_WARP: Final = 64
"""Two groups a thread: 16-byte loads and stores of 16-bit tensors, and a row is read once for eight elements."""

MOST_ELEMENTS: Final = 2**31 - 2**13
"""Of one sample, whose elements are numbered in 32 bits; addresses have 64."""


VARYING: Final = (
    *("seeds", "step", "t", "table", "arm", "arm_inside", "flip", "bad_row"),
    *("arms", "rows", "step_stride", "noise_stream", "channels", "pixels", "width", "tiles"),
)
"""Arguments of the kernels for whose values Triton must not compile anew."""


def device_type() -> str:
    """Type of torch device that Triton's driver is for: ``cpu`` where kernels are interpreted, empty without a driver."""
    if INTERPRETED:
        return "cpu"
    try:
        return str(triton.runtime.driver.active.get_active_torch_device().type)
    except RuntimeError:
        return ""


class Tiling(NamedTuple):
    """How each sample is cut: ``tiles`` programs of ``groups`` groups of four elements, ``warps`` warps each."""

    groups: int
    tiles: int
    warps: int


@cache
def _most_warps(device: int) -> int:
    return WARPS.get(triton.runtime.driver.active.get_current_target().arch // 10, 4)


def tiling(elements: int) -> Tiling:
    """How to cut samples of ``elements`` elements on the current device.

    Raises:
        ValueError: A sample has more than `MOST_ELEMENTS`.
    """
    if elements > MOST_ELEMENTS:
        raise ValueError(f"a sample has {elements} elements: expected at most {MOST_ELEMENTS} on this backend")
    most = 4 if INTERPRETED else _most_warps(triton.runtime.driver.active.get_current_device())
    warps = min(triton.next_power_of_2(triton.cdiv(max(elements, 1), 4 * GROUPS_PER_WARP)), most)
    groups = warps * GROUPS_PER_WARP
    return Tiling(groups, triton.cdiv(elements, 4 * groups), warps)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it ``device``. CPU tensors are for an interpreter of kernels."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def launch(kernel: Any, samples: int, elements: int, *, stored: torch.dtype, **arguments: Any) -> None:
    """Runs ``kernel`` on every tile of every sample.

    ``stored`` is the widest dtype that it stores, ``arguments`` are its own but those that say how it is cut.
    """
    groups, tiles, warps = tiling(elements)
    if samples * tiles:
        kernel[(samples * tiles,)](
            **arguments,
            elements=elements,
            tiles=tiles,
            VECTOR=16 // stored.itemsize,
            GROUPS=groups,
            num_warps=warps,
            enable_fp_fusion=False,
        )


def last(tensor: Tensor) -> bool:
    """Whether an image batch is channels-last."""
    return not tensor.is_contiguous()


def stride(tensor: Tensor | None) -> int:
    """Elements from one sample's image to the next, 0 where all share one."""
    return 0 if tensor is None or len(tensor) == 1 else tensor.stride(0)
