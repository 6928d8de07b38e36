"""The noise contract: noise is a function, ``z = N(seed, stream, step, element)``, never a state.

    words w0..w3 = Philox4x32-10(key = (seed low, seed high), counter = (group, step, stream, 0))
    u  = float32(w) * 2^-32 + 2^-33                               in (0, 1]
    z0 = sqrt(-2 ln u0) cos(2 pi u1)      z1 = sqrt(-2 ln u0) sin(2 pi u1)
    z2 = sqrt(-2 ln u2) cos(2 pi u3)      z3 = sqrt(-2 ln u2) sin(2 pi u3)

Group ``g`` makes elements ``4g .. 4g+3`` of a sample, numbered in logical C, H, W order whatever the memory format.
All 32 bits of a word matter: 24 would cut the tail at 5.8 sigma. ``|z| <= 6.77``.

``ln``, ``sin`` and ``cos`` are the polynomials below in float32, every product and sum rounded once (no fused
multiply-add) and the square root correctly rounded, so every backend makes the same bits. Against float64 from the same
``u`` a normal is within 1e-6, and ``ln(u) <= 0`` for every float32 ``u`` in (0, 1].

This module is that contract in NumPy. ``reference.py`` says it in torch, ``csrc/include/bdk/normal.h`` in C++.

Sources: Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3") for Philox; Box and Muller 1958. The
coefficients are minimax fits, rounded to float32 one after another.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

STREAM_INITIAL: Final = 0
"""Initial noise of a sample, ``x_T``."""
STREAM_STEP: Final = 1
"""Noise of one sampler row; the step is the row's index in its table."""
STREAM_TRAINING: Final = 2
"""``eps`` of one training sample."""
STREAM_TIMESTEP: Final = 3
"""Training timestep and flip of one training sample."""
STREAM_POISON: Final = 4
"""The poison plan; the group is the image's index in its data set."""
STREAM_SHUFFLE: Final = 5
"""Sort keys of one pass through a data set; the step is the pass."""
STREAM_SAMPLE: Final = 6
"""Seeds derived from a run's seed, by `sample_seeds`."""

PHILOX_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL: Final = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS: Final = 10

SQRT_HALF_BITS: Final = 0x3F3504F3
LN2_HIGH: Final = 0.693115234375
"""ln 2 to 12 bits, so that its product with a binary exponent is exact."""
LN2_LOW: Final = 3.194618329871446e-05
LN: Final = (0.33333883, -0.25001565, 0.1996476, -0.16569725, 0.14885178, -0.14326333, 0.088718146)
"""``ln(1 + a) = a - a^2/2 + a^3 P(a)`` on [sqrt(1/2) - 1, sqrt(2) - 1]: relative error 3.4e-8."""
SIN: Final = (6.2831855, -41.341747, 81.60244, -75.74246)
"""``sin(2 pi f) = f P(f^2)`` on an eighth of a turn to either side: error 4.1e-9."""
COS: Final = (-19.739208, 64.939186, -85.43217, 58.963997)
"""``cos(2 pi f) = 1 + f^2 P(f^2)``, the same interval: error 5.1e-10."""

Words = NDArray[np.uint32]
Floats = NDArray[np.float32]


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10 as in Random123: four uint32 words from a four-word counter and a two-word key (arrays broadcast)."""
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in counter)
    k0, k1 = (np.asarray(k, np.uint64) for k in key)
    low, m0, m1 = np.uint64(0xFFFFFFFF), np.uint64(PHILOX_MULTIPLIERS[0]), np.uint64(PHILOX_MULTIPLIERS[1])
    for _ in range(PHILOX_ROUNDS):
        p0, p1 = m0 * c0, m1 * c2
        c0, c1, c2, c3 = (p1 >> np.uint64(32)) ^ c1 ^ k0, p1 & low, (p0 >> np.uint64(32)) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + np.uint64(PHILOX_WEYL[0])) & low, (k1 + np.uint64(PHILOX_WEYL[1])) & low
    return c0.astype(np.uint32), c1.astype(np.uint32), c2.astype(np.uint32), c3.astype(np.uint32)


def uniform(word: Words) -> Floats:
    """``u = float32(w) 2^-32 + 2^-33``, float32 in (0, 1]; the product is exact."""
    return word.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)


def _horner(x: Floats, coefficients: tuple[float, ...]) -> Floats:
    total = np.full_like(x, np.float32(coefficients[-1]))
    for c in reversed(coefficients[:-1]):
        total = total * x + np.float32(c)
    return total


def ln(u: Floats) -> Floats:
    """Natural logarithm of float32 ``u`` in (0, 1], never above zero.

    ``u = m 2^e`` with ``m`` in [sqrt(1/2), sqrt(2)), ``a = m - 1`` (exact):
    ``ln u = e ln2_high + (a + (a^3 P(a) + e ln2_low - a^2 / 2))``.
    """
    offset = u.view(np.int32) - np.int32(SQRT_HALF_BITS)
    e = (offset >> 23).astype(np.float32)
    a = ((offset & np.int32(0x7FFFFF)) + np.int32(SQRT_HALF_BITS)).view(np.float32) - np.float32(1)
    square = a * a
    tail = square * a * _horner(a, LN) + e * np.float32(LN2_LOW)
    tail = tail - square * np.float32(0.5)
    return e * np.float32(LN2_HIGH) + (a + tail)


def cos_sin(u: Floats) -> tuple[Floats, Floats]:
    """``cos(2 pi u)`` and ``sin(2 pi u)`` of float32 ``u`` in [0, 1], after an exact reduction to an eighth of a turn."""
    quadrant = ((u * np.float32(8)).astype(np.int32) + 1) >> 1
    f = u - quadrant.astype(np.float32) * np.float32(0.25)
    square = f * f
    s = f * _horner(square, SIN)
    c = square * _horner(square, COS) + np.float32(1)
    odd = (quadrant & 1).astype(bool)
    cos, sin = np.where(odd, s, c), np.where(odd, c, s)
    cos = np.where((quadrant + 1) & 2, -cos, cos)
    sin = np.where(quadrant & 2, -sin, sin)
    return cos, sin


def normals(words: tuple[Words, Words, Words, Words]) -> tuple[Floats, Floats, Floats, Floats]:
    """Four float32 normals from four words, by the Box-Muller map of the module's formula."""
    u0, u1, u2, u3 = (uniform(w) for w in words)
    out = []
    for radius_u, angle_u in ((u0, u1), (u2, u3)):
        radius = np.sqrt(ln(radius_u) * np.float32(-2))
        cos, sin = cos_sin(angle_u)
        out += [radius * cos, radius * sin]
    return out[0], out[1], out[2], out[3]


def _key(seeds: NDArray[np.int64]) -> tuple[Words, Words]:
    bits = np.asarray(seeds, np.int64).view(np.uint64)
    return (bits & np.uint64(0xFFFFFFFF)).astype(np.uint32), (bits >> np.uint64(32)).astype(np.uint32)


def normal(seeds: NDArray[np.int64], shape: tuple[int, ...], step: int = 0, stream: int = STREAM_INITIAL) -> Floats:
    """Standard normals of one (step, stream), the NumPy reference of `bdkernels.normal`.

    Args:
        seeds: int64 [N], one a sample.
        shape: Logical shape of one sample, usually (C, H, W).
        step: Row index in [0, 2^32).
        stream: One of the ``STREAM_`` constants.

    Returns:
        float32 [N, *shape].
    """
    elements = int(np.prod(shape))
    groups = np.arange((elements + 3) // 4, dtype=np.uint32)[None]
    k0, k1 = (k[:, None] for k in _key(seeds))
    zero = np.zeros_like(groups)
    words = philox((groups, zero + np.uint32(step), zero + np.uint32(stream), zero), (k0, k1))
    z = np.stack(normals(words), axis=-1).reshape(len(k0), -1)
    return z[:, :elements].reshape(len(k0), *shape)


def words(seed: int, index: NDArray[np.int64], stream: int, step: int = 0) -> tuple[Words, Words, Words, Words]:
    """The four Philox words of each group ``index`` (int64, any shape, in [0, 2^32)) under one 64-bit ``seed``."""
    k0, k1 = _key(np.array(seed, np.int64))
    groups = np.asarray(index).astype(np.uint32)
    zero = np.zeros_like(groups)
    return philox((groups, zero + np.uint32(step), zero + np.uint32(stream), zero), (k0, k1))


def seed_words(seeds: NDArray[np.int64], stream: int) -> tuple[Words, Words, Words, Words]:
    """The first four Philox words of each of ``seeds`` (int64) in one stream, at step 0."""
    k0, k1 = _key(seeds)
    zero = np.zeros_like(k0)
    return philox((zero, zero, zero + np.uint32(stream), zero), (k0, k1))


def sample_seeds(run_seed: int, index: NDArray[np.int64]) -> NDArray[np.int64]:
    """``mix(run seed, n)``: the int64 seed of the ``n``-th sample of a run, for each ``n`` of ``index`` (int64 >= 0)."""
    n = np.asarray(index, np.int64).view(np.uint64)
    k0, k1 = _key(np.array(run_seed, np.int64))
    low, high = (n & np.uint64(0xFFFFFFFF)).astype(np.uint32), (n >> np.uint64(32)).astype(np.uint32)
    zero = np.zeros_like(low)
    w0, w1, _, _ = philox((low, high, zero + np.uint32(STREAM_SAMPLE), zero), (k0, k1))
    return ((w1.astype(np.uint64) << np.uint64(32)) | w0).view(np.int64)
