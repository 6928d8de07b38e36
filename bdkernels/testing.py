"""What "equal" and "accurate" mean here, and random valid arguments of every op: for tests, self-check and benchmarks.

    same bits                 got == expected bit for bit, any NaN equal to any NaN
    at most twice as wrong    max |got - truth| <= 2 max |torch - truth|, or one rounding of the largest value

The first is asked of everything but sums; the second of a loss, with plain torch in the same dtype beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import reference
from .columns import HISTORY_SLOTS, NOISING_COLUMNS, STEP_COLUMNS, STORE_COLUMNS, STORES, Step, Store
from .noise import STREAM_INITIAL
from .ops import NO_BAD_ROW

OPS = ("normal", "fused_step", "fused_step_", "fused_noising", "fused_loss")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes whose bits every backend shares; float64 is the reference's alone."""

Case = dict[str, Any]
"""Arguments of one op by name, as ``torch.ops.bdk`` and `bdkernels.reference` take them."""
Shape = tuple[int, int, int, int]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_same_bits(name: str, got: Tensor, expected: Tensor) -> None:
    """Equal dtype, shape and bits; NaN equals NaN whatever its payload.

    Raises:
        AssertionError: They differ, with the number of differences and the first one.
    """
    for what in ("dtype", "shape", "device"):
        if getattr(got, what) != getattr(expected, what):
            raise AssertionError(f"{name} has {what} {getattr(got, what)}: expected {getattr(expected, what)}")
    bits = _BITS[got.element_size()]
    same = got.contiguous().view(bits) == expected.contiguous().view(bits)
    if got.is_floating_point():
        same |= got.isnan() & expected.isnan()
    wrong = (~same).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{name} differs in {len(wrong)} of {got.numel()} elements, first at {at}:"
            f" {got[at].item()!r}, expected {expected[at].item()!r}"
        )


def at_most_twice_as_wrong(got: Tensor, torch_same_dtype: Tensor, truth64: Tensor) -> bool:
    """Whether ``got`` is at most twice as far from the float64 truth as plain torch in the same dtype.

    Errors are maxima over all elements. Where torch happens to be exact, one rounding of the largest value is allowed.
    """
    if not got.numel():
        return got.shape == truth64.shape
    error, peer = ((value.double() - truth64).abs().max() for value in (got, torch_same_dtype))
    return bool(error <= torch.maximum(2 * peer, truth64.abs().max() * torch.finfo(got.dtype).eps))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch fills what ``torch.empty`` returns with NaN, so that an element left unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def assert_matches_reference(op: str, case: Case, device: str = "cpu") -> None:
    """Runs ``op`` on the backend in force and on the reference: the same bits, a loss at most twice as wrong.

    The op runs on ``device``, the reference on the CPU, where ``case`` is and is left as it was; in-place forms work on
    copies, with every tensor that they write compared.

    Raises:
        AssertionError: The backend is wrong, with the first difference.
    """
    with poisoned_memory():
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in case.items()}
        got = {name: value.cpu() for name, value in outputs(op, torch.ops.bdk, moved).items()}
    expected = outputs(op, reference, case)
    for name, value in got.items():
        if name != "loss":
            assert_same_bits(f"{op}: {name}", value, expected[name])
        elif not at_most_twice_as_wrong(value, expected[name], truth := outputs(op, reference, widened(case))[name]):
            at = int((value.double() - truth).abs().nan_to_num(torch.inf).argmax())
            raise AssertionError(f"{op}: loss of sample {at} is {value[at].item()!r}: expected {truth[at].item()!r}")


def outputs(op: str, module: object, case: Case) -> dict[str, Tensor]:
    """What ``op`` of a backend's ``module`` returns or writes, by name, from copies of its arguments."""
    own = {name: value.clone() if isinstance(value, Tensor) else value for name, value in case.items()}
    if op == "fused_step_":
        own["bad_row"] = torch.full((), NO_BAD_ROW, device=own["x"].device)
    result = getattr(module, op)(**own)
    if op == "fused_step_":
        return {name: own[name] for name in ("x", "history", "bad_row") if own[name] is not None}
    if op == "fused_loss":
        return {"loss": result[0], "gradient": result[1]}
    return {"output": result}


def widened(case: Case) -> Case:
    """The arguments in float64, where they are floating point."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.items()
    }


def random_case(op: str, generator: torch.Generator, shape: Shape, dtype: torch.dtype, full: bool = True) -> Case:
    """Random valid arguments of ``op``, one of `OPS`: see the builder of each; channels-last where ``full``."""
    if op == "normal":
        return random_normal_case(generator, shape, dtype, full)
    build = {"fused_noising": random_noising_case, "fused_loss": random_loss_case}.get(op, random_step_case)
    return build(generator, shape, dtype, full, channels_last=full)


def random_normal_case(
    generator: torch.Generator, shape: Shape, dtype: torch.dtype = torch.float32, full: bool = True
) -> Case:
    """Arguments of `bdkernels.normal`; where ``full`` with a step a sample, else with one for all."""
    step = torch.randint(2**32, (shape[0],) if full else (), generator=generator)
    seeds = _seeds(generator, shape[0])
    return {"seeds": seeds, "step": step, "stream": STREAM_INITIAL, "shape": shape[1:], "dtype": dtype}


def random_step_case(
    generator: torch.Generator,
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    full: bool = True,
    *,
    arms: int = 3,
    rows: int = 5,
    channels_last: bool = False,
) -> Case:
    """Arguments of `bdkernels.fused_step`: half of the table's rows without noise, half without clamps.

    Where ``full``: a trigger, a region with arms of its own, three history slots with stores into any or none of them,
    and a step a sample; else none of these.
    """
    count, exact = shape[0], _exact(dtype)
    table = _randn(generator, arms, rows, STEP_COLUMNS)
    for low, high in ((Step.LOW0, Step.HIGH0), (Step.LOW, Step.HIGH)):
        bound = torch.where(_flags(generator, arms, rows), table[..., high].abs(), torch.inf)
        table[..., low], table[..., high] = -bound, bound
    table[..., Step.Z] *= _flags(generator, arms, rows)
    for k in range(STORES):
        slot = torch.randint(-1, HISTORY_SLOTS - 1, (arms, rows), generator=generator)
        table[..., Step.STORE + k * STORE_COLUMNS + Store.SLOT] = slot.float()
    return {
        "x": _images(generator, shape, dtype, channels_last),
        "model_output": _images(generator, shape, dtype, channels_last),
        "table": table.to(exact),
        "arm": torch.randint(arms, (count,), generator=generator),
        "step": torch.randint(rows, (count,) if full else (), generator=generator),
        "seeds": _seeds(generator, count),
        "trigger": _randn(generator, 1, *shape[1:]).to(exact) if full else None,
        "region": _flags(generator, *shape) if full else None,
        "arm_inside": torch.randint(arms, (count,), generator=generator) if full else None,
        "history": _randn(generator, HISTORY_SLOTS - 1, *shape).to(exact) if full else None,
    }


def random_noising_case(
    generator: torch.Generator,
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    full: bool = True,
    *,
    arms: int = 2,
    rows: int = 7,
    channels_last: bool = False,
) -> Case:
    """Arguments of `bdkernels.fused_noising`.

    Where ``full``: uint8 images, a target, a stamped trigger, flips, and a region with arms of its own; else float
    images and none of these.
    """
    count, exact = shape[0], _exact(dtype)
    x0 = _images(generator, shape, exact, channels_last)
    return {
        "x0": (x0 * 60 + 128).clamp(0, 255).to(torch.uint8) if full else x0,
        "t": torch.randint(rows, (count,), generator=generator),
        "arm": torch.randint(arms, (count,), generator=generator),
        "seeds": _seeds(generator, count),
        "table": _randn(generator, arms, rows, NOISING_COLUMNS).to(exact),
        "target": _randn(generator, 1, *shape[1:]).to(exact) if full else None,
        "trigger": _randn(generator, 1, *shape[1:]).to(exact) if full else None,
        "mask": _flags(generator, 1, *shape[1:]).to(exact) if full else None,
        "flip": _flags(generator, count) if full else None,
        "region": _flags(generator, *shape) if full else None,
        "arm_inside": torch.randint(arms, (count,), generator=generator) if full else None,
        "dtype": dtype,
    }


def random_loss_case(
    generator: torch.Generator,
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    full: bool = True,
    *,
    channels_last: bool = False,
) -> Case:
    """Arguments of ``torch.ops.bdk.fused_loss``, for the mean over all elements; ``dtype`` is the prediction's."""
    case = random_noising_case(generator, shape, dtype, full, channels_last=channels_last)
    del case["target"], case["dtype"]
    prediction = _images(generator, shape, dtype, channels_last)
    return {"prediction": prediction, **case, "scale": 1.0 / max(prediction.numel(), 1)}


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def _flags(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator) < 0.5


def _seeds(generator: torch.Generator, count: int) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)


def _images(generator: torch.Generator, shape: Shape, dtype: torch.dtype, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return _randn(generator, *shape).to(dtype).contiguous(memory_format=layout)
