"""What the machine code of each op would take on a device at best: calculated, never measured.

    bytes        of images, an element: 16 for each 128-bit access of a thread, over its elements
    bound        the same if nothing were moved twice: x, m in, x' out, and each option that the code has
    time         ELEMENTS elements at the device's bandwidth, or at one instruction a clock of each scheduler

The larger of the two times bounds the op. Every instruction of the code counts, also of a branch that a call does not take.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from .machine_code import Row

ELEMENTS: Final = 256 * 3 * 64 * 64
WARP: Final = 32
SCHEDULERS: Final = 4
"""Of one multiprocessor, of every architecture since Volta."""


class Device(NamedTuple):
    """From NVIDIA's data sheets: bytes/s of memory, multiprocessors, highest clock in Hz."""

    name: str
    arch: str
    bandwidth: float
    multiprocessors: int
    clock: float


DEVICES: Final = (
    Device("A100 80GB", "sm_80", 2.039e12, 108, 1.41e9),
    Device("H100 SXM", "sm_90", 3.35e12, 132, 1.98e9),
    Device("H200", "sm_90", 4.8e12, 132, 1.98e9),
    Device("B200", "sm_100", 8.0e12, 148, 1.965e9),
)


class Kernel(NamedTuple):
    """``optional`` bytes an element are of options in the code; ``own`` of the 64-bit accesses are of no image."""

    op: str
    name: str
    images: int
    optional: int
    own: int | None = None


_IMAGE: Final = 4
"""Bytes of an element of a trigger, a mask, a target or a history slot. A region's one byte is left out."""

KERNELS: Final = {
    "cuda": (
        Kernel("normal", "normal_kernel<{T}>", 1, 0),
        Kernel("fused_step", "step_kernel<{T}, {T}, false, false>", 3, _IMAGE),
        Kernel("fused_step_ with 4 slots, 2 stores", "step_kernel<{T}, {T}, true, true>", 3, 7 * _IMAGE),
        Kernel("fused_noising", "noising_kernel<float, {T}>", 1, 4 * _IMAGE),
        Kernel("fused_loss", "loss_kernel<{T}, float>", 2, 3 * _IMAGE),
    ),
    "triton": (
        Kernel("normal", "normal/{dtype}/bare/normal_kernel", 1, 0),
        Kernel("fused_step", "fused_step/{dtype}/bare/step_kernel", 3, 0),
        Kernel("fused_step_ with 3 slots, 2 stores", "fused_step_/{dtype}/full/step_kernel", 3, 6 * _IMAGE, 4),
        Kernel("fused_noising", "fused_noising/{dtype}/bare/noising_kernel", 1, _IMAGE),
        Kernel("fused_loss", "fused_loss/{dtype}/bare/loss_kernel", 2, 0),
    ),
}
DTYPES: Final = {"float32": ("float", 4), "bfloat16": ("Bfloat16", 2), "float16": ("Float16", 2)}


def elements_of_a_thread(backend: str, op: str, dtype: str) -> int:
    """A CUDA thread makes 16 bytes of its narrowest tensor; a Triton thread always two groups of four."""
    return 4 if backend == "cuda" and dtype == "float32" else 8


def image_bytes(row: Row, own: int | None) -> int:
    """Bytes of images that a thread moves: 128 bits at a time, or 64 where ``own`` says which of those are others."""
    wide = row["loads"].get("128", 0) - row["constant"].get("128", 0) + row["stores"].get("128", 0)
    half = 0 if own is None else row["loads"].get("64", 0) + row["stores"].get("64", 0) - own
    return 16 * wide + 8 * half


def figures(backend: str, kernel: Kernel, dtype: str, row: Row, device: Device) -> dict[str, Any]:
    """One line of the table: see the module."""
    count = elements_of_a_thread(backend, kernel.op, dtype)
    moved = image_bytes(row, kernel.own)
    accesses = sum(row["loads"].values()) + sum(row["stores"].values())
    size = DTYPES[dtype][1]
    warps = ELEMENTS / count / WARP
    issue = row["instructions"] * warps / (device.multiprocessors * SCHEDULERS * device.clock)
    return {
        "backend": backend,
        "op": kernel.op,
        "dtype": dtype,
        "device": device.name,
        "registers": row["registers"],
        "bytes": moved / count,
        "bound": kernel.images * size + kernel.optional,
        "accesses_per_16_bytes": round(16 * accesses / moved, 2),
        "arithmetic_per_element": round(row["arithmetic"] / count, 1),
        "memory_us": round(1e6 * ELEMENTS * moved / count / device.bandwidth, 2),
        "issue_us": round(1e6 * issue, 2),
    }


def calculated(kernels: Mapping[str, Mapping[str, Mapping[str, Row]]]) -> list[dict[str, Any]]:
    """The figures of every op of both backends, in every dtype, on every device."""
    found = []
    for backend, listed in KERNELS.items():
        for kernel in listed:
            for dtype, (name, _) in DTYPES.items():
                rows = kernels[backend][kernel.name.format(T=name, dtype=dtype)]
                found += [figures(backend, kernel, dtype, rows[d.arch], d) for d in DEVICES]
    return found


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown, labelled as calculated. Per normal: the arithmetic of an element of the op ``normal``."""
    names = list(lines[0])
    head = [
        f"Calculated, not measured: {ELEMENTS} elements.",
        "",
        f"| {' | '.join(names)} |",
        "| --- " * len(names) + "|",
    ]
    return "\n".join([*head, *(f"| {' | '.join(str(line[n]) for n in names)} |" for line in lines)])
