"""The Triton kernels as the PTX that a GPU is given, run on the CPU: the bits of ``reference.py``.

Every access is checked for bounds, alignment and races. A part of each op runs with every test; ``-m ladder`` runs all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import pytest
import torch
from torch import Tensor

import bdkernels as bdk
from bdkernels import backends, testing
from tests.ptx.executor import ORDERS
from tests.ptx.triton_driver import simulated_gpu

ARCHS: Final = (80, 90)
SHAPES: Final = ((2, 3, 5, 7), (1, 1, 1, 1), (2, 1, 35, 41), (2, 3, 8, 8))
"""Odd rows and a last group that is not full, one element, two tiles of which one has a tail, and whole vectors."""
IMAGES: Final = ("x", "model_output", "x0", "prediction")


@contextmanager
def on_gpu(arch: int, order: str = "ascending") -> Iterator[None]:
    """Ops on CPU tensors are launches of the Triton kernels on a simulated device."""
    with simulated_gpu(arch, order=order), bdk.use_backend("triton"):
        assert backends.name_for(torch.device("cpu"), torch.float32) == "triton"
        yield


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check(op: str, case: testing.Case, arch: int = 80, order: str = "ascending") -> None:
    with on_gpu(arch, order):
        testing.assert_matches_reference(op, case)


@pytest.mark.parametrize("op", testing.OPS)
def test_the_odd_case_of_each_op(op: str) -> None:
    """Channels-last, 105 elements, 16-bit stores: every conversion of layouts that Triton knows, with every option."""
    check(op, testing.random_case(op, generator(0), (2, 3, 5, 7), torch.bfloat16))


@pytest.mark.ladder
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("op", testing.OPS)
def test_op(op: str, full: bool, shape: testing.Shape, dtype: torch.dtype, arch: int) -> None:
    case = testing.random_case(op, generator(shape[-1]), shape, dtype, full)
    check(op, case, arch)
    if full and op != "normal":
        images = {name: case[name].contiguous() for name in IMAGES if name in case}
        check(op, case | images, arch)


@pytest.mark.ladder
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("op", testing.OPS)
def test_any_order_of_threads_and_blocks(op: str, order: str) -> None:
    check(op, testing.random_case(op, generator(1), (3, 1, 35, 41), torch.float16), 90, order)


@pytest.mark.ladder
@pytest.mark.parametrize("absent", [("trigger",), ("region", "arm_inside"), ("history",), ("trigger", "history")])
def test_step_without(absent: tuple[str, ...]) -> None:
    check("fused_step_", testing.random_step_case(generator(2), (3, 3, 5, 7)) | dict.fromkeys(absent))


@pytest.mark.ladder
@pytest.mark.parametrize("absent", [("mask",), ("trigger", "mask"), ("target",), ("flip",), ("region", "arm_inside")])
def test_noising_and_loss_without(absent: tuple[str, ...]) -> None:
    case = testing.random_noising_case(generator(3), (4, 3, 5, 7))
    check("fused_noising", case | dict.fromkeys(absent))
    loss = testing.random_loss_case(generator(3), (4, 3, 5, 7))
    check("fused_loss", loss | {name: None for name in absent if name in loss})


@pytest.mark.ladder
@pytest.mark.parametrize("name", ["trigger", "mask", "target", "region"])
def test_an_image_each(name: str) -> None:
    case = testing.random_noising_case(generator(4), (3, 2, 5, 7))
    image = torch.randn(3, 2, 5, 7, generator=generator(5))
    check("fused_noising", case | {name: image > 0 if name == "region" else image})


@pytest.mark.ladder
@pytest.mark.parametrize("m_dtype", testing.DTYPES)
@pytest.mark.parametrize("x_dtype", testing.DTYPES)
def test_mixed_dtypes_and_layouts(x_dtype: torch.dtype, m_dtype: torch.dtype) -> None:
    case = testing.random_step_case(generator(6), (2, 3, 8, 8), x_dtype)
    m = case["model_output"].to(m_dtype).contiguous(memory_format=torch.channels_last)
    check("fused_step_", case | {"model_output": m})


@pytest.mark.ladder
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_special_values_pass_and_the_bad_row_is_found(dtype: torch.dtype) -> None:
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-7, -6e-8, 65504.0]).to(dtype)
    for value in (torch.nan, torch.inf, -torch.inf):
        case = testing.random_step_case(generator(7), (3, 1, 1, 37), dtype)
        case["x"][0, 0, 0, :8] = special
        case["model_output"][1:, 0, 0, 36] = value
        check("fused_step_", case)


@pytest.mark.ladder
@pytest.mark.parametrize("value", [-1, 5, 2**40])
@pytest.mark.parametrize("name", ["arm", "step", "arm_inside", "t"])
def test_an_index_outside_the_table_makes_that_sample_nan(name: str, value: int) -> None:
    """Nothing is read outside, which the executor would say; others are as before, and no store is made."""
    steps = name != "t"
    case = (testing.random_step_case if steps else testing.random_noising_case)(generator(8), (3, 1, 3, 5))
    if steps:
        case["region"][:] = name == "arm_inside"
    op = "fused_step" if steps else "fused_noising"
    with on_gpu(80):
        before = getattr(torch.ops.bdk, op)(**case)
        case[name][1] = value if steps else 7
        after = getattr(torch.ops.bdk, op)(**case)
        assert after[1].isnan().all()
        testing.assert_same_bits("the others", after[::2], before[::2])
        if name in ("arm", "step"):
            own = {k: v.clone() if isinstance(v, Tensor) else v for k, v in case.items()}
            torch.ops.bdk.fused_step_(**own, bad_row=torch.tensor(bdk.NO_BAD_ROW))
            testing.assert_same_bits("history", own["history"][:, 1], case["history"][:, 1])
