"""Each family of PTX instructions, on edge values, against NumPy or against exact rational arithmetic, bit for bit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from typing import Any, Final

import numpy as np
import pytest

from tests.ptx.executor import Kernel
from tests.ptx.parser import PtxError
from tests.ptx.ptx_for_tests import (
    FORMATS,
    INTEGERS,
    compute,
    entry,
    exactly,
    floats,
    integers,
    pairs,
    rounded,
    to_float,
    words,
)


@pytest.mark.parametrize("kind", INTEGERS)
def test_integers(kind: str) -> None:
    a, b = pairs(integers(kind))
    width, dtype = 8 * a.dtype.itemsize, a.dtype
    wide = [int(x) * int(y) for x, y in zip(a, b, strict=True)]
    mask = (1 << width) - 1
    nonzero = np.where(b == 0, dtype.type(7), b)
    quotient = [abs(int(x)) // abs(int(y)) * (1 if (x < 0) == (y < 0) else -1) for x, y in zip(a, nonzero, strict=True)]
    rest = [int(x) - q * int(y) for x, y, q in zip(a, nonzero, quotient, strict=True)]
    expected = [
        [x + y for x, y in zip(a.tolist(), b.tolist(), strict=True)],
        [x - y for x, y in zip(a.tolist(), b.tolist(), strict=True)],
        wide,
        [w >> width for w in wide],
        [w + int(x) for w, x in zip(wide, a, strict=True)],
        np.minimum(a, b).tolist(),
        np.maximum(a, b).tolist(),
    ]
    names = ("add", "sub", "mul.lo", "mul.hi", "mad.lo", "min", "max")
    texts = [f"{n}.{kind} %d, %a, %b" + (", %a" if n == "mad.lo" else "") for n in names]
    got = compute(texts, width, a, b)
    for name, row, values in zip(names, got, expected, strict=True):
        assert row.tolist() == [v & mask for v in values], name
    got = compute([f"div.{kind} %d, %a, %b", f"rem.{kind} %d, %a, %b"], width, a, nonzero)
    assert got.tolist() == [[v & mask for v in values] for values in (quotient, rest)]
    if width < 64:
        got = compute([f"mul.wide.{kind} %d, %a, %b"], 2 * width, a, b)
        assert got[0].tolist() == [w & (1 << 2 * width) - 1 for w in wide]
    if kind[0] == "s":
        got = compute([f"abs.{kind} %d, %a", f"neg.{kind} %d, %a"], width, a)
        assert got.tolist() == [[f(int(x)) & mask for x in a] for f in (abs, lambda x: -x)]


@pytest.mark.parametrize("width", [16, 32, 64])
def test_bits_and_shifts(width: int) -> None:
    a, b = pairs(integers(f"u{width}"))
    by = np.tile(np.array([0, 1, 5, width - 1, width, width + 1, 2**32 - 1], dtype=np.uint32), a.size)[: a.size]
    got = compute([f"{n}.b{width} %d, %a, %b" for n in ("and", "or", "xor")], width, a, b)
    assert (got == np.stack([a & b, a | b, a ^ b])).all()
    got = compute([f"not.b{width} %d, %a", f"cnot.b{width} %d, %a"], width, a)
    assert (got == np.stack([~a, (a == 0).astype(a.dtype)])).all()
    got = compute([f"shl.b{width} %d, %a, %b", f"shr.u{width} %d, %a, %b", f"shr.s{width} %d, %a, %b"], width, a, by)
    mask = (1 << width) - 1
    signed = [int(x) - (1 << width if int(x) >> width - 1 else 0) for x in a]
    s = [min(int(y), width) for y in by]
    assert got[0].tolist() == [int(x) << y & mask for x, y in zip(a, s, strict=True)]
    assert got[1].tolist() == [int(x) >> y for x, y in zip(a, s, strict=True)]
    assert got[2].tolist() == [x >> y & mask for x, y in zip(signed, s, strict=True)]
    if width == 16:
        return
    got = compute([f"popc.b{width} %d, %a", f"clz.b{width} %d, %a"], 32, a)
    assert got.tolist() == [[int(x).bit_count() for x in a], [width - int(x).bit_length() for x in a]]
    got = compute(
        [f"brev.b{width} %d, %a", f"bfe.u{width} %d, %a, 3, 7", f"bfe.s{width} %d, %a, {width - 4}, 9"], width, a
    )
    assert got[0].tolist() == [int(f"{int(x):0{width}b}"[::-1], 2) for x in a]
    assert got[1].tolist() == [int(x) >> 3 & 127 for x in a]
    assert got[2].tolist() == [x >> width - 4 & mask for x in signed]
    got = compute([f"bfi.b{width} %d, %a, %b, 5, 6", f"bfe.u{width} %d, %a, 2, 0"], width, a, b)
    assert got[0].tolist() == [(int(y) & ~(63 << 5)) | (int(x) & 63) << 5 for x, y in zip(a, b, strict=True)]
    assert not got[1].any()


def test_three_operand_words() -> None:
    a, b = pairs(integers("u32"))
    c = np.roll(a, 7)
    a64, b64, c64 = (x.astype(np.uint64) for x in (a, b, c))
    both, wrap, clamp = b64 << np.uint64(32) | a64, c64 & np.uint64(31), np.minimum(c64, np.uint64(32))
    texts = [f"shf.{way}.{kind}.b32 %d, %a, %b, %c" for way in "lr" for kind in ("wrap", "clamp")]
    texts += ["lop3.b32 %d, %a, %b, %c, 0x96", "lop3.b32 %d, %a, %b, %c, 0xca", "mad.hi.u32 %d, %a, %b, %c"]
    got = compute([*texts, "prmt.b32 %d, %a, %b, 0x5410", "prmt.b32 %d, %a, %b, 0x9a73"], 32, a, b, c)
    low = np.uint64(2**32 - 1)
    left = [((both << n) >> np.uint64(32)) & low for n in (wrap,)] + [
        np.where(c64 >= 32, a64, (both << wrap) >> np.uint64(32)) & low
    ]
    right = [both >> wrap & low, np.where(c64 >= 32, b64, both >> clamp) & low]
    assert (got[:4] == np.stack([*left, *right])).all()
    assert (
        got[4:7] == np.stack([a ^ b ^ c, (a & b) | (~a & c), (a64 * b64 >> np.uint64(32)).astype(np.uint32) + c])
    ).all()
    assert (got[7] == (a & 0xFFFF | (b & 0xFFFF) << 16)).all()
    source = both.view(np.uint8).reshape(-1, 8)
    sign = np.where(source >> 7, np.uint8(255), np.uint8(0))
    assert (
        got[8].view(np.uint8).reshape(-1, 4) == np.stack([source[:, 3], source[:, 7], sign[:, 2], sign[:, 1]], 1)
    ).all()


@pytest.mark.parametrize("kind", FORMATS)
def test_float_arithmetic(kind: str) -> None:
    width = FORMATS[kind][3]
    a, b = pairs(floats(kind))
    with np.errstate(all="ignore"):
        expected = [
            exactly(lambda x, y: x + y, kind, a, b, special=lambda x, y: x + y),
            exactly(lambda x, y: x - y, kind, a, b, special=lambda x, y: x - y),
            exactly(lambda x, y: x * y, kind, a, b, special=lambda x, y: x * y),
        ]
        got = compute([f"{n}.{kind} %d, %a, %b" for n in ("add", "sub", "mul")], width, words(a, kind), words(b, kind))
        assert (got == np.stack(expected)).all()
        c = [x * y * -1 if math.isfinite(x * y) and i % 2 else y for i, (x, y) in enumerate(zip(a, b, strict=True))]
        c = [to_float(rounded(Fraction(v), kind, zero=v), kind) if math.isfinite(v) else v for v in c]
        expected = exactly(lambda x, y, z: x * y + z, kind, a, b, c, special=lambda x, y, z: x * y + z)
        fma = compute([f"fma.rn.{kind} %d, %a, %b, %c"], width, words(a, kind), words(b, kind), words(c, kind))
        assert (fma[0] == expected).all()
        if width == 16:
            return
        expected = exactly(lambda x, y: x / y, kind, a, b, special=np.divide)
        got = compute([f"div.rn.{kind} %d, %a, %b"], width, words(a, kind), words(b, kind))
        assert (got[0] == expected).all()
        dtype = np.dtype(f"f{width // 8}")
        x = words(a, kind).view(dtype)
        got = compute([f"sqrt.rn.{kind} %d, %a", f"rcp.rn.{kind} %d, %a"], width, words(a, kind))
        for row, values in zip(got, (np.sqrt(x), 1 / x), strict=True):
            assert (row == words(values.tolist(), kind)).all()


def test_unfused_and_fused_differ_where_they_must() -> None:
    """2^-24 is lost by a multiply and an add, kept by fma."""
    a = np.array([1 + 2.0**-12], dtype=np.float32)
    got = compute(["mul.f32 %f0, %a, %a; add.f32 %d, %f0, 0fBF800000", "fma.rn.f32 %d, %a, %a, 0fBF800000"], 32, a)
    assert got.view(np.float32).ravel().tolist() == [2.0**-11, 2.0**-11 + 2.0**-24]


def test_16_bit_fma_rounds_once() -> None:
    """A product half way between two bf16 and an addend far below: rounding a double sum would forget the addend."""
    a, c = words([1 + 2.0**-4, 1 + 2.0**-4], "bf16"), words([2.0**-100, -(2.0**-100)], "bf16")
    got = compute(["fma.rn.bf16 %d, %a, %a, %b"], 16, a, c)[0]
    exact = [rounded(Fraction(1.0625) ** 2 + s * Fraction(2) ** -100, "bf16") for s in (1, -1)]
    assert got.tolist() == exact
    assert exact[0] == exact[1] + 1


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2", "f32x2"])
def test_pairs_of_floats(kind: str) -> None:
    single, width = kind[:-2], 2 * FORMATS[kind[:-2]][3]
    a, b = pairs(floats(single))
    x, y = words(a, single), words(b, single)
    pair = [np.stack([v, np.roll(v, 3)], 1).view(f"u{width // 8}").ravel() for v in (x, y)]
    got = compute(
        [f"{n}.{kind} %d, %a, %b" for n in ("add", "sub", "mul")] + [f"fma.rn.{kind} %d, %a, %b, %a"], width, *pair
    )
    one = compute(
        [f"{n}.{single} %d, %a, %b" for n in ("add", "sub", "mul")] + [f"fma.rn.{single} %d, %a, %b, %a"],
        width // 2,
        x,
        y,
    )
    halves = got.view(f"u{width // 16}").reshape(4, -1, 2)
    assert (halves[:, :, 0] == one).all()
    assert (halves[:, :, 1] == np.roll(one, 3, axis=1)).all()


@pytest.mark.parametrize("kind", FORMATS)
def test_float_min_max_and_signs(kind: str) -> None:
    width = FORMATS[kind][3]
    a, b = pairs(floats(kind, count=0))
    key = [(lambda v: (v, math.copysign(1, v)))(v) for v in [*a, *b]]
    x, y = key[: len(a)], key[len(a) :]
    least = [p[0] if q[0] != q[0] else q[0] if p[0] != p[0] else min(p, q)[0] for p, q in zip(x, y, strict=True)]
    most = [p[0] if q[0] != q[0] else q[0] if p[0] != p[0] else max(p, q)[0] for p, q in zip(x, y, strict=True)]
    got = compute([f"min.{kind} %d, %a, %b", f"max.{kind} %d, %a, %b"], width, words(a, kind), words(b, kind))
    assert (got == np.stack([words(least, kind), words(most, kind)])).all()
    if kind != "f64":
        nan = np.isnan(a) | np.isnan(b)
        spread = [np.where(nan, math.nan, v).tolist() for v in (least, most)]
        got = compute(
            [f"min.NaN.{kind} %d, %a, %b", f"max.NaN.{kind} %d, %a, %b"], width, words(a, kind), words(b, kind)
        )
        assert (got == np.stack([words(v, kind) for v in spread])).all()
    if kind == "f32":
        names = ("min", "max", "min.NaN", "max.NaN")
        sides = words(a, kind), words(b, kind)
        got = compute([f"{n}.xorsign.abs.f32 %d, %a, %b" for n in names], width, *sides)
        magnitudes = compute([f"{n}.f32 %d, %a, %b" for n in names], width, *(w & 0x7FFFFFFF for w in sides))
        sign = np.where(magnitudes == 0x7FFFFFFF, 0, (sides[0] ^ sides[1]) & 0x80000000)
        assert (got == magnitudes | sign).all()
    got = compute([f"abs.{kind} %d, %a", f"neg.{kind} %d, %a"], width, words(a, kind))
    expected = [words([abs(v) for v in a], kind), words([v if math.isnan(v) else -v for v in a], kind)]
    assert (got == np.stack(expected)).all()
    if width > 16:
        got = compute([f"copysign.{kind} %d, %a, %b"], width, words(a, kind), words(b, kind))
        assert (
            got[0] == words([math.nan if q != q else math.copysign(q, p) for p, q in zip(a, b, strict=True)], kind)
        ).all()


COMPARE: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
CHOOSE: Final = "setp.{} %p0, %a, %b; selp.b32 %d, 1, 0, %p0"


@pytest.mark.parametrize("kind", ["u16", "s32", "u64", "s64"])
def test_integer_comparisons(kind: str) -> None:
    a, b = pairs(integers(kind))
    names = {
        **COMPARE,
        **({"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal} if kind[0] == "u" else {}),
    }
    got = compute([CHOOSE.format(f"{n}.{kind}") for n in names], 32, a, b)
    assert (got == np.stack([f(a, b) for f in names.values()])).all()


@pytest.mark.parametrize("kind", ["bf16", "f32", "f64"])
def test_float_comparisons(kind: str) -> None:
    """Plain comparisons are false for NaN, ``ne`` too; those with ``u`` are true."""
    a, b = (np.array(v) for v in pairs(floats(kind)))
    nan = np.isnan(a) | np.isnan(b)
    expected = {n: f(a, b) & ~nan for n, f in COMPARE.items()}
    expected |= {n + "u": f(a, b) | nan for n, f in COMPARE.items()} | {"num": ~nan, "nan": nan}
    got = compute(
        [CHOOSE.format(f"{n}.{kind}") for n in expected], 32, words(a.tolist(), kind), words(b.tolist(), kind)
    )
    assert (got == np.stack(list(expected.values()))).all()
    if kind == "f32":
        tests = {"finite": np.isfinite(a), "infinite": np.isinf(a), "number": ~np.isnan(a), "notanumber": np.isnan(a)}
        tests["subnormal"] = (np.abs(a) < 2.0**-126) & (a != 0)
        tests["normal"] = np.isfinite(a) & (np.abs(a) >= 2.0**-126)
        got = compute([f"testp.{n}.f32 %p0, %a; selp.b32 %d, 1, 0, %p0" for n in tests], 32, words(a.tolist(), kind))
        assert (got == np.stack(list(tests.values()))).all()


def test_predicates() -> None:
    a, b, c = (np.array(v, dtype=np.uint32) for v in zip(*product((0, 1), repeat=3), strict=True))
    make = "setp.ne.u32 %p1, %c, 0; "
    add = "selp.b32 %r0, 1, 0, %p0; selp.b32 %r1, 2, 0, %q; or.b32 %d, %r0, %r1"
    texts = [f"{make}setp.lt.{op}.u32 %p0|%q, %a, %b, {n}%p1; {add}" for op in ("and", "or", "xor") for n in ("", "!")]
    expected = []
    for f in (np.logical_and, np.logical_or, np.logical_xor):
        expected += [f(a < b, d) + 2 * f(a >= b, d) for d in (c == 1, c == 0)]
    assert (compute(texts, 32, a, b, c) == np.stack(expected)).all()
    make = "setp.ne.u32 %p1, %a, 0; setp.ne.u32 %p2, %b, 0; "
    texts = [f"{make}{op}.pred %p3, %p1, %p2; selp.b32 %d, 1, 0, %p3" for op in ("and", "or", "xor")]
    texts += [make + "not.pred %p3, %p1; mov.u32 %d, 0; @%p3 mov.u32 %d, 1; @!%p2 add.u32 %d, %d, 2"]
    texts += ["mov.pred %p3, 1; selp.b32 %d, %a, %b, %p3"]
    assert (compute(texts, 32, a, b) == np.stack([a & b, a | b, a ^ b, (1 - a) + 2 * (1 - b), a])).all()


def test_mov_packs_and_selects() -> None:
    a, b = (v.astype(np.uint32) for v in pairs(integers("u32")))
    texts = [
        "mov.b32 {%h0, %h1}, %a; mov.b32 %d, {%h1, %h0}",
        "mov.b64 %w0, {%a, %b}; mov.b64 {_, %d}, %w0",
        "mov.b32 %d, 0f40490FDB",
        "mov.u32 %d, -2",
        "mov.b64 %w0, 0d3FF0000000000000; mov.b64 {%r0, %d}, %w0",
        "{ .reg .b32 %a, %z<2>; mov.u32 %a, 5; mov.u32 %z1, %a; { .reg .b32 %z<2>; mov.u32 %z1, 9; } mov.u32 %d, %z1; }",
        "setp.lt.u32 %p0, %a, %b; selp.f32 %d, %a, %b, %p0",
    ]
    one = np.ones_like(a)
    expected = [
        a << 16 | a >> 16,
        b,
        one * 0x40490FDB,
        one * np.uint32(2**32 - 2),
        one * 0x3FF00000,
        one * 5,
        np.minimum(a, b),
    ]
    assert (compute(texts, 32, a, b) == np.stack(expected)).all()


@pytest.mark.parametrize(
    ("instruction", "reason"),
    [
        ("frob.u32 %r0, %r1", "unknown instruction"),
        ("add.sat.s32 %r0, %r1, %r2", "unknown instruction"),
        ("add.ftz.f32 %f0, %f1, %f2", "unknown instruction"),
        ("ex2.approx.f32 %f0, %f1", "approximate"),
        ("div.full.f32 %f0, %f1, %f2", "approximate"),
        ("cvt.rna.f32.f64 %f0, %x1", "no conversion"),
        ("cvt.f32.f64 %f0, %x1", "no conversion"),
        ("ld.global.volatile.u32 %r0, [%at0]", "unknown modifiers"),
        ("st.global.v2.u32 [%at0], %r0", "expected v2|expected v1"),
        ("atom.global.add.noftz.f16 %h0, [%at0], %h1", "no atomic"),
        ("add.u64 %r0, %w0, %w1", "holds b32"),
        ("mov.u32 %r0, %clock", "not known"),
        ("bar.arrive 0, 64", "unknown barrier"),
        ("setp.ltu.s32 %p0, %r0, %r1", "unknown comparison"),
        ("bra NOWHERE", "no label"),
    ],
)
def test_what_is_not_known_is_refused(instruction: str, reason: str) -> None:
    with pytest.raises(PtxError, match=reason) as caught:
        Kernel(entry(instruction + ";"), "test")
    assert re.search(r"line \d+: `" + re.escape(instruction), str(caught.value))
