"""From source to bits: a CUDA kernel by nvcc and a Triton kernel by its NVIDIA pipeline, run from their PTX."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from tests.ptx.executor import ORDERS, Fault, Kernel, compile_cu
from tests.ptx.triton_driver import simulated_gpu

N = 4099  # odd, and behind the last whole block
CU = """
#include <cuda_bf16.h>
struct Row { const float* x; __nv_bfloat16* y; float scale; int n; };
extern "C" __global__ void row(Row r, long long* least) {
    __shared__ float part[8];
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const float v = i < r.n ? r.x[i] * r.scale + 1.0f : 0.0f;
    if (i < r.n) r.y[i] = __float2bfloat16_rn(v > 0 ? v : v / 3.0f);
    float m = v;
    for (int o = 16; o; o /= 2) m = fminf(m, __shfl_xor_sync(~0u, m, o));
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = m;
    __syncthreads();
    if (threadIdx.x < 8) atomicMin(least, (long long)floorf(part[threadIdx.x] * 1024));
}
"""


@triton.jit
def row(x, y, least, scale, n, block: tl.constexpr):  # noqa: ANN001, ANN201, Triton reads the annotations
    i = tl.program_id(0) * block + tl.arange(0, block)
    v = tl.load(x + i, mask=i < n) * scale + 1.0
    tl.store(y + i, tl.where(v > 0, v, tl.div_rn(v, 3.0)).to(tl.bfloat16), mask=i < n)
    smallest = tl.min(tl.where(i < n, v, 0.0))
    tl.atomic_min(least, tl.floor(smallest * 1024).to(tl.int64))


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(N, generator=torch.Generator().manual_seed(0))
    x[::100] = torch.tensor([float("nan"), float("inf"), 1e-42] * 14)[: len(x[::100])]
    return x, torch.full((N,), float("nan"), dtype=torch.bfloat16), torch.full((1,), 2**60)


def check(x: torch.Tensor, y: torch.Tensor, least: torch.Tensor) -> None:
    v = x * 2.5 + 1
    expected = torch.where(v > 0, v, v / 3).bfloat16()
    assert torch.equal(expected.isnan(), y.isnan())
    assert torch.equal(expected.nan_to_num(7.0).view(torch.int16), y.nan_to_num(7.0).view(torch.int16))
    assert least.item() == int(torch.floor(v.nan_to_num(9.0).min() * 1024))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_nvcc(arch: str, tmp_path: Path) -> None:
    source = tmp_path / "row.cu"
    source.write_text(CU)
    kernel = Kernel(compile_cu(source, arch), "row")
    for order in ORDERS:
        x, y, least = inputs()
        given = x.data_ptr().to_bytes(8, "little") + y.data_ptr().to_bytes(8, "little")
        given += torch.tensor([2.5]).numpy().tobytes() + N.to_bytes(4, "little")
        kernel(-(-N // 256), 256, given, least, buffers=(y,), readonly=(x,), order=order)
        check(x, y, least)
    with pytest.raises(Fault, match="out of bounds"):
        kernel(-(-N // 256), 256, given, least, buffers=(y[:-1],), readonly=(x,))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_nvcc_says_what_is_wrong(tmp_path: Path) -> None:
    source = tmp_path / "wrong.cu"
    source.write_text("__global__ void k() { return 1 }")
    with pytest.raises(RuntimeError, match=r"wrong\.cu"):
        compile_cu(source, "sm_80")


@pytest.mark.parametrize("arch", [80, 90])
def test_triton(arch: int) -> None:
    before = triton.runtime.driver._active
    for order in ORDERS:
        x, y, least = inputs()
        with simulated_gpu(arch, order=order, readonly=(x,)):
            compiled = row[(triton.cdiv(N, 512),)](x, y, least, 2.5, N, block=512, enable_fp_fusion=False)
        assert compiled.metadata.target.arch == arch
        assert len(compiled.asm["cubin"]) > 1000
        check(x, y, least)
    with pytest.raises(Fault, match="read-only"), simulated_gpu(arch, readonly=(x, y)):
        row[(triton.cdiv(N, 512),)](x, y, least, 2.5, N, block=512, enable_fp_fusion=False)
    assert triton.runtime.driver._active is before


def test_an_unknown_device_is_named() -> None:
    with pytest.raises(ValueError, match="arch 42; expected one of 75, 80"), simulated_gpu(42):
        pass
