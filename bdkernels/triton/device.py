"""What the kernels share, on the device: the noise contract, rows of a table, and where an element lies.

    words w0..w3 = Philox4x32-10(key = seed, counter = (group, step, stream, 0)),  u = float32(w) 2^-32 + 2^-33
    z0 = sqrt(-2 ln u0) cos(2 pi u1)      z1 = sqrt(-2 ln u0) sin(2 pi u1)      z2, z3 likewise from u2, u3

A program works on a tile of ``GROUPS`` groups of one sample, ``4 GROUPS`` elements in logical C, H, W order. Every launch
passes ``enable_fp_fusion=False``: products and sums are rounded one by one, as the contract in ``noise.py`` asks.
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

from .. import noise

SQRT_HALF_BITS: Final = tl.constexpr(noise.SQRT_HALF_BITS)
LN2_HIGH: Final = tl.constexpr(noise.LN2_HIGH)
LN2_LOW: Final = tl.constexpr(noise.LN2_LOW)
LN: Final = tl.constexpr(noise.LN)
SIN: Final = tl.constexpr(noise.SIN)
COS: Final = tl.constexpr(noise.COS)


@triton.jit
def horner(x: tl.tensor, coefficients: tl.constexpr, DEGREE: tl.constexpr) -> tl.tensor:
    """``c0 + x (c1 + x (...))``."""
    total = x * coefficients[DEGREE] + coefficients[DEGREE - 1]
    for i in tl.static_range(2, DEGREE + 1):
        total = total * x + coefficients[DEGREE - i]
    return total


@triton.jit
def uniform(word: tl.tensor) -> tl.tensor:
    return word.to(tl.float32) * 2.0**-32 + 2.0**-33


@triton.jit
def ln(u: tl.tensor) -> tl.tensor:
    """``u = m 2^e``, m in [sqrt(1/2), sqrt(2)), a = m - 1: ``e ln2_high + (a + (a^3 P(a) + e ln2_low - a^2 / 2))``."""
    offset = u.to(tl.int32, bitcast=True) - SQRT_HALF_BITS
    e = (offset >> 23).to(tl.float32)
    a = ((offset & 0x7FFFFF) + SQRT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0
    square = a * a
    tail = square * a * horner(a, LN, 6) + e * LN2_LOW
    tail = tail - square * 0.5
    return e * LN2_HIGH + (a + tail)


@triton.jit
def cos_sin(u: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """``cos`` and ``sin`` of ``2 pi u``: ``u = quadrant / 4 + f`` exactly, f an eighth of a turn to either side."""
    quadrant = ((u * 8.0).to(tl.int32) + 1) >> 1
    f = u - quadrant.to(tl.float32) * 0.25
    square = f * f
    s = f * horner(square, SIN, 3)
    c = square * horner(square, COS, 3) + 1.0
    odd = (quadrant & 1) != 0
    cos = tl.where(odd, s, c)
    sin = tl.where(odd, c, s)
    return tl.where(((quadrant + 1) & 2) != 0, -cos, cos), tl.where((quadrant & 2) != 0, -sin, sin)


@triton.jit
def box_muller(radius_word: tl.tensor, angle_word: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    radius = tl.sqrt_rn(ln(uniform(radius_word)) * -2.0)
    cos, sin = cos_sin(uniform(angle_word))
    return radius * cos, radius * sin


@triton.jit
def normals(seed: tl.tensor, step: tl.tensor, stream: tl.tensor, tile: tl.tensor, GROUPS: tl.constexpr) -> tl.tensor:
    """The normals of a tile in the order of its elements, float32 [4 GROUPS].

    The two words of each pair are joined before Box-Muller: four normals of one group then lie in one thread, also where
    16-bit tensors make it hold two groups, and no value crosses threads.
    """
    group = (tile * GROUPS + tl.arange(0, GROUPS)).to(tl.uint32)
    zero = tl.zeros_like(group)
    w0, w1, w2, w3 = tl.philox(seed, group, zero + step, zero + stream, zero)
    cos, sin = box_muller(tl.join(w0, w2), tl.join(w1, w3))
    return tl.join(cos, sin).reshape(4 * GROUPS)


@triton.jit
def place(elements: tl.tensor, tiles: tl.tensor, GROUPS: tl.constexpr, VECTOR: tl.constexpr) -> tuple[tl.tensor, ...]:
    """The sample of this program, its tile, the elements of the tile, and which of them the sample has.

    A thread takes ``VECTOR`` elements in a row, of every tensor alike: else bytes would be loaded sixteen at a time and
    float32 stored four at a time, and the values would cross threads through shared memory in between.
    """
    program = tl.program_id(0)
    tile = program % tiles
    e = tl.max_contiguous(tile * (4 * GROUPS) + tl.arange(0, 4 * GROUPS), VECTOR)
    return (program // tiles).to(tl.int64), tile, e, e < elements


@triton.jit
def where_all(condition: tl.tensor, e: tl.tensor, elements: tl.tensor) -> tl.tensor:
    """Which elements the sample has, none of them where the scalar ``condition`` is false."""
    return e < tl.where(condition, elements, 0)


@triton.jit
def offset(e: tl.tensor, channels: tl.tensor, pixels: tl.tensor, LAST: tl.constexpr) -> tl.tensor:
    """Where element ``e`` of a sample lies, contiguous or channels-last."""
    if LAST:
        channel = (e.to(tl.uint32) // pixels.to(tl.uint32)).to(tl.int32)
        return (e - channel * pixels) * channels + channel
    else:
        return e


@triton.jit
def load(pointer: tl.tensor, at: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """float32, zero where masked off."""
    return tl.load(pointer + at, mask=mask, other=0).to(tl.float32)


@triton.jit
def find_row(
    table: tl.tensor, arm: tl.tensor, row: tl.tensor, arms: tl.tensor, rows: tl.tensor, COLUMNS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """A row's address and whether the table has it. One that it has not is never read: its columns are NaN."""
    known = (arm >= 0) & (arm < arms) & (row >= 0) & (row < rows)
    return table + tl.where(known, (arm * rows + row) * COLUMNS, 0), known


@triton.jit
def find_rows(
    table: tl.tensor,
    arm: tl.tensor,
    row: tl.tensor,
    region: tl.tensor | None,
    arm_inside: tl.tensor | None,
    region_stride: tl.tensor,
    arms: tl.tensor,
    rows: tl.tensor,
    sample: tl.tensor,
    e: tl.tensor,
    valid: tl.tensor,
    COLUMNS: tl.constexpr,
) -> tuple[tl.tensor | None, ...]:
    """A sample's row outside the region, the one inside, and which elements are inside (None without a region)."""
    outside, known = find_row(table, tl.load(arm + sample), row, arms, rows, COLUMNS)
    if region is None:
        return outside, known, outside, known, None
    else:
        inside, inside_known = find_row(table, tl.load(arm_inside + sample), row, arms, rows, COLUMNS)
        mixed = tl.load(region + sample * region_stride + e, mask=valid, other=0) != 0
        return outside, known, inside, inside_known, mixed


@triton.jit
def column(row: tl.tuple, c: tl.constexpr) -> tl.tensor:
    """One column of the rows that `find_rows` found, a scalar or, with a region, a value an element."""
    outside, known, inside, inside_known, mixed = row
    value = tl.load(outside + c, mask=known, other=float("nan"))
    if mixed is not None:
        value = tl.where(mixed, tl.load(inside + c, mask=inside_known, other=float("nan")), value)
    return value


@triton.jit
def nonzero(row: tl.tuple, c: tl.constexpr) -> tl.tensor:
    """Whether a column is other than zero inside or outside."""
    outside, known, inside, inside_known, mixed = row
    found = tl.load(outside + c, mask=known, other=float("nan")) != 0
    if mixed is not None:
        found = found | (tl.load(inside + c, mask=inside_known, other=float("nan")) != 0)
    return found


@triton.jit
def image(
    x0: tl.tensor,
    flip: tl.tensor | None,
    sample: tl.tensor,
    e: tl.tensor,
    valid: tl.tensor,
    elements: tl.tensor,
    channels: tl.tensor,
    pixels: tl.tensor,
    width: tl.tensor,
    LAST: tl.constexpr,
) -> tl.tensor:
    """Pixels in [-1, 1]: a byte as ``(2u - 255) / 255``, mirrored left to right where ``flip``."""
    source = e
    if flip is not None:
        source = tl.where(
            tl.load(flip + sample) != 0, e + (width - 1 - 2 * (e.to(tl.uint32) % width.to(tl.uint32)).to(tl.int32)), e
        )
    x = load(x0 + sample * elements, offset(source, channels, pixels, LAST), valid)
    if x0.dtype.element_ty == tl.uint8:
        x = tl.div_rn(x * 2.0 - 255.0, 255.0)
    return x


@triton.jit
def poisoned_image(
    x: tl.tensor,
    trigger: tl.tensor,
    mask: tl.tensor | None,
    trigger_stride: tl.tensor,
    mask_stride: tl.tensor,
    sample: tl.tensor,
    e: tl.tensor,
    valid: tl.tensor,
) -> tl.tensor:
    """``R = M x + r``, or ``r`` without a mask."""
    r = load(trigger + sample * trigger_stride, e, valid)
    if mask is not None:
        r = load(mask + sample * mask_stride, e, valid) * x + r
    return r
