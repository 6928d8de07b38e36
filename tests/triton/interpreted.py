"""The Triton kernels under ``TRITON_INTERPRET=1`` against the reference; `test_interpreter.py` runs this file.

The interpreter truncates to bfloat16 where a GPU rounds to nearest, so there the neighbour towards zero passes; it does
everything else as a GPU does, and is compared bit for bit.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bdkernels as bdk
from bdkernels import backends, reference, testing
from bdkernels import triton as kernels
from bdkernels.columns import STORE_COLUMNS, STORES, Step, Store

SHAPES = ((2, 3, 5, 7), (3, 1, 1, 1), (1, 1, 1, 37), (2, 3, 8, 8), (2, 1, 35, 41), (5, 2, 3, 11))
"""One element, a last group that is not full, whole vectors, and two tiles of which one has a tail."""
LAYOUTS = ("contiguous", "channels-last")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def in_layout(case: testing.Case, name: str) -> testing.Case:
    """The case with its image batches in one layout; what must be contiguous stays so."""
    format = torch.channels_last if name == "channels-last" else torch.contiguous_format
    images = ("x", "model_output", "x0", "prediction")
    return {k: v.contiguous(memory_format=format) if k in images else v for k, v in case.items()}


def check(op: str, case: testing.Case) -> None:
    """Every tensor that ``op`` makes, into memory filled with NaN, against the reference."""
    with testing.poisoned_memory():
        got = testing.outputs(op, kernels, case)
    for name, expected in testing.outputs(op, reference, case).items():
        if name == "loss":
            assert_loss(got[name], expected, case)
        elif expected.dtype == torch.bfloat16:
            assert_neighbours(got[name], expected)
        else:
            testing.assert_same_bits(f"{op}: {name}", got[name], expected)
        if name in ("output", "gradient") and op != "normal":
            images = case.get("x", case.get("prediction", case.get("x0")))
            assert got[name].stride() == images.stride()


def assert_loss(got: Tensor, expected: Tensor, case: testing.Case) -> None:
    assert got.dtype == torch.float32
    assert testing.at_most_twice_as_wrong(got, expected, reference.fused_loss(**testing.widened(case))[0])


def assert_neighbours(got: Tensor, expected: Tensor) -> None:
    """bfloat16 of the same number, rounded towards zero or to nearest."""
    assert got.dtype == torch.bfloat16
    away = expected.contiguous().view(torch.int16).int() - got.contiguous().view(torch.int16).int()
    assert (((away == 0) | (away == 1)) | (got.isnan() & expected.isnan())).all()


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("full", [True, False])
def test_normal(shape: testing.Shape, dtype: torch.dtype, full: bool) -> None:
    check("normal", testing.random_normal_case(generator(), shape, dtype, full))


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("op", ["fused_step", "fused_step_", "fused_noising", "fused_loss"])
def test_op(op: str, full: bool, layout: str, shape: testing.Shape, dtype: torch.dtype) -> None:
    check(op, in_layout(testing.random_case(op, generator(shape[-1]), shape, dtype, full), layout))


@pytest.mark.parametrize("absent", [("trigger",), ("region", "arm_inside"), ("history",), ("trigger", "history")])
@pytest.mark.parametrize("op", ["fused_step", "fused_step_"])
def test_step_without(op: str, absent: tuple[str, ...]) -> None:
    check(op, testing.random_step_case(generator(1), (3, 3, 5, 7)) | dict.fromkeys(absent))


@pytest.mark.parametrize("absent", [("mask",), ("trigger", "mask"), ("target",), ("flip",), ("region", "arm_inside")])
def test_noising_and_loss_without(absent: tuple[str, ...]) -> None:
    case = testing.random_noising_case(generator(1), (4, 3, 5, 7)) | dict.fromkeys(absent)
    check("fused_noising", case)
    del case["target"], case["dtype"]
    check("fused_loss", {"prediction": torch.randn(4, 3, 5, 7, generator=generator()), **case, "scale": 0.37})


@pytest.mark.parametrize("name", ["trigger", "mask", "target", "region"])
def test_one_image_for_all_or_one_each(name: str) -> None:
    case = testing.random_noising_case(generator(2), (3, 2, 5, 7))
    image = torch.randn(3, 2, 5, 7, generator=generator())
    for count in (1, 3):
        value = image[:count] > 0 if name == "region" else image[:count].contiguous()
        check("fused_noising", case | {name: value})


def test_mixed_dtypes_and_layouts() -> None:
    for x_dtype in testing.DTYPES:
        for m_dtype in testing.DTYPES:
            case = testing.random_step_case(generator(3), (2, 3, 8, 8), x_dtype)
            m = case["model_output"].to(m_dtype).contiguous(memory_format=torch.channels_last)
            check("fused_step_", case | {"model_output": m})


def test_stores_go_to_their_slots() -> None:
    """Two stores into one slot (the second wins), into none, beyond the history, and between two slots."""
    case = testing.random_step_case(generator(4), (6, 1, 3, 5), arms=1, rows=6)
    for k in range(STORES):
        column = Step.STORE + k * STORE_COLUMNS + Store.SLOT
        case["table"][0, :, column] = torch.tensor([[1.0, 2, -1, 3, 0.5, 2], [1, 0, 2, 0, 7, torch.nan]][k])
    case |= {"arm": torch.zeros_like(case["arm"]), "region": None, "arm_inside": None, "step": torch.arange(6)}
    check("fused_step_", case)


def test_a_slot_that_no_term_reads_may_hold_anything() -> None:
    case = testing.random_step_case(generator(5), (2, 1, 3, 5), full=False)
    case["history"] = torch.full((1, 2, 1, 3, 5), torch.nan)
    for column in (Step.H, *(Step.STORE + k * STORE_COLUMNS + Store.J for k in range(STORES))):
        case["table"][..., column] = 0
    case["table"][..., Step.STORE + Store.SLOT] = 0
    check("fused_step_", case)
    assert not kernels.fused_step(**case).isnan().any()


@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_special_values_pass_and_the_bad_row_is_found(dtype: torch.dtype) -> None:
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-7, -6e-8, 65504.0]).to(dtype)
    for value in (torch.nan, torch.inf, -torch.inf):
        case = testing.random_step_case(generator(6), (3, 1, 1, 37), dtype)
        case["x"][0, 0, 0, :8] = special
        case["model_output"][1, 0, 0, 36] = value
        case["model_output"][2, 0, 0, 0] = value
        check("fused_step_", case)


def test_a_bad_row_is_only_lowered() -> None:
    case = testing.random_step_case(generator(6), (2, 1, 3, 5), full=False)
    case["model_output"][0] = torch.nan
    case["step"] = torch.tensor(3)
    for before, after in ((1, 1), (3, 3), (4, 3)):
        bad_row = torch.tensor(before)
        kernels.fused_step_(**{k: v.clone() if v is not None else v for k, v in case.items()}, bad_row=bad_row)
        assert bad_row == after


@pytest.mark.parametrize("name", ["arm", "step", "arm_inside"])
@pytest.mark.parametrize("value", [-1, 5, 2**40, -(2**62)])
def test_an_index_outside_the_table_makes_that_sample_nan(name: str, value: int) -> None:
    """Nothing is read outside: the interpreter would crash. Other samples are as before, no store is made."""
    case = testing.random_step_case(generator(7), (3, 1, 3, 5))
    before = kernels.fused_step(**case)
    case["region"][:] = name == "arm_inside"
    inside = kernels.fused_step(**case) if name == "arm_inside" else None
    case[name][1] = value
    after, history = kernels.fused_step(**case), case["history"].clone()
    assert after[1].isnan().all()
    if inside is not None:
        testing.assert_same_bits("others", after[::2], inside[::2])
    assert before.isfinite().all()
    own = {k: v.clone() if v is not None else v for k, v in case.items()}
    kernels.fused_step_(**own, bad_row=None)
    if name != "arm_inside":
        testing.assert_same_bits("history", own["history"][:, 1], history[:, 1])


def test_pixels_outside_a_region_keep_their_row() -> None:
    case = testing.random_step_case(generator(7), (2, 3, 4, 4))
    before = kernels.fused_step(**case)
    case["arm_inside"][:] = -1
    testing.assert_same_bits("output", kernels.fused_step(**case), before.masked_fill(case["region"], torch.nan))


def test_a_timestep_outside_the_table_makes_that_sample_nan() -> None:
    case = testing.random_noising_case(generator(7), (4, 1, 3, 5))
    case["t"][1] = 7
    assert kernels.fused_noising(**case).isnan().flatten(1).all(1).tolist() == [False, True, False, False]
    loss = testing.random_loss_case(generator(7), (4, 1, 3, 5))
    loss["t"][1] = -1
    losses, gradient = kernels.fused_loss(**loss)
    assert losses.isnan().tolist() == [False, True, False, False]
    assert gradient.isnan().flatten(1).all(1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
@pytest.mark.parametrize("op", testing.OPS)
def test_nothing_to_do(op: str, shape: testing.Shape) -> None:
    check(op, testing.random_case(op, generator(), shape, torch.float32))


def test_a_loss_of_many_tiles() -> None:
    """More tiles than the second kernel sums at a time."""
    case = testing.random_loss_case(generator(8), (1, 1, 1, 34 * 1024 + 3), full=False)
    check("fused_loss", case)


def test_a_sample_beyond_32_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="a sample has 3221225472 elements: expected at most 2147475456"):
        kernels.normal(torch.zeros(0, dtype=torch.int64), torch.tensor(0), 0, (3, 2**15, 2**15), torch.float32)


def test_ops_reach_the_kernels() -> None:
    """`use_backend` runs CPU tensors here, float64 stays with the reference, and gradients flow."""
    assert kernels.serves() == "cpu"
    case = testing.random_step_case(generator(9), (2, 1, 3, 5))
    x = case["x"].requires_grad_()
    with bdk.use_backend("triton"):
        assert backends.backend_for(x.device, x.dtype) is kernels
        assert backends.backend_for(x.device, torch.float64) is reference
        out = bdk.fused_step(**case)
    testing.assert_same_bits("x'", out.detach(), reference.fused_step(**case).detach())
    out.sum().backward()
    assert x.grad is not None
    assert backends.name_for(x.device, x.dtype) != "triton"
