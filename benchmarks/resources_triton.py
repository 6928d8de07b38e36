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
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from bdkernels import NO_BAD_ROW, testing
from bdkernels import triton as kernels

from .machine_code import Row, cuobjdump, read, row

ARCHITECTURES: Final = (75, 80, 86, 89, 90, 100, 120)
SHAPE: Final = (2, 3, 32, 32)

_numbers = count(1000)


class Target(DriverBase):
    """A Triton driver for ``arch`` that keeps what was compiled and launches nothing."""

    def __init__(self, arch: int) -> None:
        self.arch, self.number = arch, next(_numbers)
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

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        """A number that no other has: Triton keeps the kernels of each device, and would not compile them again."""
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs here")


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
                target = Target(arch)
                triton.runtime.driver.set_active(target)
                getattr(kernels, op)(**case)
                for kernel, (cubin, shared) in target.compiled.items():
                    found.setdefault(f"{name}/{kernel}", {})[f"sm_{arch}"] = measure(cubin, shared)
    finally:
        triton.runtime.driver.set_active(before)
    return found
