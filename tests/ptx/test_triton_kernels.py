"""The Triton kernels as the PTX that a GPU is given, run on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

import bdkernels as bdk
from bdkernels import backends
from tests.ptx.op_checks import OpChecks
from tests.ptx.triton_driver import simulated_gpu


@contextmanager
def triton_on_gpu(arch: int, *, order: str = "ascending") -> Iterator[None]:
    with simulated_gpu(arch, order=order), bdk.use_backend("triton"):
        assert backends.name_for(torch.device("cpu"), torch.float32) == "triton"
        yield


class TestTriton(OpChecks):
    on_gpu = staticmethod(triton_on_gpu)
    # Channels-last and odd, in 16 bits: every conversion of layouts that Triton has for these kernels.
    shape_of_part = (2, 3, 5, 7)
