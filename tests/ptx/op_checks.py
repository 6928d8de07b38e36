"""What is asked of a GPU backend's PTX, whichever compiler made it: the bits of ``reference.py``, and every access checked.

A part of each op runs with every test; ``-m ladder`` runs all.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final

import pytest
import torch
from torch import Tensor

import bdkernels as bdk
from bdkernels import reference, testing
from bdkernels.columns import Step
from tests.ptx.executor import ORDERS, Fault

ARCHS: Final = (80, 90)
SHAPES: Final = ((2, 3, 5, 7), (1, 1, 1, 1), (2, 1, 35, 41), (1, 3, 16, 24))
"""Odd rows and a last group that is not full, one element, blocks of which the last has a tail, and whole vectors."""
IMAGES: Final = ("x", "model_output", "x0", "prediction")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class OpChecks:
    """A backend's tests; in ``on_gpu(arch, order=...)`` ops on CPU tensors are its launches on a simulated device."""

    on_gpu: Callable[..., AbstractContextManager[Any]]
    shape_of_part: testing.Shape

    def check(self, op: str, case: testing.Case, arch: int = 80, order: str = "ascending") -> None:
        with self.on_gpu(arch, order=order):
            testing.assert_matches_reference(op, case)

    @pytest.mark.parametrize("op", testing.OPS)
    def test_one_case_of_each_op(self, op: str) -> None:
        self.check(op, testing.random_case(op, generator(0), self.shape_of_part, torch.bfloat16))

    @pytest.mark.ladder
    @pytest.mark.parametrize("arch", ARCHS)
    @pytest.mark.parametrize("dtype", testing.DTYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("full", [True, False])
    @pytest.mark.parametrize("op", testing.OPS)
    def test_op(self, op: str, full: bool, shape: testing.Shape, dtype: torch.dtype, arch: int) -> None:
        """Where full, channels-last and contiguous."""
        case = testing.random_case(op, generator(shape[-1]), shape, dtype, full)
        self.check(op, case, arch)
        if full and op != "normal":
            images = {name: case[name].contiguous() for name in IMAGES if name in case}
            self.check(op, case | images, arch)

    @pytest.mark.ladder
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("op", testing.OPS)
    def test_any_order_of_threads_and_blocks(self, op: str, order: str) -> None:
        self.check(op, testing.random_case(op, generator(1), (3, 1, 35, 41), torch.float16), 90, order)

    @pytest.mark.ladder
    @pytest.mark.parametrize("absent", [("trigger",), ("region", "arm_inside"), ("history",), ("trigger", "history")])
    def test_step_without(self, absent: tuple[str, ...]) -> None:
        self.check("fused_step_", testing.random_step_case(generator(2), (3, 3, 5, 7)) | dict.fromkeys(absent))

    @pytest.mark.ladder
    @pytest.mark.parametrize(
        "absent", [("mask",), ("trigger", "mask"), ("target",), ("flip",), ("region", "arm_inside")]
    )
    def test_noising_and_loss_without(self, absent: tuple[str, ...]) -> None:
        case = testing.random_noising_case(generator(3), (4, 3, 5, 7))
        self.check("fused_noising", case | dict.fromkeys(absent))
        loss = testing.random_loss_case(generator(3), (4, 3, 5, 7))
        self.check("fused_loss", loss | {name: None for name in absent if name in loss})

    @pytest.mark.ladder
    @pytest.mark.parametrize("name", ["trigger", "mask", "target", "region"])
    def test_an_image_each(self, name: str) -> None:
        case = testing.random_noising_case(generator(4), (3, 2, 5, 7))
        image = torch.randn(3, 2, 5, 7, generator=generator(5))
        self.check("fused_noising", case | {name: image > 0 if name == "region" else image})

    @pytest.mark.ladder
    @pytest.mark.parametrize("m_dtype", testing.DTYPES)
    @pytest.mark.parametrize("x_dtype", testing.DTYPES)
    def test_mixed_dtypes_and_layouts(self, x_dtype: torch.dtype, m_dtype: torch.dtype) -> None:
        case = testing.random_step_case(generator(6), (2, 3, 8, 8), x_dtype)
        m = case["model_output"].to(m_dtype).contiguous(memory_format=torch.channels_last)
        self.check("fused_step_", case | {"model_output": m, "x": case["x"].contiguous()})

    @pytest.mark.ladder
    @pytest.mark.parametrize("name", ["x", "model_output", "trigger", "table", "history"])
    def test_what_is_not_on_16_bytes(self, name: str) -> None:
        """A view that starts at the second element of its memory: no access may be wider than it allows."""
        case = testing.random_step_case(generator(10), (2, 1, 16, 24))
        memory = torch.cat([torch.zeros(1), case[name].flatten()])
        with self.on_gpu(80):
            got = torch.ops.bdk.fused_step(**case | {name: memory[1:].view(case[name].shape)})
        testing.assert_same_bits("output", got, reference.fused_step(**case))

    @pytest.mark.ladder
    @pytest.mark.parametrize("dtype", testing.DTYPES)
    def test_special_values_pass_and_the_bad_row_is_found(self, dtype: torch.dtype) -> None:
        special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-7, -6e-8, 65504.0]).to(dtype)
        for value in (torch.nan, torch.inf, -torch.inf):
            case = testing.random_step_case(generator(7), (3, 1, 1, 37), dtype)
            case["x"][0, 0, 0, :8] = special
            case["model_output"][1:, 0, 0, 36] = value
            self.check("fused_step_", case)

    @pytest.mark.ladder
    @pytest.mark.parametrize("value", [-1, 7, 2**40])
    @pytest.mark.parametrize("name", ["arm", "step", "arm_inside", "t"])
    def test_an_index_outside_the_table_makes_that_sample_nan(self, name: str, value: int) -> None:
        """Nothing is read outside, which the executor would say; others are as before, and no store is made."""
        steps = name != "t"
        case = (testing.random_step_case if steps else testing.random_noising_case)(generator(8), (3, 1, 3, 5))
        case["region"][:] = name == "arm_inside"
        op = "fused_step" if steps else "fused_noising"
        with self.on_gpu(80):
            before = getattr(torch.ops.bdk, op)(**case)
            case[name][1] = value
            after = getattr(torch.ops.bdk, op)(**case)
            assert after[1].isnan().all()
            testing.assert_same_bits("the others", after[::2], before[::2])
            if name in ("arm", "step"):
                own = {k: v.clone() if isinstance(v, Tensor) else v for k, v in case.items()}
                torch.ops.bdk.fused_step_(**own, bad_row=torch.tensor(bdk.NO_BAD_ROW))
                testing.assert_same_bits("history", own["history"][:, 1], case["history"][:, 1])

    @pytest.mark.ladder
    @pytest.mark.parametrize("name", ["seeds", "arm", "step", "arm_inside"])
    def test_an_argument_that_is_too_short_is_a_fault(self, name: str) -> None:
        """The memory of each argument is known to the byte: what ``ops.py`` refuses before, the executor finds."""
        case = testing.random_step_case(generator(9), (3, 3, 5, 7))
        case["table"][..., Step.Z] = 1
        case[name] = case[name][:-1].clone()
        with pytest.raises(Fault, match="out of bounds: load of 8 bytes at byte 16 of a buffer of 16"), self.on_gpu(80):
            torch.ops.bdk.fused_step(**case)
