"""The public ops. Each checks its arguments, then calls one registered torch op; the formulas are in ``columns.py``.

An arm or a row outside the table is a ``ValueError`` on the CPU. On a GPU nothing is read back to see it: such a row is
never read, its columns are NaN, so the pixels that take it become NaN, and a sample whose ``arm`` it is stores nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Literal

import torch
from torch import Tensor

from . import _schemas  # noqa: F401  defines torch.ops.bdk
from .backends import backend_for
from .block import Weights
from .checks import (
    FLOATS,
    check_block,
    check_conv,
    check_device,
    check_dtype,
    check_image,
    check_in_place,
    check_index,
    check_norm,
    check_output,
    check_shared,
    check_step,
    check_training,
    names,
)
from .noise import STREAM_INITIAL

NO_BAD_ROW: Final = 2**63 - 1
"""What ``bad_row`` holds while every network output was finite."""


def normal(
    seeds: Tensor,
    shape: Sequence[int],
    *,
    step: int | Tensor = 0,
    stream: int = STREAM_INITIAL,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals that depend on (seed, stream, step, element) alone: see `bdkernels.noise`.

    Args:
        seeds: int64 [N], one 64-bit seed a sample.
        shape: (C, H, W) of one sample.
        step: Step of the noise contract in [0, 2^32), or an int64 tensor, 0-d or [N].
        stream: One of the ``STREAM_`` constants.
        dtype: float32, bfloat16, float16 or float64 (the contract's float32 values, widened).

    Returns:
        ``dtype`` [N, C, H, W], contiguous.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or device.
    """
    if seeds.dim() != 1:
        raise ValueError(f"seeds has shape {tuple(seeds.shape)}: expected (N,)")
    check_index("seeds", seeds, seeds.shape[0], seeds.device)
    if isinstance(step, int):
        step = torch.full((), step, dtype=torch.int64, device=seeds.device)
    check_index("step", step, seeds.shape[0], seeds.device, scalar=True)
    if len(shape) != 3 or any(n < 0 for n in shape):
        raise ValueError(f"shape is {tuple(shape)}: expected (C, H, W)")
    if dtype not in FLOATS:
        raise TypeError(f"dtype is {str(dtype).removeprefix('torch.')}: expected {names(FLOATS)}")
    return torch.ops.bdk.normal(seeds, step, stream, list(shape), dtype)


def fused_step(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    arm: Tensor,
    step: Tensor,
    seeds: Tensor,
    *,
    trigger: Tensor | None = None,
    region: Tensor | None = None,
    arm_inside: Tensor | None = None,
    history: Tensor | None = None,
) -> Tensor:
    """One sampler row, ``x' = clamp(P x + Q x0 + S m + sum_j H_j h_j + Z z + R r, LOW, HIGH)``: see `bdkernels.columns`.

    Pure and differentiable in ``x``, ``model_output``, ``trigger`` and ``history``; a row's stores are made by
    `fused_step_` only.

    Args:
        x: float32, bfloat16, float16 or float64 [N, C, H, W], contiguous or channels-last.
        model_output: The network's output ``m``, shape of ``x``, any of these layouts and dtypes (float64 only with ``x``).
        table: float32 [arms, rows, STEP_COLUMNS] (float64 allowed where ``x`` is).
        arm: int64 [N], each sample's arm.
        step: int64, 0-d or [N]: the row, which is also the step of the noise contract.
        seeds: int64 [N], each sample's 64-bit seed.
        trigger: Trigger image ``r``, float32 [1 or N, C, H, W].
        region: bool [1 or N, C, H, W]: pixels that take their row from ``arm_inside``.
        arm_inside: int64 [N]; goes with ``region``.
        history: float32 [slots, N, C, H, W], at most four slots.

    Returns:
        ``x'``, of ``x``'s shape, dtype and layout.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape, stride or device; on the CPU also an arm or row outside the table.
    """
    check_step(x, table, arm, seeds, trigger, region, arm_inside, history)
    check_output(x, model_output)
    check_index("step", step, x.shape[0], x.device, scalar=True)
    return torch.ops.bdk.fused_step(x, model_output, table, arm, step, seeds, trigger, region, arm_inside, history)


def fused_step_(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    arm: Tensor,
    step: Tensor,
    seeds: Tensor,
    *,
    trigger: Tensor | None = None,
    region: Tensor | None = None,
    arm_inside: Tensor | None = None,
    history: Tensor | None = None,
    bad_row: Tensor | None = None,
) -> Tensor:
    """`fused_step` in place, with the row's stores into ``history``; returns ``x``. Nothing is read back to the host.

    Args:
        bad_row: int64 0-d, lowered to the first row at which a network output was not finite (start at `NO_BAD_ROW`).

    The other arguments and the errors are `fused_step`'s; a tensor that requires a gradient where gradients are recorded is a
    ValueError too. With a ``region``, the slot of a store is the outside arm's.
    """
    check_in_place(x=x, model_output=model_output, trigger=trigger, history=history)
    check_step(x, table, arm, seeds, trigger, region, arm_inside, history)
    check_output(x, model_output)
    check_index("step", step, x.shape[0], x.device, scalar=True)
    if bad_row is not None:
        check_index("bad_row", bad_row, -1, x.device, scalar=True)
    torch.ops.bdk.fused_step_(x, model_output, table, arm, step, seeds, trigger, region, arm_inside, history, bad_row)
    return x


def bind_step(
    x: Tensor,
    table: Tensor,
    arm: Tensor,
    steps: Tensor,
    seeds: Tensor,
    *,
    trigger: Tensor | None = None,
    region: Tensor | None = None,
    arm_inside: Tensor | None = None,
    history: Tensor | None = None,
    bad_row: Tensor | None = None,
) -> Callable[[Tensor, int], None]:
    """`fused_step_` for a whole loop: ``step(m, k)`` makes ``x`` of row ``steps[k]``, everything else checked once.

    On a CPU a call for one image of 3 x 32 x 32 takes 20 us from cold caches, where `fused_step_` takes 100.

    Args:
        steps: int64 [K], or [K, N] with a row for each sample.

    The other arguments and the errors are `fused_step_`'s; they may change between calls in value, not in shape or place.
    The compiled step raises a ValueError where ``x``, ``history`` or ``bad_row`` moved in memory; it reads the others where
    they were, and none of them may be resized. The backend stays what it is now. Not for `torch.compile`.
    """
    check_in_place(x=x, trigger=trigger, history=history)
    check_step(x, table, arm, seeds, trigger, region, arm_inside, history)
    check_dtype("steps", steps, (torch.int64,))
    check_device("steps", steps, x.device)
    if steps.dim() not in (1, 2) or steps.shape[1:] not in ((), x.shape[:1]) or not steps.is_contiguous():
        raise ValueError(f"steps has shape {tuple(steps.shape)}: expected (K,) or (K, {x.shape[0]}), contiguous")
    if bad_row is not None:
        check_index("bad_row", bad_row, -1, x.device, scalar=True)

    def check(model_output: Tensor) -> None:
        check_in_place(x=x, model_output=model_output, trigger=trigger, history=history)
        check_output(x, model_output)

    rest = (trigger, region, arm_inside, history)
    backend = backend_for(x.device, x.dtype)
    if hasattr(backend, "bind_step"):  # a compiled one
        return backend.bind_step(check, x, table, arm, steps, seeds, *rest, bad_row)
    each = list(steps)

    def step(model_output: Tensor, k: int) -> None:
        check(model_output)
        if not 0 <= k < len(each):
            raise ValueError(f"step {k} was asked for: expected 0 to {len(each) - 1}")
        torch.ops.bdk.fused_step_(x, model_output, table, arm, each[k], seeds, *rest, bad_row)

    return step


def fused_noising(
    x0: Tensor,
    t: Tensor,
    arm: Tensor,
    seeds: Tensor,
    table: Tensor,
    *,
    target: Tensor | None = None,
    trigger: Tensor | None = None,
    mask: Tensor | None = None,
    flip: Tensor | None = None,
    region: Tensor | None = None,
    arm_inside: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Noised, and where asked poisoned, training inputs: ``x_t = A d + M R + S eps``, see `bdkernels.columns`.

    ``d`` is ``target`` for samples whose arm is above 0, else ``x0``; ``R = mask * x0 + trigger``.

    Args:
        x0: Images [N, C, H, W], uint8 (read as ``(2u - 255) / 255``) or float32 in [-1, 1]; contiguous or channels-last.
        t: int64 [N], each sample's row of the table.
        arm: int64 [N]: 0 is clean by convention, others are poisoned.
        seeds: int64 [N], each training sample's seed.
        table: float32 [arms, T, NOISING_COLUMNS].
        target: Target image ``y``, float32 [1 or N, C, H, W].
        trigger: Premultiplied trigger ``r``, float32 [1 or N, C, H, W].
        mask: ``M``, float32 [1 or N, C, H, W], 1 where the trigger is background.
        flip: bool [N]: mirror ``x0`` left to right.
        region: bool [1 or N, C, H, W]: pixels that take their row from ``arm_inside``.
        arm_inside: int64 [N]; goes with ``region``.
        dtype: Of the result.

    Returns:
        ``x_t``, ``dtype``, in ``x0``'s shape and layout.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape, stride or device; on the CPU also an arm or timestep outside the table.
    """
    if dtype not in FLOATS:
        raise TypeError(f"dtype is {str(dtype).removeprefix('torch.')}: expected {names(FLOATS)}")
    check_training(x0, t, arm, seeds, table, dtype, trigger, mask, flip, region, arm_inside)
    if target is not None:
        check_shared("target", target, x0, torch.float64 if dtype == torch.float64 else torch.float32)
    return torch.ops.bdk.fused_noising(x0, t, arm, seeds, table, target, trigger, mask, flip, region, arm_inside, dtype)


def fused_loss(
    prediction: Tensor,
    x0: Tensor,
    t: Tensor,
    arm: Tensor,
    seeds: Tensor,
    table: Tensor,
    *,
    trigger: Tensor | None = None,
    mask: Tensor | None = None,
    flip: Tensor | None = None,
    region: Tensor | None = None,
    arm_inside: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """The training loss ``W (prediction - eps - C R)^2`` against a target recomputed from the seeds, never stored.

    Value and gradient are made in one pass; differentiable in ``prediction``.

    Args:
        prediction: The network's output, shape of ``x0``, any float dtype, contiguous or channels-last.
        reduction: "mean" over all elements, or "sum" over C, H, W and mean over the batch.

    The other arguments, ``target`` and ``dtype`` apart, and the errors are `fused_noising`'s, and must be what the inputs
    were made with.

    Returns:
        float32 [N]: each sample's share; their sum is the loss of the batch.
    """
    check_training(x0, t, arm, seeds, table, prediction.dtype, trigger, mask, flip, region, arm_inside)
    check_image("prediction", prediction, x0.shape, FLOATS)
    check_device("prediction", prediction, x0.device)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}: expected 'mean' or 'sum'")
    divisor = x0.numel() if reduction == "mean" else x0.shape[0]
    scale = 1.0 / max(divisor, 1)
    loss, _ = torch.ops.bdk.fused_loss(
        prediction, x0, t, arm, seeds, table, trigger, mask, flip, region, arm_inside, scale
    )
    return loss


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    *,
    eps: float = 1e-5,
    shift: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """Group normalisation of ``x + shift`` and then SiLU, as in a residual block, in one pass: differentiable.

    Args:
        x: float [N, C, H, W]; float32 in channels-last has a kernel on the CPU, all else runs in torch.
        weight, bias: [C], ``x``'s dtype.
        groups: Divides C.
        eps: Added to the variance.
        shift: [N or 1, C], ``x``'s dtype: a time embedding.
        silu: Whether ``v / (1 + e^-v)`` follows.

    Returns:
        Of ``x``'s shape, dtype and layout.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or device.
    """
    check_norm(x, weight, bias, groups, shift)
    return torch.ops.bdk.group_norm(x, weight, bias, groups, shift, silu, eps)[0]


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    skip: Tensor | None = None,
    upsample: bool = False,
) -> Tensor:
    """A 3 x 3 convolution padded with zeros, ``conv(x, weight) + bias + skip``: differentiable, once.

    On the CPU in channels-last float32 with channels and filters in multiples of 16 it takes Winograd's way, with 2.25
    times fewer products, four times fewer after upsampling; all else runs in torch. A sample's bits depend neither on the
    batch nor on the number of threads.

    Args:
        x: float [N, C, H, W].
        weight: [K, C, 3, 3], ``x``'s dtype.
        bias: [K], ``x``'s dtype.
        skip: [N, K, H, W], or [N, K, 2H, 2W] where upsampled, ``x``'s dtype.
        upsample: Whether each pixel of ``x`` stands for four.

    Returns:
        Of ``skip``'s shape and ``x``'s dtype and layout.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or device.
    """
    check_conv(x, weight, bias, skip, upsample)
    return torch.ops.bdk.conv3x3(x, weight, bias, skip, upsample)


def residual_block(
    x: Tensor, weights: Weights, groups: int, *, shift: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """``conv2(silu(norm2(conv1(silu(norm1(x))) + shift))) + shortcut(x)``: differentiable, once.

    Its parts are those of `group_norm` and `conv3x3`, with their kernels; the shortcut has one of its own for the same
    channels and filters. It is a call where they would be five, each with 65 us of its own when training on a CPU.

    Args:
        x: float [N, C, H, W].
        weights: ``x``'s dtype.
        groups: Of both norms; divides C and K.
        shift: [N or 1, K], ``x``'s dtype: a time embedding.
        eps: Added to the variances.

    Returns:
        [N, K, H, W], of ``x``'s dtype and layout.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or device.
    """
    check_block(x, weights, groups, shift)
    return torch.ops.bdk.residual_block(x, shift, *weights, groups, eps)[0]
