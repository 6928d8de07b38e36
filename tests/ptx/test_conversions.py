"""Every cvt between integers and floats, in every rounding, against exact rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from tests.ptx.ptx_for_tests import FORMATS, ROUND, bits, compute, floats, integers, rounded, to_float, words


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
    got = compute(["cvt.rpi.ftz.f32.f32 %d, %a", "cvt.rmi.ftz.s32.f32 %d, %a"], 32, words([1e-40, -1e-40, 1.5], "f32"))
    assert got.tolist() == [words([0.0, -0.0, 2.0], "f32").tolist(), [0, 0, 1]]
