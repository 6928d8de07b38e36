"""The CUDA kernels make the bits of ``reference.py``: compiled for the CPU as they are, run thread by thread."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bdkernels
from bdkernels import NO_BAD_ROW, backends, cuda, native, noise, reference, testing
from bdkernels.columns import STEP_COLUMNS, STORE_COLUMNS, STORES, Step, Store
from bdkernels.compiled import CompiledOps

SHAPES = [(2, 3, 8, 8), (3, 2, 5, 7), (2, 1, 16, 48), (1, 1, 1, 1), (1, 3, 1, 37), (2, 4, 33, 8), (2, 2, 4, 6)]
"""Sizes of whole vectors of 8, of single elements, of more than one block; of whole vectors that cross rows of pixels."""
ORDERS = ["0", "1", "2"]


@pytest.fixture(autouse=True)
def ops(shim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> CompiledOps:
    """CPU tensors run on the shim, in this file."""
    ops = CompiledOps(lambda: shim, lambda tensor: (0, 0))
    for name in (*testing.OPS, "bind_step"):
        monkeypatch.setattr(native, name, getattr(ops, name))
    monkeypatch.setattr(native, "available", lambda: True)
    return ops


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def options_of(case: testing.Case, options: int) -> testing.Case:
    """``case`` with one image a sample, trigger, region and history by the bits of ``options``, in this order."""
    case = dict(case)
    if options & 1 and case["trigger"] is not None:
        case["trigger"] = case["trigger"].expand(case["region"].shape).contiguous()
    if not options & 2:
        case |= {"trigger": None} | ({"mask": None} if "mask" in case else {})
    if not options & 4:
        case |= {"region": None, "arm_inside": None}
    if not options & 8 and "history" in case:
        case["history"] = None
    return case


def layout(tensor: Tensor, channels_last: bool) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("op", testing.OPS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_any_order_of_threads(op: str, dtype: torch.dtype, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BDK_SHIM_ORDER", order)
    for seed, shape in enumerate(SHAPES):
        for full in (True, False):
            testing.assert_matches_reference(op, testing.random_case(op, generator(seed), shape, dtype, full))


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("elements", [*range(1, 18), 512, 2056])
def test_normal(elements: int, dtype: torch.dtype) -> None:
    for full in (True, False):
        testing.assert_matches_reference(
            "normal", testing.random_normal_case(generator(elements), (3, 1, 1, elements), dtype, full)
        )


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("options", range(16))
def test_step_options(shape: testing.Shape, options: int) -> None:
    for seed, op in enumerate(("fused_step", "fused_step_")):
        case = options_of(testing.random_step_case(generator(options + 16 * seed), shape), options)
        testing.assert_matches_reference(op, case)


@pytest.mark.parametrize("x_dtype", testing.DTYPES)
@pytest.mark.parametrize("m_dtype", testing.DTYPES)
def test_step_dtypes_and_layouts(x_dtype: torch.dtype, m_dtype: torch.dtype) -> None:
    for seed, shape in enumerate(SHAPES):
        case = testing.random_step_case(generator(seed), shape, x_dtype, seed % 3 > 0)
        m = case["model_output"].to(m_dtype)
        for x_last, m_last in ((False, False), (True, False), (False, True), (True, True)):
            changed = {"x": layout(case["x"], x_last), "model_output": layout(m, m_last)}
            testing.assert_matches_reference("fused_step_", case | changed)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_a_bound_loop(dtype: torch.dtype, each: bool) -> None:
    """A row for the batch or one a sample; the dtype and the layout of the network's output change on the way."""
    for seed, shape in enumerate(SHAPES):
        case = testing.random_step_case(generator(seed), shape, dtype, seed % 3 > 0)
        m, _ = case.pop("model_output"), case.pop("step")
        steps = torch.randint(5, (6, shape[0]) if each else (6,), generator=generator(seed))
        case["bad_row"] = torch.tensor(NO_BAD_ROW)
        own, expected = ({k: None if v is None else v.clone() for k, v in case.items()} for _ in range(2))
        bound = bdkernels.bind_step(steps=steps, **own)
        for k, m_dtype in enumerate((dtype, *testing.DTYPES, dtype)):
            output = layout((m * (k + 1)).to(m_dtype), channels_last=k % 2 == 1)
            if k == 3:
                output[-1, 0, 0, 0] = torch.nan
            bound(output, k)
            reference.fused_step_(model_output=output, step=steps[k], **expected)
        for name in ("x", "bad_row", *(("history",) if own["history"] is not None else ())):
            testing.assert_same_bits(name, own[name], expected[name])


def test_a_bound_step_runs_where_torch_is_at_its_call(shim: ModuleType) -> None:
    """Not where it was bound: a graph is captured on a stream of its own. The shim has device 0 alone."""
    case = testing.random_step_case(generator(0), SHAPES[0]) | {"bad_row": None}
    m, step = case.pop("model_output"), case.pop("step")
    places = iter([(0, 0), (1, 0)])
    bound = CompiledOps(lambda: shim, lambda tensor: next(places)).bind_step(lambda m: None, steps=step[None], **case)
    bound(m, 0)
    with pytest.raises(RuntimeError, match="CUDA refused"):
        bound(m, 0)


@pytest.mark.parametrize(
    ("driver", "sentence"),
    [
        ("0", "no CUDA device is present: there is no NVIDIA driver"),
        (
            "12040",
            "the NVIDIA driver is for CUDA 12.4 and bdkernels._cuda was built with CUDA 13.0: update the driver, or build"
            " again with a CUDA toolkit of the driver's version",
        ),
    ],
)
def test_a_driver_that_cannot_run_it_is_a_reason(
    driver: str, sentence: str, shim: ModuleType, ops: CompiledOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where torch, of an older CUDA, finds a device; and an op that is forced says the same."""
    monkeypatch.setattr(cuda, "_cuda", shim)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cuda._refusal.cache_clear()
    assert cuda.available()
    cuda._refusal.cache_clear()
    monkeypatch.setenv("BDK_SHIM_DRIVER", driver)
    assert not cuda.available()
    assert cuda.reason() == backends.missing("cuda") == sentence
    with pytest.raises(RuntimeError, match=f"^{re.escape(sentence)}$"):
        ops.fused_step(**testing.random_step_case(generator(0), SHAPES[0]))
    cuda._refusal.cache_clear()


@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_history_in_channels_last(shape: testing.Shape, dtype: torch.dtype) -> None:
    case = testing.random_step_case(generator(0), shape, dtype)
    case["history"] = case["history"].movedim(-3, -1).contiguous().movedim(-1, -3)
    testing.assert_matches_reference("fused_step_", case)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_a_slot_that_no_term_of_both_rows_has_is_not_read(shape: testing.Shape) -> None:
    case = testing.random_step_case(generator(0), shape)
    for arm, slot in ((0, 0), (1, 0), (1, 1), (2, 2)):
        for first in (Step.H, *(Step.STORE + k * STORE_COLUMNS + Store.J for k in range(STORES))):
            case["table"][arm, :, first + slot] = 0
    case["history"][0] = torch.nan
    for outside in range(3):
        for inside in range(3):
            arms = {"arm": torch.full_like(case["arm"], outside), "arm_inside": torch.full_like(case["arm"], inside)}
            testing.assert_matches_reference("fused_step_", case | arms)


@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_special_values(dtype: torch.dtype) -> None:
    """NaN and infinities go through clamps, zeros keep their sign, subnormal halves survive; the bad row is found."""
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-7, -6e-8, 65504.0]).to(dtype)
    for position, width in ((0, 40), (9, 40), (36, 37)):
        case = testing.random_step_case(generator(position), (2, 1, 1, width), dtype)
        case["x"][0, 0, 0, :8] = special
        for value in (torch.nan, torch.inf, -torch.inf):
            case["model_output"][position % 2, 0, 0, position] = value
            testing.assert_matches_reference("fused_step_", case)


def test_every_half_is_read_and_written_exactly() -> None:
    """An identity row on all 65,536 values of each half type, then float32 rounded to halves around every tie."""
    table = torch.zeros(1, 1, STEP_COLUMNS)
    for low, high in ((Step.LOW0, Step.HIGH0), (Step.LOW, Step.HIGH)):
        table[0, 0, low], table[0, 0, high] = -torch.inf, torch.inf
    zero = torch.zeros(1, dtype=torch.int64)
    absent = {"trigger": None, "region": None, "arm_inside": None, "history": None}
    common = {"table": table, "arm": zero, "step": zero[0], "seeds": zero, **absent}
    for dtype, tie in ((torch.bfloat16, 0x8000), (torch.float16, 0x1000)):
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(1, 1, 256, 256)
        table[0, 0, Step.P], table[0, 0, Step.S] = 1, 0
        testing.assert_matches_reference("fused_step", {"x": x, "model_output": torch.zeros_like(x), **common})
        table[0, 0, Step.P], table[0, 0, Step.S] = 0, 1
        for nudge in (-1, 0, 1):
            m = (x.float().view(torch.int32) + tie + nudge).view(torch.float32)
            testing.assert_matches_reference("fused_step", {"x": torch.zeros_like(x), "model_output": m, **common})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", range(0, 8))
@pytest.mark.parametrize("op", ["fused_noising", "fused_loss"])
def test_noising_and_loss(op: str, options: int, shape: testing.Shape) -> None:
    """Bytes that are flipped, and float32 images that are not, in both layouts."""
    for seed, dtype in enumerate(testing.DTYPES):
        build = testing.random_noising_case if op == "fused_noising" else testing.random_loss_case
        case = options_of(build(generator(seed + options), shape, dtype), options)
        for channels_last in (False, True):
            x0 = layout(case["x0"], channels_last)
            testing.assert_matches_reference(op, case | {"x0": x0})
            floats = (x0 * 2.0 - 255) / 255
            testing.assert_matches_reference(op, case | {"x0": floats, "flip": None})


def misaligned(tensor: Tensor) -> Tensor:
    """The same values, one element from where memory is aligned."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return memory[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("name", ["x", "model_output", "table", "trigger", "region", "history"])
def test_what_is_not_on_16_bytes_is_not_moved_as_if(name: str, ops: CompiledOps) -> None:
    case = testing.random_step_case(generator(0), SHAPES[0])
    expected = reference.fused_step(**case)
    testing.assert_same_bits(name, ops.fused_step(**case | {name: misaligned(case[name])}), expected)


def test_a_loss_has_the_same_bits_in_any_order(ops: CompiledOps, monkeypatch: pytest.MonkeyPatch) -> None:
    case = testing.random_loss_case(generator(0), (3, 3, 40, 40))
    first = ops.fused_loss(**case)
    for order in ORDERS:
        monkeypatch.setenv("BDK_SHIM_ORDER", order)
        for got, expected in zip(ops.fused_loss(**case), first, strict=True):
            testing.assert_same_bits("loss", got, expected)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
@pytest.mark.parametrize("op", testing.OPS)
def test_nothing_to_do(op: str, shape: testing.Shape) -> None:
    testing.assert_matches_reference(op, testing.random_case(op, generator(0), shape, torch.float32))


@pytest.mark.parametrize("value", [-1, 5, 2**40, -(2**62)])
@pytest.mark.parametrize("name", ["arm", "step", "arm_inside"])
@pytest.mark.parametrize("size", [4, 5])
def test_a_row_outside_the_table_makes_that_sample_nan(size: int, name: str, value: int, ops: CompiledOps) -> None:
    """The others are as before, and nothing is stored."""
    case: dict[str, Any] = testing.random_step_case(generator(0), (4, 3, size, size))
    case["region"][:] = name == "arm_inside"
    before = ops.fused_step(**case)
    case[name][2] = value
    after = ops.fused_step(**case)
    assert after[2].isnan().all()
    others = torch.tensor([0, 1, 3])
    testing.assert_same_bits("the others", after[others], before[others])
    if name != "arm_inside":
        own = {k: v.clone() for k, v in case.items()}
        ops.fused_step_(**own, bad_row=None)
        testing.assert_same_bits("history", own["history"][:, 2], case["history"][:, 2])


def test_pixels_outside_a_region_keep_their_row(ops: CompiledOps) -> None:
    case: dict[str, Any] = testing.random_step_case(generator(0), (2, 3, 4, 4), torch.bfloat16)
    before = ops.fused_step(**case)
    case["arm_inside"][:] = -1
    expected = before.masked_fill(case["region"], torch.nan)
    testing.assert_same_bits("output", ops.fused_step(**case), expected)


def test_a_timestep_outside_the_table_makes_that_sample_nan(ops: CompiledOps) -> None:
    case: dict[str, Any] = testing.random_noising_case(generator(0), (4, 3, 4, 4))
    case["t"][1] = 7
    assert ops.fused_noising(**case).isnan().flatten(1).all(1).tolist() == [False, True, False, False]
    loss: dict[str, Any] = testing.random_loss_case(generator(0), (4, 3, 4, 4))
    loss["t"][1] = -1
    losses, gradient = ops.fused_loss(**loss)
    assert losses.isnan().tolist() == [False, True, False, False]
    assert gradient.isnan().flatten(1).all(1).tolist() == [False, True, False, False]


def test_a_sample_beyond_the_kernels_is_refused(ops: CompiledOps) -> None:
    seeds = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"elements of one sample is 4294967300: expected at most 4294967296"):
        ops.normal(seeds, torch.tensor(0), 0, (4, 5, 2**30 // 5 + 1), torch.float32)


def test_the_last_of_131070_samples(ops: CompiledOps, monkeypatch: pytest.MonkeyPatch) -> None:
    """More samples than a grid has blocks in one direction: 2^16 - 1."""
    monkeypatch.setenv("BDK_SHIM_LAST", "1")
    seeds = torch.arange(2 * 65535)
    got = ops.normal(seeds, torch.tensor(3), 1, (5,), torch.float32)
    testing.assert_same_bits("normal", got[-1:], reference.normal(seeds[-1:], torch.tensor(3), 1, (5,), torch.float32))


def sparse(*shape: int) -> Tensor:
    """bfloat16 zeros that take memory only where they are touched."""
    return torch.from_numpy(np.zeros(shape, np.int16)).view(torch.bfloat16)


@pytest.mark.parametrize("width", [2**30, 2**30 - 1])
def test_beyond_two_billion_elements(width: int, ops: CompiledOps, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses and the counter of the noise at the end of 3 x 2^30 elements: whole vectors, and single elements."""
    monkeypatch.setenv("BDK_SHIM_LAST", "1")
    x = sparse(3, 1, 1, width)
    tail = 1 + (width - 1) % 1024  # the last block, or the end of it
    x[2, ..., -tail:] = torch.randn(tail, generator=generator(1)).to(x.dtype)
    case = testing.random_step_case(generator(2), (3, 1, 1, tail), x.dtype, full=False)
    case["table"][..., Step.Z] = 1
    case |= {"x": x[2:, ..., -tail:].clone(), "model_output": x[2:, ..., -tail:].clone()}
    case |= {"arm": case["arm"][2:], "seeds": case["seeds"][2:]}
    groups = np.arange((width - tail) // 4, (width + 3) // 4)
    normals = noise.normals(noise.words(int(case["seeds"][0]), groups, noise.STREAM_STEP, int(case["step"])))
    z = torch.from_numpy(np.stack(normals, -1).reshape(-1)[(width - tail) % 4 :][:tail])
    monkeypatch.setattr(reference, "normal", lambda *_: z.reshape(1, 1, 1, -1))
    expected = reference.fused_step(**case)
    three = {"x": x, "arm": case["arm"].expand(3).contiguous(), "seeds": case["seeds"].expand(3).contiguous()}
    ops.fused_step_(**case | three | {"model_output": x, "bad_row": None})
    last = 1024 if width % 8 == 0 else 1 + (width - 1) % 512
    testing.assert_same_bits("x", x[2:, ..., -last:], expected[..., -last:])
