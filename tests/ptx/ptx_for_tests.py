"""Small PTX kernels for the tests, the words of every float format, and exact rounding to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from typing import Any, Final

import numpy as np

from tests.ptx.executor import Kernel

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
