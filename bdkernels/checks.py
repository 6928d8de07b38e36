"""The arguments of the ops: each is refused in one sentence, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from .block import Weights
from .columns import HISTORY_SLOTS, NOISING_COLUMNS, STEP_COLUMNS

FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def check_dtype(name: str, value: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if value.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {str(value.dtype).removeprefix('torch.')}: expected {names(dtypes)}")


def check_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}: expected {device}, where the images are")


def check_image(name: str, value: Tensor, shape: torch.Size, dtypes: Sequence[torch.dtype]) -> None:
    """An image batch of exactly ``shape``, contiguous or channels-last."""
    check_dtype(name, value, dtypes)
    if value.shape != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: expected {tuple(shape)}")
    if not (value.is_contiguous() or value.is_contiguous(memory_format=torch.channels_last)):
        raise ValueError(f"{name} has strides {value.stride()}: expected a contiguous or channels-last tensor")


def check_batch(name: str, value: Tensor) -> None:
    if value.dim() != 4:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: expected four dimensions, [N, C, H, W]")


def check_shared(name: str, value: Tensor, images: Tensor, dtype: torch.dtype) -> None:
    """One image for the batch or one a sample, contiguous."""
    check_dtype(name, value, (dtype,))
    check_device(name, value, images.device)
    if value.dim() != 4 or value.shape[0] not in (1, images.shape[0]) or value.shape[1:] != images.shape[1:]:
        expected = (1, *images.shape[1:])
        raise ValueError(f"{name} has shape {tuple(value.shape)}: expected {expected} or {tuple(images.shape)}")
    if not value.is_contiguous():
        raise ValueError(f"{name} has strides {value.stride()}: expected a contiguous tensor")


def check_index(name: str, value: Tensor, count: int, device: torch.device, *, scalar: bool = False) -> None:
    """int64 of shape [N] (or 0-d where ``scalar``)."""
    check_dtype(name, value, (torch.int64,))
    check_device(name, value, device)
    if (value.shape == (count,) and value.is_contiguous()) or (scalar and value.dim() == 0):
        return
    expected = f"({count},)" + (" or a 0-d tensor" if scalar else "")
    raise ValueError(f"{name} has shape {tuple(value.shape)}: expected {expected}, contiguous")


def check_table(table: Tensor, columns: int, images: Tensor, dtype: torch.dtype) -> None:
    wanted = (torch.float64, torch.float32) if dtype == torch.float64 else (torch.float32,)
    check_dtype("table", table, wanted)
    check_device("table", table, images.device)
    if table.dim() != 3 or table.shape[-1] != columns or not table.is_contiguous():
        raise ValueError(f"table has shape {tuple(table.shape)}: expected [arms, rows, {columns}], contiguous")


def check_region(region: Tensor | None, arm_inside: Tensor | None, images: Tensor) -> None:
    if (region is None) != (arm_inside is None):
        given, missing = ("region", "arm_inside") if arm_inside is None else ("arm_inside", "region")
        raise ValueError(f"{given} was given without {missing}: expected both or neither")
    if region is not None and arm_inside is not None:
        check_shared("region", region, images, torch.bool)
        check_index("arm_inside", arm_inside, images.shape[0], images.device)


def check_in_place(**tensors: Tensor | None) -> None:
    for name, value in tensors.items():
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires a gradient, of which a step in place knows nothing: expected torch.no_grad(), or fused_step"
            )


def check_output(x: Tensor, model_output: Tensor) -> None:
    check_image("model_output", model_output, x.shape, FLOATS if x.dtype == torch.float64 else FLOATS[:3])
    check_device("model_output", model_output, x.device)


def check_step(
    x: Tensor,
    table: Tensor,
    arm: Tensor,
    seeds: Tensor,
    trigger: Tensor | None,
    region: Tensor | None,
    arm_inside: Tensor | None,
    history: Tensor | None,
) -> None:
    check_batch("x", x)
    count, device = x.shape[0], x.device
    check_image("x", x, x.shape, FLOATS)
    check_table(table, STEP_COLUMNS, x, x.dtype)
    check_index("arm", arm, count, device)
    check_index("seeds", seeds, count, device)
    if trigger is not None:
        check_shared("trigger", trigger, x, torch.float64 if x.dtype == torch.float64 else torch.float32)
    check_region(region, arm_inside, x)
    if history is not None:
        check_dtype("history", history, (torch.float64,) if x.dtype == torch.float64 else (torch.float32,))
        check_device("history", history, device)
        if history.dim() != 5 or not 1 <= history.shape[0] <= HISTORY_SLOTS or history.shape[1:] != x.shape:
            shape = ", ".join(map(str, x.shape))
            raise ValueError(f"history has shape {tuple(history.shape)}: expected [1..{HISTORY_SLOTS}, {shape}]")
        if not history.is_contiguous():
            raise ValueError(f"history has strides {history.stride()}: expected a contiguous tensor")


def check_training(
    x0: Tensor,
    t: Tensor,
    arm: Tensor,
    seeds: Tensor,
    table: Tensor,
    dtype: torch.dtype,
    trigger: Tensor | None,
    mask: Tensor | None,
    flip: Tensor | None,
    region: Tensor | None,
    arm_inside: Tensor | None,
) -> None:
    check_batch("x0", x0)
    count, device = x0.shape[0], x0.device
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    check_image("x0", x0, x0.shape, (torch.uint8, exact))
    check_table(table, NOISING_COLUMNS, x0, dtype)
    for name, index in (("t", t), ("arm", arm), ("seeds", seeds)):
        check_index(name, index, count, device)
    if trigger is not None:
        check_shared("trigger", trigger, x0, exact)
    if mask is not None:
        if trigger is None:
            raise ValueError("mask was given without trigger: expected both, since R = mask * x0 + trigger")
        check_shared("mask", mask, x0, exact)
    if flip is not None:
        check_dtype("flip", flip, (torch.bool,))
        check_device("flip", flip, device)
        if flip.shape != (count,):
            raise ValueError(f"flip has shape {tuple(flip.shape)}: expected ({count},)")
    check_region(region, arm_inside, x0)


def check_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, shift: Tensor | None) -> None:
    """Arguments of `bdkernels.group_norm`."""
    check_batch("x", x)
    check_dtype("x", x, FLOATS)
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups is {groups}: expected a divisor of {channels} channels")
    for name, value, leads in (("weight", weight, None), ("bias", bias, None), ("shift", shift, (1, len(x)))):
        if value is None:
            continue
        check_dtype(name, value, (x.dtype,))
        check_device(name, value, x.device)
        if value.shape[-1:] != (channels,) or value.dim() != (1 if leads is None else 2):
            expected = f"({channels},)" if leads is None else f"(1 or {len(x)}, {channels})"
            raise ValueError(f"{name} has shape {tuple(value.shape)}: expected {expected}")
        if (leads is not None and value.shape[0] not in leads) or not value.is_contiguous():
            raise ValueError(f"{name} has shape {tuple(value.shape)}: expected (1 or {len(x)}, {channels}), contiguous")


def check_conv(x: Tensor, weight: Tensor, bias: Tensor | None, skip: Tensor | None, upsample: bool) -> None:
    """Arguments of `bdkernels.conv3x3`."""
    check_batch("x", x)
    check_dtype("x", x, FLOATS)
    for name, value in (("weight", weight), ("bias", bias), ("skip", skip)):
        if value is not None:
            check_dtype(name, value, (x.dtype,))
            check_device(name, value, x.device)
    if weight.dim() != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected (filters, {x.shape[1]}, 3, 3)")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_contiguous()):
        raise ValueError(f"bias has shape {tuple(bias.shape)}: expected ({weight.shape[0]},), contiguous")
    scale = 2 if upsample else 1
    shape = (x.shape[0], weight.shape[0], x.shape[2] * scale, x.shape[3] * scale)
    if skip is not None and skip.shape != shape:
        raise ValueError(f"skip has shape {tuple(skip.shape)}: expected {shape}")


def check_block(x: Tensor, weights: Weights, groups: int, shift: Tensor | None) -> None:
    """Arguments of `bdkernels.residual_block`."""
    check_norm(x, weights.norm1_weight, weights.norm1_bias, groups, None)
    channels, filters = x.shape[1], len(weights.conv1_weight)
    if filters % groups:
        raise ValueError(f"groups is {groups}: expected a divisor of {filters} filters")
    if (weights.shortcut_weight is None) != (weights.shortcut_bias is None):
        raise ValueError("shortcut_weight and shortcut_bias: expected both or neither")
    if weights.shortcut_weight is None and channels != filters:
        raise ValueError(f"no shortcut_weight: expected one, from {channels} channels to {filters} filters")
    shapes = {
        "conv1_weight": (filters, channels, 3, 3),
        "conv2_weight": (filters, filters, 3, 3),
        "shortcut_weight": (filters, channels, 1, 1),
    }
    for name, value in zip(weights._fields[2:], weights[2:], strict=True):
        if value is None:
            continue
        shape = shapes.get(name, (filters,))
        if value.shape != shape or (len(shape) == 1 and not value.is_contiguous()):
            raise ValueError(f"{name} has shape {tuple(value.shape)}: expected {shape}, contiguous")
        if value.dtype != x.dtype or value.device != x.device:
            check_dtype(name, value, (x.dtype,))
            check_device(name, value, x.device)
    if shift is not None:
        check_dtype("shift", shift, (x.dtype,))
        check_device("shift", shift, x.device)
        if shift.shape not in ((1, filters), (len(x), filters)) or not shift.is_contiguous():
            raise ValueError(f"shift has shape {tuple(shift.shape)}: expected (1 or {len(x)}, {filters}), contiguous")
