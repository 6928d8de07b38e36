"""Every backend on a CUDA device: the bits of the reference on the CPU, however often it is asked."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bdkernels as bdk
from bdkernels import backends, testing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

SHAPES = ((2, 3, 5, 7), (1, 1, 1, 1), (2, 1, 35, 41), (3, 3, 32, 32), (2, 4, 64, 64), (0, 3, 4, 4))
REPEATS = 250


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=["reference", "triton", "cuda"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn is in force."""
    if reason := backends.missing(request.param):
        pytest.skip(reason)
    with bdk.use_backend(request.param):
        assert backends.name_for(torch.device("cuda"), torch.float32) == request.param
        yield request.param


@pytest.mark.parametrize("op", testing.OPS)
def test_one_case_of_each_op(op: str) -> None:
    testing.assert_matches_reference(op, testing.random_case(op, generator(0), (2, 3, 5, 7), torch.bfloat16), "cuda")


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("op", testing.OPS)
def test_op(op: str, full: bool, shape: testing.Shape, dtype: torch.dtype) -> None:
    """Where full, channels-last and contiguous."""
    case = testing.random_case(op, generator(shape[-1]), shape, dtype, full)
    testing.assert_matches_reference(op, case, "cuda")
    contiguous = {name: value.contiguous() if isinstance(value, Tensor) else value for name, value in case.items()}
    testing.assert_matches_reference(op, contiguous, "cuda")


@pytest.mark.parametrize("op", ["normal", "fused_step", "fused_noising", "fused_loss"])
def test_equal_arguments_give_equal_bits(op: str) -> None:
    """Also the loss, whose sums have a fixed order. The device is kept busy: nothing is waited for in between."""
    case = testing.random_case(op, generator(1), (16, 3, 64, 64), torch.bfloat16)
    moved = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in case.items()}
    results = [getattr(torch.ops.bdk, op)(**moved) for _ in range(REPEATS)]
    for result in results[1:]:
        for got, expected in zip(*((r if isinstance(r, tuple) else (r,)) for r in (result, results[0])), strict=True):
            testing.assert_same_bits(op, got, expected)


def test_an_index_outside_the_table_makes_that_sample_nan(backend: str) -> None:
    if backend == "reference":
        pytest.skip("plain torch asserts on the device, which ends the process")
    case = testing.random_step_case(generator(2), (3, 3, 8, 8))
    case = {name: value.cuda() for name, value in case.items()}
    case["region"][:] = False
    for name in ("arm", "step"):
        wrong = case[name].clone()
        wrong[1] = 2**40
        out = torch.ops.bdk.fused_step(**case | {name: wrong})
        assert out.isnan().flatten(1).all(1).tolist() == [False, True, False]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool: str, backend: str) -> None:
    pytest_one_case = [sys.executable, "-m", "pytest", "-x", __file__, "-k", f"one_case and {backend}"]
    done = subprocess.run(
        ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", *pytest_one_case],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
