"""Every op in plain torch, on any device and in any floating dtype: the specification, and a complete backend.

float64 inputs are computed in float64 (with the contract's float32 noise); all others in float32, bit for bit as the
compiled kernels do. The formulas stand in ``columns.py`` and ``noise.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import noise
from .columns import HISTORY_SLOTS, STORE_COLUMNS, STORES, Noising, Step, Store

_LOW32 = 0xFFFFFFFF


def _philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on words held in int64 tensors. A product wraps at 64 bits; its halves are masked back to words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(noise.PHILOX_ROUNDS):
        p0, p1 = c0 * noise.PHILOX_MULTIPLIERS[0], c2 * noise.PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW32) ^ c1 ^ k0, p1 & _LOW32, ((p0 >> 32) & _LOW32) ^ c3 ^ k1, p0 & _LOW32
        k0, k1 = (k0 + noise.PHILOX_WEYL[0]) & _LOW32, (k1 + noise.PHILOX_WEYL[1]) & _LOW32
    return c0, c1, c2, c3


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    total = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = total * x + c
    return total


def _ln(u: Tensor) -> Tensor:
    offset = u.view(torch.int32) - noise.SQRT_HALF_BITS
    e = (offset >> 23).to(torch.float32)
    a = ((offset & 0x7FFFFF) + noise.SQRT_HALF_BITS).view(torch.float32) - 1
    square = a * a
    tail = square * a * _horner(a, noise.LN) + e * noise.LN2_LOW
    tail = tail - square * 0.5
    return e * noise.LN2_HIGH + (a + tail)


def _cos_sin(u: Tensor) -> tuple[Tensor, Tensor]:
    quadrant = ((u * 8).to(torch.int32) + 1) >> 1
    f = u - quadrant.to(torch.float32) * 0.25
    square = f * f
    s = f * _horner(square, noise.SIN)
    c = square * _horner(square, noise.COS) + 1
    odd = (quadrant & 1).bool()
    cos, sin = torch.where(odd, s, c), torch.where(odd, c, s)
    return torch.where(((quadrant + 1) & 2).bool(), -cos, cos), torch.where((quadrant & 2).bool(), -sin, sin)


def _sqrt(x: Tensor) -> Tensor:
    """Correctly rounded: torch's float32 root on a CPU is not (its vector library misses 17 % of these by one bit)."""
    return torch.sqrt(x.double()).float()


def normal(seeds: Tensor, step: Tensor, stream: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """See `bdkernels.normal`."""
    elements = math.prod(shape)
    groups = torch.arange((elements + 3) // 4, dtype=torch.int64, device=seeds.device)[None]
    zero = torch.zeros_like(groups)
    key = ((seeds & _LOW32)[:, None], ((seeds >> 32) & _LOW32)[:, None])
    words = _philox((groups, zero + step.reshape(-1, 1), zero + stream, zero), key)
    u = [w.to(torch.float32) * 2.0**-32 + 2.0**-33 for w in words]
    z = []
    for radius_u, angle_u in ((u[0], u[1]), (u[2], u[3])):
        radius = _sqrt(_ln(radius_u) * -2.0)
        cos, sin = _cos_sin(angle_u)
        z += [radius * cos, radius * sin]
    flat = torch.stack(z, dim=-1).flatten(1)[:, :elements]
    return flat.reshape(len(seeds), *shape).to(dtype)


def _clamp(v: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Select form, so that NaN passes."""
    v = torch.where(v < low, low, v)
    return torch.where(v > high, high, v)


def _check_rows(table: Tensor, name: str, row: Tensor, arm: Tensor, arm_inside: Tensor | None) -> None:
    """On a CPU a wrong index is an error; elsewhere looking would read back, and indexing asserts on the device."""
    if table.device.type != "cpu":
        return
    for label, index, count in (
        (name, row, table.shape[1]),
        ("arm", arm, table.shape[0]),
        ("arm_inside", arm_inside, table.shape[0]),
    ):
        if index is not None and ((index < 0) | (index >= count)).any():
            wrong = index[(index < 0) | (index >= count)].flatten()[0]
            raise ValueError(f"{label} {int(wrong)} is outside the table: expected 0 to {count - 1}")


class _Rows:
    """The rows of a batch as ``row[column] -> [N|1, C|1, H|1, W|1]``, mixed by ``region`` where there is one."""

    def __init__(
        self, table: Tensor, arm: Tensor, row: Tensor, region: Tensor | None, arm_inside: Tensor | None
    ) -> None:
        self.outside = table[arm, row]
        self.inside = table[arm_inside, row] if arm_inside is not None else None
        self.region = region

    def __getitem__(self, column: int) -> Tensor:
        outside = self.outside[:, column].reshape(-1, 1, 1, 1)
        if self.inside is None or self.region is None:
            return outside
        return torch.where(self.region, self.inside[:, column].reshape(-1, 1, 1, 1), outside)

    def reads(self, slot: int) -> Tensor:
        """Whether any term of a sample's rows has this history slot, bool [N, 1, 1, 1]."""
        columns = [Step.H + slot, *(Step.STORE + k * STORE_COLUMNS + Store.J + slot for k in range(STORES))]
        reads = (self.outside[:, columns] != 0).any(1)
        if self.inside is not None:
            reads = reads | (self.inside[:, columns] != 0).any(1)
        return reads.reshape(-1, 1, 1, 1)


def step_formula(
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
    *,
    z: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], _Rows]:
    """``x'`` in the compute dtype, the value of each store, and the rows; ``z`` is drawn unless it is given."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    row = _Rows(table.to(compute), arm, step.expand(len(x)), region, arm_inside)
    x_t, m = x.to(compute), model_output.to(compute)
    r = trigger.to(compute) if trigger is not None else None
    h = [torch.where(row.reads(j), v.to(compute), 0.0) for j, v in enumerate(history if history is not None else ())]

    x0 = row[Step.A] * x_t + row[Step.B] * m
    if r is not None:
        x0 = x0 + row[Step.D] * r
    x0 = _clamp(x0, row[Step.LOW0], row[Step.HIGH0])

    if z is None:
        z = normal(seeds, step, noise.STREAM_STEP, x.shape[1:], compute)
    z = torch.where(row[Step.Z] == 0, torch.zeros_like(z), z)
    x_next = row[Step.P] * x_t + row[Step.Q] * x0 + row[Step.S] * m
    for j, past in enumerate(h):
        x_next = x_next + row[Step.H + j] * past
    x_next = x_next + row[Step.Z] * z
    if r is not None:
        x_next = x_next + row[Step.R] * r
    x_next = _clamp(x_next, row[Step.LOW], row[Step.HIGH])

    stores = []
    if history is not None:
        for k in range(STORES):
            base = Step.STORE + k * STORE_COLUMNS
            value = row[base + Store.E] * x_t + row[base + Store.F] * m + row[base + Store.G] * x0
            for j, past in enumerate(h):
                value = value + row[base + Store.J + j] * past
            stores.append(value + row[base + Store.K] * x_next)
    return x_next, stores, row


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
    _check_rows(table, "step", step, arm, arm_inside)
    x_next, _, _ = step_formula(x, model_output, table, arm, step, seeds, trigger, region, arm_inside, history)
    return x_next.to(x.dtype)


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
    _check_rows(table, "step", step, arm, arm_inside)
    x_next, stores, row = step_formula(x, model_output, table, arm, step, seeds, trigger, region, arm_inside, history)
    if bad_row is not None:
        finite = torch.isfinite(model_output).flatten(1).all(1)
        rows = torch.where(finite, torch.iinfo(torch.int64).max, step.expand(len(x)))
        bad_row.copy_(torch.minimum(bad_row, rows.min() if len(x) else bad_row))
    if history is not None:
        for k, value in enumerate(stores):
            slot = row.outside[:, Step.STORE + k * STORE_COLUMNS + Store.SLOT].reshape(-1, 1, 1, 1)
            for j in range(min(len(history), HISTORY_SLOTS)):
                history[j].copy_(torch.where(slot == j, value.to(history.dtype), history[j]))
    x.copy_(x_next.to(x.dtype))


def _pixels(x0: Tensor, flip: Tensor | None, compute: torch.dtype) -> Tensor:
    """Images in [-1, 1]: uint8 as ``(2u - 255) / 255``, mirrored left to right where ``flip``."""
    x = x0.to(compute)
    if x0.dtype == torch.uint8:
        # By a tensor: torch on a GPU multiplies by the rounded reciprocal of a number.
        x = (x * 2 - 255) / torch.full((), 255.0, dtype=compute, device=x.device)
    return x if flip is None else torch.where(flip.reshape(-1, 1, 1, 1), x.flip(-1), x)


def _poisoned_image(x: Tensor, trigger: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """``R = M x + r``, or None where there is no trigger."""
    if trigger is None:
        return None
    r = trigger.to(x.dtype)
    return r if mask is None else mask.to(x.dtype) * x + r


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
    _check_rows(table, "timestep", t, arm, arm_inside)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    row = _Rows(table.to(compute), arm, t, region, arm_inside)
    x = _pixels(x0, flip, compute)
    data = x if target is None else torch.where((arm > 0).reshape(-1, 1, 1, 1), target.to(compute), x)
    x_t = row[Noising.A] * data
    poisoned = _poisoned_image(x, trigger, mask)
    if poisoned is not None:
        x_t = x_t + row[Noising.M] * poisoned
    eps = normal(seeds, torch.zeros_like(t[:1]), noise.STREAM_TRAINING, x0.shape[1:], compute)
    return (x_t + row[Noising.S] * eps).to(dtype)


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
    _check_rows(table, "timestep", t, arm, arm_inside)
    compute = torch.float64 if prediction.dtype == torch.float64 else torch.float32
    row = _Rows(table.to(compute), arm, t, region, arm_inside)
    target = normal(seeds, torch.zeros_like(t[:1]), noise.STREAM_TRAINING, x0.shape[1:], compute)
    poisoned = _poisoned_image(_pixels(x0, flip, compute), trigger, mask)
    if poisoned is not None:
        target = target + row[Noising.C] * poisoned
    difference = prediction.to(compute) - target
    weight = row[Noising.W] * scale
    loss = (weight * difference.square()).flatten(1).sum(1, dtype=torch.float64)
    return loss.to(compute), (2 * weight * difference).to(prediction.dtype)


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, shift: Tensor | None, silu: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """See `bdkernels.group_norm`; and mean and inverse deviation of each group, [N, groups, 2]."""
    v = x if shift is None else x + shift[:, :, None, None]
    n, c, h, w = v.shape
    out, mean, inverse = torch.native_group_norm(v.contiguous(), weight, bias, n, c, h * w, groups, eps)
    if x.is_contiguous(memory_format=torch.channels_last):
        out = out.contiguous(memory_format=torch.channels_last)
    return F.silu(out) if silu else out, torch.stack([mean, inverse], dim=-1)


def group_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    groups: int,
    shift: Tensor | None,
    silu: bool,
    rest: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in ``x``, ``weight`` and ``bias``: dx = inverse (d w - mean(d w) - n mean(d w n)) + rest, d = dy silu'(u)."""
    n, _, h, w = x.shape
    v = x if shift is None else x + shift[:, :, None, None]
    mean, inverse = (s.to(x.dtype)[:, :, None, None] for s in statistics.unbind(-1))
    normalised = ((v.reshape(n, groups, -1, h * w) - mean) * inverse).reshape(x.shape)
    d = dy
    if silu:
        u = normalised * weight[:, None, None] + bias[:, None, None]
        gate = torch.sigmoid(u)
        d = dy * gate * (1 + u * (1 - gate))
    weighted = (d * weight[:, None, None]).reshape(n, groups, -1, h * w)
    one = weighted.mean((2, 3), keepdim=True)
    with_n = (weighted * normalised.reshape(weighted.shape)).mean((2, 3), keepdim=True)
    dx = (weighted - one - normalised.reshape(weighted.shape) * with_n) * inverse
    dx = dx.reshape(x.shape)
    return dx if rest is None else dx + rest, (d * normalised).sum((0, 2, 3)), d.sum((0, 2, 3))


def layout_of(x: Tensor) -> torch.memory_format:
    """Channels-last where ``x`` is, else contiguous."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _upsampled(x: Tensor, upsample: bool) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if upsample else x


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, skip: Tensor | None, upsample: bool = False) -> Tensor:
    """See `bdkernels.conv3x3`; filters of 1 x 1 as well."""
    out = F.conv2d(_upsampled(x, upsample), weight, bias, padding=weight.shape[2] // 2)
    return (out if skip is None else out + skip).contiguous(memory_format=layout_of(x))


def conv_input_gradient(dy: Tensor, weight: Tensor, upsample: bool = False) -> Tensor:
    """Gradient in ``x``: the convolution by the filters turned about, of which upsampling's adjoint sums each four."""
    dx = F.conv2d(dy, weight.transpose(0, 1).flip(2, 3), padding=weight.shape[2] // 2)
    dx = 4 * F.avg_pool2d(dx, 2) if upsample else dx
    return dx.contiguous(memory_format=layout_of(dy))


def conv_weight_gradient(dy: Tensor, x: Tensor, upsample: bool = False, side: int = 3) -> tuple[Tensor, Tensor]:
    """Gradients in ``weight``, of ``side`` by ``side``, and ``bias``."""
    weight = x.new_empty((dy.shape[1], x.shape[1], side, side))
    _, dweight, dbias = torch.ops.aten.convolution_backward(
        dy,
        _upsampled(x, upsample),
        weight,
        [len(weight)],
        [1, 1],
        [side // 2, side // 2],
        [1, 1],
        False,
        [0, 0],
        1,
        [False, True, True],
    )
    return dweight.contiguous(memory_format=torch.channels_last), dbias
