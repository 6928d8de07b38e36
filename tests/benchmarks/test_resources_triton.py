"""Triton kernels compiled to machine code without a GPU: nothing is spilled, and contiguous tensors move 16 bytes at a time."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton

from bdkernels import testing
from benchmarks.resources_triton import ARCHITECTURES, resources


def check(architectures: tuple[int, ...], ops: tuple[str, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    before = triton.runtime.driver._active
    found = resources(architectures, ops, dtypes)
    assert triton.runtime.driver._active is before
    assert {name.split("/")[0] for name in found} == set(ops)
    for name, by_arch in found.items():
        assert set(by_arch) == {f"sm_{arch}" for arch in architectures}
        op, dtype, options, kernel = name.split("/")
        for arch, used in by_arch.items():
            assert used["stack"] == used["spills"] == 0, f"{name} on {arch}: {used}"
            assert 16 <= used["registers"] <= 168, f"{name} on {arch}: {used}"
            if options == "full-last" or kernel == "total_kernel":
                continue
            assert used["shared"] <= 64, f"{name} on {arch} moves values between threads: {used}"
            halves = op == "fused_step_" and options == "full" and dtype != "float32"  # beside a float32 history
            allowed = {"128", "64"} if op == "fused_loss" or halves else {"128"}  # a loss stores its float64 part
            assert "128" in used["stores"], f"{name} on {arch}: {used}"
            assert set(used["stores"]) <= allowed, f"{name} on {arch}: {used}"
            if op != "normal":
                assert "128" in used["loads"], f"{name} on {arch}: {used}"


def test_one_architecture() -> None:
    check((90,), ("normal", "fused_step", "fused_loss"), (torch.float32,))


@pytest.mark.slow
def test_every_architecture_op_and_dtype() -> None:
    check(ARCHITECTURES, testing.OPS, testing.DTYPES)
