"""Faults to plant in the device code, each with the quickest rung of the ladder that must see it.

Nothing here is about how a kernel is written: a fault that no rung sees is a hole in the tests.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).parents[2]

RUNGS: Final = {
    "interpreter": ("tests/triton/interpreted.py",),
    "shim": ("tests/cuda/test_shim.py",),
    "sanitizers": ("tests/cuda/test_sanitized.py",),
    "PTX of nvcc": ("tests/ptx/test_cuda_kernels.py", "-k", "one_case or outside or special or 16_bytes"),
    "PTX of Triton": ("tests/ptx/test_triton_kernels.py", "-k", "one_case or outside"),
}
"""What pytest runs for each rung."""

# How a test says that a kernel is wrong. Source that does not compile says something else, and does not count.
_SEEN: Final = re.compile(r"^E +(AssertionError|assert |(\w+\.)*Fault: |(\w+\.)*PtxError: .*approximate)", re.MULTILINE)


class Fault(NamedTuple):
    """``before`` stands once in ``file`` and becomes ``after``."""

    name: str
    rung: str
    file: str
    before: str
    after: str


_HEADERS, _CUDA, _TRITON = "csrc/include/bdk/", "csrc/cuda/", "bdkernels/triton/"

FAULTS: Final = (
    Fault("a Philox multiplier", "shim", _HEADERS + "philox.h", "PHILOX_M0 = 0xD2511F53", "PHILOX_M0 = 0xD2511F57"),
    Fault("nine rounds of Philox", "shim", _HEADERS + "philox.h", "PHILOX_ROUNDS = 10", "PHILOX_ROUNDS = 9"),
    Fault("the order of Philox words", "shim", _HEADERS + "philox.h", "c[1] = p1;", "c[1] = p0;"),
    Fault("sine for cosine", "shim", _HEADERS + "normal.h", "z[i] = radius * cos;", "z[i] = radius * sin;"),
    Fault("the last bit of a coefficient", "shim", _HEADERS + "normal.h", "0.33333883f", "0.33333886f"),
    Fault(
        "two coefficients swapped",
        "shim",
        _HEADERS + "step.h",
        "row[Step::A] * in.x_t + row[Step::B] * in.m",
        "row[Step::B] * in.x_t + row[Step::A] * in.m",
    ),
    Fault(
        "no clamp of x0",
        "shim",
        _HEADERS + "step.h",
        "return clamp(x0, row[Step::LOW0], row[Step::HIGH0]);",
        "return x0;",
    ),
    Fault("a clamp that loses NaN", "shim", _HEADERS + "step.h", "low > v ? low : v", "v > low ? v : low"),
    Fault("another sum of the loss", "shim", _HEADERS + "loss.h", "2.0f * weight", "weight"),
    Fault("another stream of noise", "shim", _CUDA + "step.cu", "index), STREAM_STEP", "index), STREAM_TRAINING"),
    Fault("the wrong arm inside", "shim", _CUDA + "tensor.cuh", "__ldg(arm_inside + sample)", "__ldg(arm + sample)"),
    Fault("a stride of one sample", "shim", _CUDA + "step.cu", "j * size.samples * size.elements", "j * size.elements"),
    Fault("a grid without its last block", "shim", _CUDA + "launch.cuh", "(n + divisor - 1) / divisor", "n / divisor"),
    Fault(
        "vectors where memory is not aligned",
        "PTX of nvcc",
        _CUDA + "launch.cuh",
        "view->data) % 16 == 0",
        "view->data)",
    ),
    Fault("a tail longer by one", "sanitizers", _CUDA + "tensor.cuh", "? int(left)", "? int(left) + 1"),
    Fault("a load without its mask", "sanitizers", _CUDA + "tensor.cuh", "if (i < at.count) out[i]", "out[i]"),
    Fault("a missing barrier", "PTX of nvcc", _CUDA + "training.cu", "__syncthreads();", ""),
    Fault("bfloat16 cut, not rounded", "PTX of nvcc", _CUDA + "tensor.cuh", "cvt.rn.bf16", "cvt.rz.bf16"),
    Fault(
        "rows outside the table read",
        "PTX of nvcc",
        _CUDA + "tensor.cuh",
        "if (!known)",
        "if (!known && arm > 1 << 30)",
    ),
    Fault("products fused into sums by nvcc", "PTX of nvcc", "setup.py", "-fmad=false", "-fmad=true"),
    Fault("approximate roots by nvcc", "PTX of nvcc", "setup.py", "-prec-sqrt=true", "-prec-sqrt=false"),
    Fault(
        "a plain store for an atomic",
        "PTX of nvcc",
        _CUDA + "step.cu",
        "atomicMin(reinterpret_cast<long long*>(bad_row), static_cast<long long>(index));",
        "*bad_row = index;",
    ),
    Fault(
        "step and stream swapped",
        "interpreter",
        _TRITON + "device.py",
        "zero + step, zero + stream",
        "zero + stream, zero + step",
    ),
    Fault(
        "words paired wrongly",
        "interpreter",
        _TRITON + "device.py",
        "tl.join(w0, w2), tl.join(w1, w3)",
        "tl.join(w0, w1), tl.join(w2, w3)",
    ),
    Fault(
        "a clamp that loses NaN in Triton",
        "interpreter",
        _TRITON + "step.py",
        "tl.where(v < low, low, v)",
        "tl.where(v > low, v, low)",
    ),
    Fault("the clean arm poisoned", "interpreter", _TRITON + "noising.py", "arm + sample) > 0", "arm + sample) >= 0"),
    Fault("one part of a loss for all", "interpreter", _TRITON + "loss.py", "losses + sample", "losses + sample * 0"),
    Fault("no flip", "interpreter", _TRITON + "device.py", "width - 1 - 2 *", "0 * width - 0 *"),
    Fault(
        "a store without its mask in Triton",
        "PTX of Triton",
        _TRITON + "step.py",
        "x_next.to(out.dtype.element_ty), mask=valid",
        "x_next.to(out.dtype.element_ty)",
    ),
    Fault(
        "products fused into sums by Triton",
        "PTX of Triton",
        _TRITON + "launch.py",
        "enable_fp_fusion=False",
        "enable_fp_fusion=True",
    ),
    Fault("approximate roots by Triton", "PTX of Triton", _TRITON + "device.py", "tl.sqrt_rn(", "tl.sqrt("),
    Fault(
        "rows outside the table read in Triton",
        "PTX of Triton",
        _TRITON + "device.py",
        "(arm >= 0) & (arm < arms) & (row >= 0)",
        "(arm >= 0) & (row >= 0)",
    ),
)


def copy_of_source(folder: Path) -> Path:
    """The device code and its tests, without compiled files, to plant a fault in."""
    for name in ("benchmarks", "csrc", "bdkernels", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def plant(fault: Fault, folder: Path) -> None:
    """Changes the copy. Raises ``ValueError`` where the source no longer has what the fault replaces."""
    file = folder / fault.file
    text = file.read_text()
    if (times := text.count(fault.before)) != 1:
        raise ValueError(f"`{fault.before}` stands {times} times in {fault.file}: expected once")
    file.write_text(text.replace(fault.before, fault.after))


def climb(rung: str, folder: Path) -> tuple[bool, bool, str]:
    """Runs a rung on a copy: whether it passed, whether it saw a wrong kernel, and what pytest said."""
    interpreted = {"TRITON_INTERPRET": "1" if rung == "interpreter" else "0"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *RUNGS[rung]],
        cwd=folder,
        env={**os.environ, **interpreted, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode == 0, done.returncode == 1 and bool(_SEEN.search(done.stdout)), done.stdout[-3000:]
