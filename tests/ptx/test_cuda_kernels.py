"""The CUDA kernels as the PTX that nvcc makes of them, run on the CPU by the launchers of the extension."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import pytest
import torch

from bdkernels import testing
from tests.ptx.cuda_driver import kernels, simulated_cuda
from tests.ptx.op_checks import ARCHS, OpChecks, generator

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@contextmanager
def cuda_on_gpu(arch: int, *, order: str = "ascending") -> Iterator[None]:
    with simulated_cuda(arch, order) as launched:
        yield
        assert launched


class TestCuda(OpChecks):
    on_gpu = staticmethod(cuda_on_gpu)
    shape_of_part = (2, 1, 16, 24)  # one channel is contiguous in both layouts: whole vectors

    @pytest.mark.ladder
    @pytest.mark.parametrize("arch", ARCHS)
    def test_every_kernel(self, arch: int) -> None:
        """All that nvcc makes are launched by some call, and each of these calls has the bits of the reference."""
        shape = (2, 1, 16, 24)
        with simulated_cuda(arch) as launched:
            for dtype, other, full in product(testing.DTYPES, testing.DTYPES, (True, False)):
                testing.assert_matches_reference("normal", testing.random_normal_case(generator(0), shape, dtype))
                step = testing.random_step_case(generator(0), shape, dtype)
                step["model_output"] = step["model_output"].to(other)
                for absent in ((), ("history",)):
                    without = () if full else ("region", "arm_inside")
                    testing.assert_matches_reference("fused_step", step | dict.fromkeys((*absent, *without)))
                for op in ("fused_noising", "fused_loss"):
                    testing.assert_matches_reference(op, testing.random_case(op, generator(0), shape, dtype, full))
            for op in testing.OPS:
                for full in (True, False):
                    testing.assert_matches_reference(
                        op, testing.random_case(op, generator(0), (1, 1, 1, 37), torch.float32, full)
                    )
            step = testing.random_step_case(generator(0), (1, 1, 1, 37))
            testing.assert_matches_reference("fused_step", step | {"history": None})
            testing.assert_matches_reference("fused_step", step | {"region": None, "arm_inside": None})
        assert set(launched) == kernels(arch)
