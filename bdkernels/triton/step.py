"""One sampler row, with m the network's output, h_j the history, r the trigger image and z the noise:

    x0 = clamp(A x + B m + D r, LOW0, HIGH0)
    x' = clamp(P x + Q x0 + S m + sum_j H_j h_j + Z z + R r, LOW, HIGH)
    store k := E x + F m + G x0 + sum_j J_j h_j + K x'

Sums run left to right. Without a trigger its terms are left out; noise that no element of a sample takes is not made, and
a history slot that no term of its rows has is not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..columns import HISTORY_SLOTS, STEP_COLUMNS, STORE_COLUMNS, STORES, Step, Store
from ..noise import STREAM_STEP
from .device import column, find_rows, load, nonzero, normals, offset, place, where_all
from .launch import VARYING, last, launch, on, stride

A, B, D, LOW0, HIGH0, P, Q, S, Z, R, LOW, HIGH, H, STORE = (tl.constexpr(int(c)) for c in Step if c < Step.IN)
SLOT, E, F, G, J, K = (tl.constexpr(int(c)) for c in Store)
COLUMNS = tl.constexpr(STEP_COLUMNS)
COLUMNS_OF_STORE = tl.constexpr(STORE_COLUMNS)
MOST_STORES = tl.constexpr(STORES)
STREAM = tl.constexpr(STREAM_STEP)


@triton.jit
def clamp(v: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """Select form: NaN passes."""
    v = tl.where(v < low, low, v)
    return tl.where(v > high, high, v)


@triton.jit
def reads(row: tl.tuple, slot: tl.constexpr) -> tl.tensor:
    """Whether any term of a sample's rows has this history slot."""
    found = nonzero(row, H + slot)
    for k in tl.static_range(MOST_STORES):
        found = found | nonzero(row, STORE + k * COLUMNS_OF_STORE + J + slot)
    return found


@triton.jit
def slot_of(row: tl.tuple, k: tl.constexpr) -> tl.tensor:
    """The slot that store ``k`` of the outside row writes, -1 where the number in the table is none."""
    slot = tl.load(row[0] + STORE + k * COLUMNS_OF_STORE + SLOT, mask=row[1], other=-1.0)
    whole = slot.to(tl.int64)
    return tl.where(slot == whole.to(tl.float32), whole, -1)


@triton.jit
def stored(
    row: tl.tuple,
    BASE: tl.constexpr,
    x_t: tl.tensor,
    m: tl.tensor,
    x0: tl.tensor,
    h: tl.tuple,
    x_next: tl.tensor,
    SLOTS: tl.constexpr,
) -> tl.tensor:
    value = column(row, BASE + E) * x_t + column(row, BASE + F) * m + column(row, BASE + G) * x0
    for j in tl.static_range(SLOTS):
        value = value + column(row, BASE + J + j) * h[j]
    return value + column(row, BASE + K) * x_next


@triton.jit(do_not_specialize=VARYING)
def step_kernel(
    x: tl.tensor,
    model_output: tl.tensor,
    out: tl.tensor,
    table: tl.tensor,
    arm: tl.tensor,
    step: tl.tensor,
    seeds: tl.tensor,
    trigger: tl.tensor | None,
    region: tl.tensor | None,
    arm_inside: tl.tensor | None,
    history: tl.tensor | None,
    bad_row: tl.tensor | None,
    arms: tl.tensor,
    rows: tl.tensor,
    step_stride: tl.tensor,
    trigger_stride: tl.tensor,
    region_stride: tl.tensor,
    slot_stride: tl.tensor,
    channels: tl.tensor,
    pixels: tl.tensor,
    elements: tl.tensor,
    tiles: tl.tensor,
    SLOTS: tl.constexpr,
    STORES: tl.constexpr,
    IN_PLACE: tl.constexpr,
    X_LAST: tl.constexpr,
    M_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    sample, tile, e, valid = place(elements, tiles, GROUPS, VECTOR)
    first = sample * elements
    index = tl.load(step + sample * step_stride)
    row = find_rows(table, arm, index, region, arm_inside, region_stride, arms, rows, sample, e, valid, COLUMNS)

    x_at = offset(e, channels, pixels, X_LAST)
    x_t = load(x + first, x_at, valid)
    m = load(model_output + first, offset(e, channels, pixels, M_LAST), valid)
    if trigger is not None:
        r = load(trigger + sample * trigger_stride, e, valid)
    h = tl.tuple(())
    for j in tl.static_range(SLOTS):
        h = h + (load(history + j * slot_stride + first, e, where_all(reads(row, j), e, elements)),)  # noqa: RUF005

    x0 = column(row, A) * x_t + column(row, B) * m
    if trigger is not None:
        x0 = x0 + column(row, D) * r
    x0 = clamp(x0, column(row, LOW0), column(row, HIGH0))

    x_next = column(row, P) * x_t + column(row, Q) * x0 + column(row, S) * m
    for j in tl.static_range(SLOTS):
        x_next = x_next + column(row, H + j) * h[j]
    scale = column(row, Z)
    if nonzero(row, Z):
        z = normals(tl.load(seeds + sample), index.to(tl.uint32), STREAM, tile, GROUPS)
    else:
        z = tl.zeros((4 * GROUPS,), tl.float32)
    x_next = x_next + scale * tl.where(scale == 0, 0.0, z)
    if trigger is not None:
        x_next = x_next + column(row, R) * r
    x_next = clamp(x_next, column(row, LOW), column(row, HIGH))
    if IN_PLACE:
        # Where a size is odd a thread stores other elements than it loaded: all loads come first.
        tl.debug_barrier()
    tl.store(out + first + x_at, x_next.to(out.dtype.element_ty), mask=valid)

    for k in tl.static_range(STORES):
        slot = slot_of(row, k)
        kept = where_all((slot >= 0) & (slot < SLOTS), e, elements)
        value = stored(row, STORE + k * COLUMNS_OF_STORE, x_t, m, x0, h, x_next, SLOTS)
        tl.store(history + slot * slot_stride + first + e, value, mask=kept)

    if bad_row is not None:
        bad = tl.max(((m - m) != 0).to(tl.int32), axis=0)
        tl.atomic_min(bad_row, index, mask=bad != 0, sem="relaxed")


def _step(
    x: Tensor,
    model_output: Tensor,
    out: Tensor,
    table: Tensor,
    arm: Tensor,
    step: Tensor,
    seeds: Tensor,
    trigger: Tensor | None,
    region: Tensor | None,
    arm_inside: Tensor | None,
    history: Tensor | None,
    bad_row: Tensor | None,
    stores: bool,
) -> None:
    count, channels, height, width = x.shape
    with on(x.device):
        launch(
            step_kernel,
            count,
            channels * height * width,
            stored=torch.float32 if stores and history is not None else out.dtype,
            x=x,
            model_output=model_output,
            out=out,
            table=table,
            arm=arm,
            step=step,
            seeds=seeds,
            trigger=trigger,
            region=region,
            arm_inside=arm_inside,
            history=history,
            bad_row=bad_row,
            arms=table.shape[0],
            rows=table.shape[1],
            step_stride=step.ndim,
            trigger_stride=stride(trigger),
            region_stride=stride(region),
            slot_stride=x.numel(),
            channels=channels,
            pixels=height * width,
            SLOTS=0 if history is None else min(len(history), HISTORY_SLOTS),
            STORES=STORES if stores and history is not None else 0,
            IN_PLACE=out is x,
            X_LAST=last(x),
            M_LAST=last(model_output),
        )


def fused_step(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    arm: Tensor,
    step: Tensor,
    seeds: Tensor,
    trigger: Tensor | None,
    region: Tensor | None,
    arm_inside: Tensor | None,
    history: Tensor | None,
) -> Tensor:
    """See `bdkernels.fused_step`."""
    out = torch.empty_like(x)
    _step(x, model_output, out, table, arm, step, seeds, trigger, region, arm_inside, history, None, False)
    return out


def fused_step_(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    arm: Tensor,
    step: Tensor,
    seeds: Tensor,
    trigger: Tensor | None,
    region: Tensor | None,
    arm_inside: Tensor | None,
    history: Tensor | None,
    bad_row: Tensor | None,
) -> None:
    """See `bdkernels.fused_step_`."""
    _step(x, model_output, x, table, arm, step, seeds, trigger, region, arm_inside, history, bad_row, True)
