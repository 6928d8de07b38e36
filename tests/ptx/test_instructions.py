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

HEAD: Final = ".version 8.7\n.target sm_90\n.address_size 64\n"
# Precision in bits, smallest and largest exponent of a normal number, and the width.
FORMATS: Final = {
    "f16": (11, -14, 15, 16),
    "bf16": (8, -126, 127, 16),
    "f32": (24, -126, 127, 32),
    "f64": (53, -1022, 1023, 64),
}
INTEGERS: Final = ("u16", "s16", "u32", "s32", "u64", "s64")
ROUND: Final[dict[str, Callable[[Fraction], int]]] = {"rn": round, "rz": math.trunc, "rm": math.floor, "rp": math.ceil}


def entry(body: str, parameters: int = 1, registers: str = "", declarations: str = "", name: str = "test") -> str:
    """PTX of one entry with 64-bit parameters ``p0, p1, ...``, loaded into ``%g0, %g1, ...``, and ``%i = tid.x``."""
    declared = ", ".join(f".param .u64 p{i}" for i in range(parameters))
    loads = "".join(f"ld.param.u64 %g{i}, [p{i}];\n" for i in range(parameters))
    common = (
        f".reg .b64 %g<{parameters + 1}>, %at<9>, %w<9>; .reg .b32 %i, %r<20>; .reg .b16 %h<9>; .reg .pred %p<9>, %q;"
    )
    common += ".reg .f32 %f<9>; .reg .f64 %x<9>;"
    return (
        f"{HEAD}{declarations}\n.visible .entry {name}({declared})\n{{\n{common}\n{registers}\n{loads}mov.u32 %i, %tid.x;\n"
        f"{body}\nret;\n}}\n"
    )


def compute(instructions: list[str], result: int, *operands: np.ndarray) -> np.ndarray:
    """Row i: what instruction i leaves in ``%d`` (of ``result`` bits) for every element of ``%a``, ``%b``, ``%c``."""
    count = operands[0].size
    registers, body = f".reg .b{max(result, 16)} %d;", ""
    for i, (name, operand) in enumerate(zip("abc", operands, strict=False)):
        bits = 8 * operand.itemsize
        registers += f".reg .b{max(bits, 16)} %{name};"
        body += f"mad.wide.u32 %at0, %i, {operand.itemsize}, %g{i};\nld.global.b{bits} %{name}, [%at0];\n"
    for row, instruction in enumerate(instructions):
        body += f"{instruction};\nmad.wide.u32 %at0, %i, {result // 8}, %g{len(operands)};\n"
        body += f"st.global.b{result} [%at0+{row * count * result // 8}], %d;\n"
    out = np.full((len(instructions), count), 0x55, dtype=f"u{result // 8}")
    Kernel(entry(body, len(operands) + 1, registers), "test")(1, count, *operands, out, readonly=operands)
    return out


def bits(value: float, kind: str) -> int:
    """The word of a float that the format ``kind`` holds exactly; NaN is the canonical one."""
    precision, low, _, width = FORMATS[kind]
    sign = int(math.copysign(1, value) < 0) << width - 1
    if math.isnan(value):
        return (1 << width - 1) - 1
    top = ((1 << width - precision) - 1) << precision - 1
    if math.isinf(value):
        return sign | top
    exponent = max(math.frexp(value)[1] - 1, low) if value else low
    steps = int(Fraction(abs(value)) / Fraction(2) ** (exponent - precision + 1))
    return sign | (steps + ((exponent - low) << precision - 1))


def to_float(word: int, kind: str) -> float:
    precision, low, _, width = FORMATS[kind]
    sign = -1.0 if word >> width - 1 else 1.0
    exponent, fraction = word >> precision - 1 & (1 << width - precision) - 1, word & (1 << precision - 1) - 1
    if exponent == (1 << width - precision) - 1:
        return math.nan if fraction else sign * math.inf
    steps = fraction + ((1 << precision - 1) if exponent else 0)
    return sign * float(Fraction(steps) * Fraction(2) ** (max(exponent, 1) - 1 + low - precision + 1))


def rounded(exact: Fraction, kind: str, mode: str = "rn", zero: float = 0.0) -> int:
    """The word of the format's number that ``exact`` rounds to; ``zero`` has the sign of an exact zero."""
    precision, low, high, _ = FORMATS[kind]
    if not exact:
        return bits(zero, kind)
    exponent = abs(exact.numerator).bit_length() - exact.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > abs(exact)
    step = Fraction(2) ** (max(exponent, low) - precision + 1)
    value = ROUND[mode](exact / step) * step
    largest = (2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** high
    if abs(value) > largest:
        goes_out = mode == "rn" or mode == ("rp" if value > 0 else "rm")
        return bits((1 if value > 0 else -1) * (math.inf if goes_out else float(largest)), kind)
    return bits(math.copysign(float(value), 1 if exact > 0 else -1), kind)


def words(values: list[float], kind: str) -> np.ndarray:
    return np.array([bits(v, kind) for v in values], dtype=f"u{FORMATS[kind][3] // 8}")


def floats(kind: str, seed: int = 0, count: int = 12) -> list[float]:
    """Zeros, infinities, NaN, the smallest and largest numbers, and random words."""
    precision, low, high, width = FORMATS[kind]
    tiny, huge = 2.0 ** (low - precision + 1), (2 - 2.0 ** (1 - precision)) * 2.0**high
    edges = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, tiny, -tiny, 2.0**low, huge, -huge]
    some = np.random.default_rng(seed).integers(0, 2**width, count, dtype=np.uint64)
    return edges + [v for v in (to_float(int(w), kind) for w in some) if not math.isnan(v)]


def integers(kind: str) -> np.ndarray:
    dtype = np.dtype(kind.replace("s", "i")[0] + str(int(kind[1:]) // 8))
    info, random = np.iinfo(dtype), np.random.default_rng(1)
    edges = [0, 1, 2, 3, 31, info.max, info.max - 1, info.min, info.min + 1, info.max // 3]
    return np.array([*edges, *random.integers(info.min, info.max, 10, dtype=dtype)], dtype=dtype)


def pairs(values: Any) -> tuple[Any, Any]:
    a, b = zip(*product(values, values), strict=True)
    return (np.array(a), np.array(b)) if isinstance(values, np.ndarray) else (list(a), list(b))


def exactly(
    operation: Callable[..., Fraction], kind: str, *operands: list[float], special: Callable[..., float]
) -> np.ndarray:
    """``operation`` in exact arithmetic, rounded once; ``special`` (in double) where an operand or a result is not finite."""
    result = []
    for values in zip(*operands, strict=True):
        plain = special(*(np.float64(v) for v in values))
        try:
            exact = operation(*(Fraction(v) for v in values))
        except (OverflowError, ValueError, ZeroDivisionError):
            result.append(bits(float(plain), kind))
        else:
            result.append(rounded(exact, kind, zero=float(plain)))
    return np.array(result, dtype=f"u{FORMATS[kind][3] // 8}")


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


@pytest.mark.parametrize("source", ["f16", "f32", "f64"])
def test_float_to_integer(source: str) -> None:
    """Out of range: the nearest bound. NaN: 0, or the top bit where a side has 64 bits."""
    values = [*floats(source), 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.75, 127.5, 255.5, -128.5, 1000.5]
    values += [] if source == "f16" else [2.0**31, -(2.0**31), 2.0**32, 2.0**63, -(2.0**63), 2.0**64, 2.0**24 + 2]
    for width in (8, 32, 64):
        expected, texts = [], []
        for sign, mode in product("us", ROUND):
            low, high = (0, (1 << width) - 1) if sign == "u" else (-(1 << width - 1), (1 << width - 1) - 1)
            not_a_number = 1 << width - 1 if 64 in (width, FORMATS[source][3]) else 0
            limits = {math.inf: high, -math.inf: low}
            row = [
                not_a_number
                if math.isnan(v)
                else limits[v]
                if math.isinf(v)
                else min(max(ROUND[mode](Fraction(v)), low), high)
                for v in values
            ]
            expected.append([v & (1 << width) - 1 for v in row])
            texts.append(f"cvt.{mode}i.{sign}{width}.{source} %d, %a")
        assert compute(texts, width, words(values, source)).tolist() == expected


@pytest.mark.parametrize("source", ["u8", "s16", "u32", "s32", "u64", "s64"])
def test_integer_to_float_and_integer(source: str) -> None:
    a = integers(source)
    for kind in ("f16", "f32", "f64"):
        got = compute([f"cvt.{mode}.{kind}.{source} %d, %a" for mode in ROUND], FORMATS[kind][3], a)
        assert got.tolist() == [[rounded(Fraction(int(v)), kind, mode) for v in a] for mode in ROUND]
    for target in ("s8", "u16", "s32", "u64"):
        width = int(target[1:])
        low, high = (0, (1 << width) - 1) if target[0] == "u" else (-(1 << width - 1), (1 << width - 1) - 1)
        got = compute([f"cvt.{target}.{source} %d, %a", f"cvt.sat.{target}.{source} %d, %a"], width, a)
        assert got[0].tolist() == [int(v) & (1 << width) - 1 for v in a]
        assert got[1].tolist() == [min(max(int(v), low), high) & (1 << width) - 1 for v in a]


@pytest.mark.parametrize(
    ("target", "source", "modes"), [("f32", "f64", "rn rz rm rp"), ("f16", "f32", "rn rz"), ("bf16", "f32", "rn rz")]
)
def test_float_to_narrower_float(target: str, source: str, modes: str) -> None:
    precision, low = FORMATS[target][:2]
    values = floats(source, count=40) + [to_float(w, target) for w in (1, 2, 3)]
    values += [1 + 2.0**-precision, 1 + 3 * 2.0**-precision, -1 - 2.0**-precision, 2.0 ** (low - precision)]
    values += [s * v for s in (1, -1) for v in (65504.0, 65519.0, 65520.0, 1.1)]
    got = compute(
        [f"cvt.{mode}.{target}.{source} %d, %a" for mode in modes.split()], FORMATS[target][3], words(values, source)
    )
    for mode, row in zip(modes.split(), got, strict=True):
        expected = [rounded(Fraction(v), target, mode, v) if math.isfinite(v) else bits(v, target) for v in values]
        assert row.tolist() == expected
    if FORMATS[target][3] == 16:
        x, y = words(values, source), words(values[::-1], source)
        packed = compute([f"cvt.{mode}.{target}x2.f32 %d, %a, %b" for mode in modes.split()], 32, x, y)
        assert (packed == got.astype(np.uint32) << 16 | got[:, ::-1]).all()


def test_float_to_wider_float_and_whole_floats() -> None:
    for target, source in (("f32", "f16"), ("f32", "bf16"), ("f64", "f32")):
        values = floats(source, count=40)
        got = compute([f"cvt.{target}.{source} %d, %a"], FORMATS[target][3], words(values, source))
        assert got[0].tolist() == words(values, target).tolist()
    values = [*floats("f32"), 0.5, 1.5, 2.5, -0.5, -1.5, 0.75, 2.0**23 - 0.5, -0.25]
    x = np.array(values, dtype=np.float32)
    got = compute(
        [f"cvt.{mode}i.f32.f32 %d, %a" for mode in ROUND] + ["cvt.sat.f32.f32 %d, %a"], 32, words(values, "f32")
    )
    expected = [np.rint(x), np.trunc(x), np.floor(x), np.ceil(x), np.where(np.isnan(x) | (x <= 0), 0, np.minimum(x, 1))]
    assert got.tolist() == [words(v.tolist(), "f32").tolist() for v in expected]


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
