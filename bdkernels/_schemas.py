"""Every torch.library definition, fake and autograd formula, in one place. The backend is chosen inside the call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import block, reference
from .backends import backend_for, conv_backend, norm_backend
from .noise import STREAM_STEP

_STEP = (
    "Tensor model_output, Tensor table, Tensor arm, Tensor step, Tensor seeds,"
    " Tensor? trigger, Tensor? region, Tensor? arm_inside"
)
_NOISING = "Tensor? trigger, Tensor? mask, Tensor? flip, Tensor? region, Tensor? arm_inside"

_lib = torch.library.Library("bdk", "DEF")
_lib.define("normal(Tensor seeds, Tensor step, int stream, SymInt[] shape, ScalarType dtype) -> Tensor")
_lib.define(f"fused_step(Tensor x, {_STEP}, Tensor? history) -> Tensor")
_lib.define(f"fused_step_(Tensor(a!) x, {_STEP}, Tensor(b!)? history, Tensor(c!)? bad_row) -> ()")
_lib.define(
    "fused_noising(Tensor x0, Tensor t, Tensor arm, Tensor seeds, Tensor table, Tensor? target,"
    f" {_NOISING}, ScalarType dtype) -> Tensor"
)
_lib.define(
    "fused_loss(Tensor prediction, Tensor x0, Tensor t, Tensor arm, Tensor seeds, Tensor table,"
    f" {_NOISING}, float scale) -> (Tensor, Tensor)"
)
_NORM = "int groups, Tensor? shift, bool silu"
_lib.define(f"group_norm(Tensor x, Tensor weight, Tensor bias, {_NORM}, float eps) -> (Tensor, Tensor)")
_lib.define(
    "group_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor statistics,"
    f" {_NORM}) -> (Tensor, Tensor, Tensor)"
)
_lib.define("conv3x3(Tensor x, Tensor weight, Tensor? bias, Tensor? skip, bool upsample) -> Tensor")
_lib.define("conv3x3_input_gradient(Tensor dy, Tensor weight, bool upsample) -> Tensor")
_lib.define("conv3x3_weight_gradient(Tensor dy, Tensor x, bool upsample) -> (Tensor, Tensor)")
_lib.define(
    f"residual_block(Tensor x, Tensor? shift, {block.WEIGHTS}, int groups, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_lib.define(
    f"residual_block_backward(Tensor dy, Tensor x, Tensor? shift, {block.SAVED}, {block.WEIGHTS}, int groups, bool asked)"
    " -> Tensor[]"
)


def _normal(seeds: Tensor, step: Tensor, stream: int, shape: list[int], dtype: torch.dtype) -> Tensor:
    return backend_for(seeds.device, dtype).normal(seeds, step, stream, shape, dtype)


def _fused_step(x: Tensor, *rest: Tensor | None) -> Tensor:
    return backend_for(x.device, x.dtype).fused_step(x, *rest)


def _fused_step_(x: Tensor, *rest: Tensor | None) -> None:
    backend_for(x.device, x.dtype).fused_step_(x, *rest)
    # Autograd must see the write, or a graph that saved x computes wrong gradients; the dispatcher says nothing of it.
    torch.autograd.graph.increment_version([t for t in (x, *rest[-2:]) if t is not None])


def _fused_noising(x0: Tensor, *rest: Any) -> Tensor:
    return backend_for(x0.device, rest[-1]).fused_noising(x0, *rest)


def _fused_loss(prediction: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return backend_for(prediction.device, prediction.dtype).fused_loss(prediction, *rest)


def _group_norm(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return norm_backend(x).group_norm(x, *rest)


def _group_norm_backward(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return norm_backend(x).group_norm_backward(dy, x, *rest)


def _conv3x3(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return conv_backend(x, len(weight)).conv(x, weight, *rest)


def _conv3x3_input_gradient(dy: Tensor, weight: Tensor, upsample: bool) -> Tensor:
    return conv_backend(dy, weight.shape[1]).conv_input_gradient(dy, weight, upsample)


def _conv3x3_weight_gradient(dy: Tensor, x: Tensor, upsample: bool) -> tuple[Tensor, Tensor]:
    return conv_backend(x, dy.shape[1]).conv_weight_gradient(dy, x, upsample)


for _name, _impl in {
    "normal": _normal,
    "fused_step": _fused_step,
    "fused_step_": _fused_step_,
    "fused_noising": _fused_noising,
    "fused_loss": _fused_loss,
    "group_norm": _group_norm,
    "group_norm_backward": _group_norm_backward,
    "conv3x3": _conv3x3,
    "conv3x3_input_gradient": _conv3x3_input_gradient,
    "conv3x3_weight_gradient": _conv3x3_weight_gradient,
    "residual_block": block.forward,
    "residual_block_backward": block.backward,
}.items():
    _lib.impl(_name, _impl, "CompositeExplicitAutograd")


@torch.library.register_fake("bdk::normal", lib=_lib)
def _(seeds: Tensor, step: Tensor, stream: int, shape: list[int], dtype: torch.dtype) -> Tensor:
    return seeds.new_empty((seeds.shape[0], *shape), dtype=dtype)


@torch.library.register_fake("bdk::fused_step", lib=_lib)
def _(x: Tensor, *rest: Tensor | None) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("bdk::fused_step_", lib=_lib)
def _(x: Tensor, *rest: Tensor | None) -> None:
    return None


@torch.library.register_fake("bdk::fused_noising", lib=_lib)
def _(x0: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x0, dtype=rest[-1])


@torch.library.register_fake("bdk::fused_loss", lib=_lib)
def _(prediction: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if prediction.dtype == torch.float64 else torch.float32
    return prediction.new_empty(prediction.shape[0], dtype=dtype), torch.empty_like(prediction)


def _step_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _step_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients in ``x``, ``model_output``, ``trigger`` and ``history``, through the reference formula.

    The noise, which says where the outer clamp binds, is one launch: in the reference it is 341 ops, and all else is 45.
    """
    x, _, _, _, step, seeds, *_ = ctx.saved_tensors
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    z = torch.ops.bdk.normal(seeds, step, STREAM_STEP, x.shape[1:], compute)
    with torch.enable_grad():
        inputs: list[Any] = [None if v is None else v.detach().requires_grad_(need) for v, need in
                  zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)]  # fmt: skip
        wanted = [v for v in inputs if v is not None and v.requires_grad]
        x_next, _, _ = reference.step_formula(*inputs, z=z)
        found = iter(torch.autograd.grad(x_next.to(grad.dtype), wanted, grad, allow_unused=True))
    return tuple(next(found) if v is not None and v.requires_grad else None for v in inputs)


torch.library.register_autograd("bdk::fused_step", _step_backward, setup_context=_step_context, lib=_lib)


def _loss_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or a full-size zero would be made for the gradient's own gradient


def _all_ones(grad_loss: Tensor) -> bool:
    """A look that is cheap on the CPU alone: the product would be half of the op's time, most of that for fresh pages."""
    return bool((grad_loss == 1).all())


def _loss_backward(ctx: Any, grad_loss: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradient was made in the forward pass; scale it by what each sample's loss is worth."""
    (grad,) = ctx.saved_tensors
    if type(grad_loss) is Tensor and grad_loss.device.type == "cpu" and _all_ones(grad_loss):
        return (grad, *(None,) * 11)
    return (grad * grad_loss.reshape(-1, 1, 1, 1).to(grad.dtype), *(None,) * 11)


torch.library.register_autograd("bdk::fused_loss", _loss_backward, setup_context=_loss_context, lib=_lib)


@torch.library.register_fake("bdk::group_norm", lib=_lib)
def _(x: Tensor, weight: Tensor, bias: Tensor, groups: int, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], groups, 2)


@torch.library.register_fake("bdk::group_norm_backward", lib=_lib)
def _(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


def _norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, groups, shift, silu, _ = inputs
    ctx.save_for_backward(x, weight, bias, shift, output[1])
    ctx.groups, ctx.silu = groups, silu
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _norm_backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    x, weight, bias, shift, statistics = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.bdk.group_norm_backward(dy, x, weight, bias, statistics, ctx.groups, shift, ctx.silu)
    dshift = None if shift is None else dx.sum((2, 3)).sum_to_size(shift.shape)
    return dx, dweight, dbias, None, dshift, None, None


torch.library.register_autograd("bdk::group_norm", _norm_backward, setup_context=_norm_context, lib=_lib)


def _new_images(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    shape = (len(like), channels, height, width)
    return like.new_empty(shape).contiguous(memory_format=reference.layout_of(like))


@torch.library.register_fake("bdk::conv3x3", lib=_lib)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, skip: Tensor | None, upsample: bool) -> Tensor:
    scale = 2 if upsample else 1
    return _new_images(x, weight.shape[0], x.shape[2] * scale, x.shape[3] * scale)


@torch.library.register_fake("bdk::conv3x3_input_gradient", lib=_lib)
def _(dy: Tensor, weight: Tensor, upsample: bool) -> Tensor:
    scale = 2 if upsample else 1
    return _new_images(dy, weight.shape[1], dy.shape[2] // scale, dy.shape[3] // scale)


@torch.library.register_fake("bdk::conv3x3_weight_gradient", lib=_lib)
def _(dy: Tensor, x: Tensor, upsample: bool) -> tuple[Tensor, Tensor]:
    weight = x.new_empty((dy.shape[1], x.shape[1], 3, 3)).contiguous(memory_format=torch.channels_last)
    return weight, x.new_empty(dy.shape[1])


def _conv_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, _, ctx.upsample = inputs
    ctx.save_for_backward(x, weight)


def _conv_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_skip, _ = ctx.needs_input_grad
    dy = dy.contiguous(memory_format=reference.layout_of(x))
    dx = torch.ops.bdk.conv3x3_input_gradient(dy, weight, ctx.upsample) if needs_x else None
    dweight = dbias = None
    if needs_weight or needs_bias:
        dweight, dbias = torch.ops.bdk.conv3x3_weight_gradient(dy, x, ctx.upsample)
    return dx, dweight if needs_weight else None, dbias if needs_bias else None, dy if needs_skip else None, None


torch.library.register_autograd("bdk::conv3x3", _conv_backward, setup_context=_conv_context, lib=_lib)


@torch.library.register_fake("bdk::residual_block", lib=_lib)
def _(x: Tensor, shift: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    weights, groups = block.Weights(*rest[:-2]), rest[-2]
    out, h, b = (_new_images(x, len(weights.conv1_weight), *x.shape[2:]) for _ in range(3))
    first, second = (x.new_empty(len(x), groups, 2) for _ in range(2))
    return out, torch.empty_like(x), h, b, first, second


@torch.library.register_fake("bdk::residual_block_backward", lib=_lib)
def _(dy: Tensor, x: Tensor, shift: Tensor | None, *rest: Any) -> list[Tensor]:
    *tensors, _, asked = rest
    weights = zip(block.Weights._fields, tensors[len(block.Saved._fields) :], strict=True)
    found = [x, shift, *(v if asked or name.startswith("norm") else None for name, v in weights)]
    return [x.new_empty(0) if v is None else torch.empty_like(v) for v in found]


def _block_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.groups, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _block_backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    count, needs = 2 + len(block.Weights._fields), ctx.needs_input_grad
    if dy is None:
        return (None,) * (count + 2)
    x, shift, *rest = ctx.saved_tensors
    weights, saved = rest[: count - 2], rest[count - 2 :]
    found = torch.ops.bdk.residual_block_backward(dy, x, shift, *saved, *weights, ctx.groups, any(needs[2:]))
    return (*(v if need else None for v, need in zip(found, needs, strict=False)), None, None)


torch.library.register_autograd("bdk::residual_block", _block_backward, setup_context=_block_context, lib=_lib)
