"""The row of every Triton kernel, compiled without a GPU.

The ops run on CPU tensors under a driver that has a target and launches nothing, so what is compiled is what a GPU of that
architecture would be given: the same specialisation, options and ``ptxas``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from types import SimpleNamespace
from typing import Any, Final

import torch
import triton
from torch import Tensor

from bdkernels import NO_BAD_ROW, testing
from bdkernels import triton as kernels

from .machine_code import Row, cuobjdump, read, row
from .triton_target import Target

ARCHITECTURES: Final = (75, 80, 86, 89, 90, 100, 120)
SHAPE: Final = (2, 3, 32, 32)

_numbers = count(1000)


class Compiler(Target):
    """Keeps what was compiled and launches nothing; a device of its own each, or Triton would not compile again."""

    def __init__(self, arch: int) -> None:
        super().__init__(arch, next(_numbers))
        self.compiled: dict[str, tuple[bytes, int]] = {}
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": 2**20},
            load_binary=self._keep,
            unload_module=lambda _: None,
        )

    def _keep(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[str, str, int, int, int]:
        self.compiled[name] = cubin, shared
        return name, name, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *_: None


def measure(cubin: bytes, shared: int) -> Row:
    """The row of one kernel, with the shared memory that its launch asks for."""
    tool = cuobjdump()
    if tool is None:
        raise FileNotFoundError("cuobjdump is not in this triton: expected it in backends/nvidia/bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return row(read(tool, "-res-usage", file.name), read(tool, "-sass", file.name)) | {"shared": shared}


def cases(ops: Sequence[str], dtypes: Sequence[torch.dtype]) -> Iterator[tuple[str, str, testing.Case]]:
    """Name, op and arguments: each op and dtype, bare, with every option, and channels-last with every option."""
    generator = torch.Generator().manual_seed(0)
    for op in ops:
        for dtype in dtypes:
            for options in ("bare", "full", "full-last") if op != "normal" else ("bare",):
                case = testing.random_case(op, generator, SHAPE, dtype, full=options != "bare")
                if options == "full":
                    case = {k: v.contiguous() if isinstance(v, Tensor) else v for k, v in case.items()}
                if op == "fused_step_":
                    case["bad_row"] = torch.tensor(NO_BAD_ROW)
                yield f"{op}/{str(dtype).removeprefix('torch.')}/{options}", op, case


def resources(
    architectures: Sequence[int] = ARCHITECTURES,
    ops: Sequence[str] = testing.OPS,
    dtypes: Sequence[torch.dtype] = testing.DTYPES,
) -> dict[str, dict[str, Row]]:
    """``{kernel: {architecture: resources}}`` of every case, the names of architectures being ``sm_80`` and so on."""
    found: dict[str, dict[str, Row]] = {}
    before = triton.runtime.driver._active
    try:
        for arch in architectures:
            for name, op, case in cases(ops, dtypes):
                target = Compiler(arch)
                triton.runtime.driver.set_active(target)
                getattr(kernels, op)(**case)
                for kernel, (cubin, shared) in target.compiled.items():
                    found.setdefault(f"{name}/{kernel}", {})[f"sm_{arch}"] = measure(cubin, shared)
    finally:
        triton.runtime.driver.set_active(before)
    return found
