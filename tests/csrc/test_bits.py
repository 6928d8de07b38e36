"""The rows, compiled for aarch64 and run under QEMU, and under the sanitizers here, make the bits of the reference."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bdkernels import columns, noise, reference
from bdkernels.columns import Step

ROOT = Path(__file__).parents[2]
HEIGHT, WIDTH = 3, 61
SEEDS = np.array([0x123456789ABCDEF, -5], np.int64)
TARGETS = {
    "aarch64": (["aarch64-linux-gnu-g++", "-static", "-O2"], ["qemu-aarch64"]),
    "sanitized": (["g++", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"], []),
}


def normals(dtype: torch.dtype, stream: int) -> Tensor:
    return torch.from_numpy(noise.normal(SEEDS, (1, HEIGHT, WIDTH), 2**32 - 1, stream)).to(dtype)


def expected() -> list[Tensor]:
    """What bits.cpp prints, line by line."""
    flat = normals(torch.float32, 20).flatten()
    table = flat[: 2 * columns.STEP_COLUMNS].reshape(2, 1, -1).clone()
    table[..., Step.LOW], table[..., Step.HIGH] = -1, 1
    seeds, arm, row = torch.from_numpy(SEEDS), torch.tensor([0, 1]), torch.zeros(2, dtype=torch.int64)
    x_t, m, r = normals(torch.float16, 21), normals(torch.bfloat16, 22), normals(torch.float32, 23)[:1]
    x_next = reference.fused_step(x_t, m, table, arm, row, seeds, r, None, None, None)
    noising_table = table.flatten()[: 2 * columns.NOISING_COLUMNS].reshape(2, 1, -1)
    x0 = (torch.arange(2 * HEIGHT * WIDTH) * 37 % 256).to(torch.uint8).reshape(2, 1, HEIGHT, WIDTH)
    common = (row, arm, seeds, noising_table)
    flip = torch.tensor([False, True])
    x_noised = reference.fused_noising(x0, *common, None, r, None, flip, None, None, torch.float32)
    prediction = normals(torch.float32, 24)
    value, gradient = reference.fused_loss(prediction, x0, *common, r, None, flip, None, None, 0.5)
    return [
        *(normals(d, 4) for d in (torch.float32, torch.bfloat16, torch.float16)),
        x_next,
        x_noised,
        *value,
        gradient,
    ]


@pytest.mark.parametrize("target", TARGETS)
def test_bits(target: str, tmp_path: Path) -> None:
    compiler, runner = TARGETS[target]
    for tool in (compiler[0], *runner):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed: apt-get install g++-aarch64-linux-gnu qemu-user")
    csrc = ROOT / "csrc"
    flags = ["-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi", "-I", csrc, "-I", csrc / "include"]
    sources = [ROOT / "tests/csrc/bits.cpp", csrc / "cpu/rows_baseline.cpp", csrc / "cpu/conv_baseline.cpp"]
    subprocess.run([*compiler, *flags, *sources, "-o", tmp_path / "bits"], check=True)
    printed = subprocess.run([*runner, tmp_path / "bits"], check=True, capture_output=True, text=True).stdout
    for line, want in zip(printed.splitlines(), expected(), strict=True):
        name, digits = line.split()
        got = torch.frombuffer(bytearray.fromhex(digits), dtype=want.dtype).reshape(want.shape)
        if name == "loss":
            torch.testing.assert_close(got, want, rtol=1e-7, atol=0)
        else:
            assert torch.equal(got.view(torch.uint8), want.contiguous().view(torch.uint8)), name
