"""One noising row, with y the target image and R = M x + r the poisoned image:

    x_t = A d + M R + S eps          d = y where the sample is poisoned, else x

Without a trigger the term in R is left out; without a mask R = r.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..columns import NOISING_COLUMNS, Noising
from ..noise import STREAM_TRAINING
from .device import column, find_rows, image, load, normals, offset, place, poisoned_image, where_all
from .launch import VARYING, last, launch, on, stride

A, S, M, C, W = (tl.constexpr(int(c)) for c in Noising)
COLUMNS = tl.constexpr(NOISING_COLUMNS)
STREAM = tl.constexpr(STREAM_TRAINING)


@triton.jit(do_not_specialize=VARYING)
def noising_kernel(
    out: tl.tensor,
    x0: tl.tensor,
    t: tl.tensor,
    arm: tl.tensor,
    seeds: tl.tensor,
    table: tl.tensor,
    target: tl.tensor | None,
    trigger: tl.tensor | None,
    mask: tl.tensor | None,
    flip: tl.tensor | None,
    region: tl.tensor | None,
    arm_inside: tl.tensor | None,
    arms: tl.tensor,
    rows: tl.tensor,
    target_stride: tl.tensor,
    trigger_stride: tl.tensor,
    mask_stride: tl.tensor,
    region_stride: tl.tensor,
    channels: tl.tensor,
    pixels: tl.tensor,
    width: tl.tensor,
    elements: tl.tensor,
    tiles: tl.tensor,
    LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    sample, tile, e, valid = place(elements, tiles, GROUPS, VECTOR)
    index = tl.load(t + sample)
    row = find_rows(table, arm, index, region, arm_inside, region_stride, arms, rows, sample, e, valid, COLUMNS)
    x = image(x0, flip, sample, e, valid, elements, channels, pixels, width, LAST)
    data = x
    if target is not None:
        backdoored = tl.load(arm + sample) > 0
        data = tl.where(backdoored, load(target + sample * target_stride, e, where_all(backdoored, e, elements)), x)
    x_t = column(row, A) * data
    if trigger is not None:
        poisoned = poisoned_image(x, trigger, mask, trigger_stride, mask_stride, sample, e, valid)
        x_t = x_t + column(row, M) * poisoned
    x_t = x_t + column(row, S) * normals(tl.load(seeds + sample), 0, STREAM, tile, GROUPS)
    at = offset(e, channels, pixels, LAST)
    tl.store(out + sample * elements + at, x_t.to(out.dtype.element_ty), mask=valid)


def fused_noising(
    x0: Tensor,
    t: Tensor,
    arm: Tensor,
    seeds: Tensor,
    table: Tensor,
    target: Tensor | None,
    trigger: Tensor | None,
    mask: Tensor | None,
    flip: Tensor | None,
    region: Tensor | None,
    arm_inside: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """See `bdkernels.fused_noising`."""
    out = torch.empty_like(x0, dtype=dtype)
    count, channels, height, width = x0.shape
    with on(x0.device):
        launch(
            noising_kernel,
            count,
            channels * height * width,
            stored=dtype,
            out=out,
            x0=x0,
            t=t,
            arm=arm,
            seeds=seeds,
            table=table,
            target=target,
            trigger=trigger,
            mask=mask,
            flip=flip,
            region=region,
            arm_inside=arm_inside,
            arms=table.shape[0],
            rows=table.shape[1],
            target_stride=stride(target),
            trigger_stride=stride(trigger),
            mask_stride=stride(mask),
            region_stride=stride(region),
            channels=channels,
            pixels=height * width,
            width=width,
            LAST=last(x0),
        )
    return out
