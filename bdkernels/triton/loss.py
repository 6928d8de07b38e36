"""The loss of each sample and its gradient in the prediction, with R the poisoned image:

    target = eps + C R      difference = prediction - target      w = W scale
    loss = sum w difference^2   gradient = 2 w difference

Each program sums its tile in float64 and a second kernel sums the tiles, both in a fixed order: no atomics, so equal
arguments give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..columns import NOISING_COLUMNS, Noising
from ..noise import STREAM_TRAINING
from .device import column, find_rows, image, load, normals, offset, place, poisoned_image
from .launch import VARYING, last, launch, on, stride, tiling

C, W = tl.constexpr(int(Noising.C)), tl.constexpr(int(Noising.W))
COLUMNS = tl.constexpr(NOISING_COLUMNS)
STREAM = tl.constexpr(STREAM_TRAINING)


@triton.jit(do_not_specialize=VARYING)
def loss_kernel(
    parts: tl.tensor,
    gradient: tl.tensor,
    prediction: tl.tensor,
    x0: tl.tensor,
    t: tl.tensor,
    arm: tl.tensor,
    seeds: tl.tensor,
    table: tl.tensor,
    trigger: tl.tensor | None,
    mask: tl.tensor | None,
    flip: tl.tensor | None,
    region: tl.tensor | None,
    arm_inside: tl.tensor | None,
    scale: tl.tensor,
    arms: tl.tensor,
    rows: tl.tensor,
    trigger_stride: tl.tensor,
    mask_stride: tl.tensor,
    region_stride: tl.tensor,
    channels: tl.tensor,
    pixels: tl.tensor,
    width: tl.tensor,
    elements: tl.tensor,
    tiles: tl.tensor,
    LAST: tl.constexpr,
    X0_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    sample, tile, e, valid = place(elements, tiles, GROUPS, VECTOR)
    first = sample * elements
    index = tl.load(t + sample)
    row = find_rows(table, arm, index, region, arm_inside, region_stride, arms, rows, sample, e, valid, COLUMNS)
    target = normals(tl.load(seeds + sample), 0, STREAM, tile, GROUPS)
    if trigger is not None:
        x = image(x0, flip, sample, e, valid, elements, channels, pixels, width, X0_LAST)
        poisoned = poisoned_image(x, trigger, mask, trigger_stride, mask_stride, sample, e, valid)
        target = target + column(row, C) * poisoned
    at = offset(e, channels, pixels, LAST)
    difference = load(prediction + first, at, valid) - target
    weight = column(row, W) * scale
    tl.store(gradient + first + at, (2.0 * weight * difference).to(gradient.dtype.element_ty), mask=valid)
    value = tl.where(valid, weight * (difference * difference), 0.0)
    tl.store(parts + sample * tiles + tile, tl.sum(value.to(tl.float64), axis=0))


@triton.jit(do_not_specialize=("parts", "losses", "tiles"))
def total_kernel(parts: tl.tensor, losses: tl.tensor, tiles: tl.tensor, WIDTH: tl.constexpr) -> None:
    """Sums the tiles of one sample."""
    sample = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float64)
    for tile in range(0, tiles, WIDTH):
        total += tl.load(parts + sample * tiles + tile + lane, mask=tile + lane < tiles, other=0)
    tl.store(losses + sample, tl.sum(total, axis=0).to(tl.float32))


def fused_loss(
    prediction: Tensor,
    x0: Tensor,
    t: Tensor,
    arm: Tensor,
    seeds: Tensor,
    table: Tensor,
    trigger: Tensor | None,
    mask: Tensor | None,
    flip: Tensor | None,
    region: Tensor | None,
    arm_inside: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `bdkernels.fused_loss`: the loss of each sample and the gradient in ``prediction``."""
    device = prediction.device
    gradient = torch.empty_like(prediction)
    count, channels, height, width = x0.shape
    elements = channels * height * width
    losses = torch.empty(count, device=device)
    with on(device):
        tiles = tiling(elements).tiles
        parts = torch.empty((count, tiles), dtype=torch.float64, device=device)
        launch(
            loss_kernel,
            count,
            elements,
            stored=prediction.dtype,
            parts=parts,
            gradient=gradient,
            prediction=prediction,
            x0=x0,
            t=t,
            arm=arm,
            seeds=seeds,
            table=table,
            trigger=trigger,
            mask=mask,
            flip=flip,
            region=region,
            arm_inside=arm_inside,
            scale=scale,
            arms=table.shape[0],
            rows=table.shape[1],
            trigger_stride=stride(trigger),
            mask_stride=stride(mask),
            region_stride=stride(region),
            channels=channels,
            pixels=height * width,
            width=width,
            LAST=last(prediction),
            X0_LAST=last(x0),
        )
        if count:
            total_kernel[(count,)](parts, losses, tiles, WIDTH=32, num_warps=1, enable_fp_fusion=False)
    return losses, gradient
