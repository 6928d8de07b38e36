"""A residual block in one call: most of a small network's time around its kernels is the way through autograd to each.

    a = silu(norm1(x))      h = conv1(a)      b = silu(norm2(h + shift))      out = conv2(b) + shortcut(x)

The backward pass is the same line from its end, and the norm of ``x`` adds what came through the shortcut as it writes.
Each part runs on its own backend (`bdkernels.backends`). The shortcut is a 1 x 1 convolution, or ``x`` itself.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from torch import Tensor

from .backends import conv_backend, norm_backend
from .reference import layout_of


class Weights(NamedTuple):
    """C channels in, K out; convolutions are 3 x 3, the shortcut 1 x 1, or absent where C = K."""

    norm1_weight: Tensor
    norm1_bias: Tensor
    conv1_weight: Tensor
    conv1_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    conv2_weight: Tensor
    conv2_bias: Tensor
    shortcut_weight: Tensor | None = None
    shortcut_bias: Tensor | None = None


class Saved(NamedTuple):
    """What the backward pass needs of the forward pass; the statistics are `group_norm`'s."""

    a: Tensor
    h: Tensor
    b: Tensor
    statistics1: Tensor
    statistics2: Tensor


WEIGHTS: Final = ", ".join(f"Tensor{'?' * (name in Weights._field_defaults)} {name}" for name in Weights._fields)
SAVED: Final = ", ".join(f"Tensor {name}" for name in Saved._fields)
"""Both as a schema's arguments."""


def forward(x: Tensor, shift: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """See `bdkernels.residual_block`: ``out`` and what is `Saved`; ``rest`` is `Weights`, groups and eps."""
    *weights, groups, eps = rest
    w = Weights(*weights)
    filters = len(w.conv1_weight)
    a, statistics1 = norm_backend(x).group_norm(x, w.norm1_weight, w.norm1_bias, groups, None, True, eps)
    h = conv_backend(a, filters).conv(a, w.conv1_weight, w.conv1_bias, None)
    b, statistics2 = norm_backend(h).group_norm(h, w.norm2_weight, w.norm2_bias, groups, shift, True, eps)
    skip = x
    if w.shortcut_weight is not None:
        skip = conv_backend(x, filters).conv(x, w.shortcut_weight, w.shortcut_bias, None)
    out = conv_backend(b, filters).conv(b, w.conv2_weight, w.conv2_bias, skip)
    return out, a, h, b, statistics1, statistics2


def backward(dy: Tensor, x: Tensor, shift: Tensor | None, *rest: Any) -> list[Tensor]:
    """Gradients in ``x``, ``shift`` and `Weights`, those of what is absent empty, and of filters where not asked for.

    ``rest`` is `Saved`, `Weights`, groups and whether gradients in the filters are asked for.
    """
    *tensors, groups, asked = rest
    dy = dy.contiguous(memory_format=layout_of(x))
    saved, w = Saved(*tensors[: len(Saved._fields)]), Weights(*tensors[len(Saved._fields) :])

    def conv(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
        dx = conv_backend(dy, weight.shape[1]).conv_input_gradient(dy, weight)
        if not asked:
            return dx, None, None
        return dx, *conv_backend(x, len(weight)).conv_weight_gradient(dy, x, side=weight.shape[2])

    dskip, *dshortcut = (dy, None, None) if w.shortcut_weight is None else conv(dy, x, w.shortcut_weight)
    db, *dconv2 = conv(dy, saved.b, w.conv2_weight)
    dh, *dnorm2 = norm_backend(saved.h).group_norm_backward(
        db, saved.h, w.norm2_weight, w.norm2_bias, saved.statistics2, groups, shift, True
    )
    da, *dconv1 = conv(dh, saved.a, w.conv1_weight)
    dx, *dnorm1 = norm_backend(x).group_norm_backward(
        da, x, w.norm1_weight, w.norm1_bias, saved.statistics1, groups, None, True, dskip
    )
    dshift = None if shift is None else dh.sum((2, 3)).sum_to_size(shift.shape)
    found = (dx, dshift, *dnorm1, *dconv1, *dnorm2, *dconv2, *dshortcut)
    return [x.new_empty(0) if gradient is None else gradient for gradient in found]
