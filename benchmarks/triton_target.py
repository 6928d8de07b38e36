"""A Triton driver with a target and no device: kernels are compiled for it from CPU tensors, with nothing to run them on."""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class Target(DriverBase):
    """What Triton asks a driver for; ``number`` names the device, by which Triton keeps compiled kernels."""

    def __init__(self, arch: int, number: int) -> None:
        self.arch, self.number = arch, number

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    @staticmethod
    def is_active() -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs here that could be timed")
