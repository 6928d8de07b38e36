"""The PTX instructions that can be run, and what each computes: C++ expressions of the operands ``a, b, c, d``.

Approximate instructions have no row: no manual defines their bits.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from tests.ptx.parser import SIZES, PtxError

FLOATS: Final = ("f16", "bf16", "f32", "f64")
WIDE: Final = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
_I: Final = "u16 s16 u32 s32 u64 s64"
_B: Final = "b16 b32 b64"
_F: Final = "f32 f64"
_ALL_F: Final = "f16 bf16 f32 f64"
_PAIRS: Final = "f16x2 bf16x2 f32x2"


class Row(NamedTuple):
    """``T`` is the instruction's type, ``W`` the integer of twice its width; ``a, b, c, d`` are the operands."""

    names: str
    types: str
    operands: str
    result: str
    expression: str


_ROWS: Final = [
    Row("add", _I, "T T", "T", "a + b"),
    Row("sub", _I, "T T", "T", "a - b"),
    Row("mul.lo", _I, "T T", "T", "a * b"),
    Row("mul.hi", _I, "T T", "T", "mul_hi<T>(a, b)"),
    Row("mul.wide", " ".join(WIDE), "T T", "W", "W(a) * W(b)"),
    Row("mad.lo", _I, "T T T", "T", "a * b + c"),
    Row("mad.hi", _I, "T T T", "T", "mul_hi<T>(a, b) + c"),
    Row("mad.wide", " ".join(WIDE), "T T W", "W", "W(a) * W(b) + c"),
    Row("div", _I, "T T", "T", "divide<T>(a, b)"),
    Row("rem", _I, "T T", "T", "remainder<T>(a, b)"),
    Row("min", _I, "T T", "T", "a < b ? a : b"),
    Row("max", _I, "T T", "T", "a > b ? a : b"),
    Row("abs", "s16 s32 s64", "T", "T", "a < 0 ? -a : a"),
    Row("neg", "s16 s32 s64", "T", "T", "-a"),
    Row("and", _B, "T T", "T", "a & b"),
    Row("or", _B, "T T", "T", "a | b"),
    Row("xor", _B, "T T", "T", "a ^ b"),
    Row("not", _B, "T", "T", "~a"),
    Row("xor", "pred", "T T", "T", "a != b"),
    Row("not", "pred", "T", "T", "!a"),
    Row("cnot", _B, "T", "T", "a == 0"),
    Row("shl", _B, "T u32", "T", "shift_left<T>(a, b)"),
    Row("shr", f"{_B} {_I}", "T u32", "T", "shift_right<T>(a, b)"),
    Row("shf.l.wrap", "b32", "T T u32", "T", "funnel_left(a, b, c & 31)"),
    Row("shf.l.clamp", "b32", "T T u32", "T", "funnel_left(a, b, c < 32 ? c : 32)"),
    Row("shf.r.wrap", "b32", "T T u32", "T", "funnel_right(a, b, c & 31)"),
    Row("shf.r.clamp", "b32", "T T u32", "T", "funnel_right(a, b, c < 32 ? c : 32)"),
    Row("popc", "b32 b64", "T", "u32", "__builtin_popcountll(a)"),
    Row("clz", "b32 b64", "T", "u32", "leading_zeros<T>(a)"),
    Row("brev", "b32 b64", "T", "T", "reverse_bits<T>(a)"),
    Row("bfe", "u32 s32 u64 s64", "T u32 u32", "T", "extract<T>(a, b, c)"),
    Row("bfi", "b32 b64", "T T u32 u32", "T", "insert<T>(a, b, c, d)"),
    Row("prmt", "b32", "T T T", "T", "permute(a, b, c)"),
    Row("lop3", "b32", "T T T T", "T", "logic3(a, b, c, d)"),
    Row("add add.rn", f"{_ALL_F} {_PAIRS}", "T T", "T", "a + b"),
    Row("sub sub.rn", f"{_ALL_F} {_PAIRS}", "T T", "T", "a - b"),
    Row("mul mul.rn", f"{_ALL_F} {_PAIRS}", "T T", "T", "a * b"),
    Row("fma.rn", f"{_F} f32x2", "T T T", "T", "std::fma(a, b, c)"),
    Row("fma.rn", "f16 bf16 f16x2 bf16x2", "T T T", "T", "fma16<T>(a, b, c)"),
    Row("div.rn", _F, "T T", "T", "a / b"),
    Row("rcp.rn", _F, "T", "T", "1 / a"),
    Row("sqrt.rn", _F, "T", "T", "std::sqrt(a)"),
    Row("min", _ALL_F, "T T", "T", "lesser<T>(a, b)"),
    Row("max", _ALL_F, "T T", "T", "greater<T>(a, b)"),
    Row("min.NaN", "f16 bf16 f32", "T T", "T", "lesser_nan<T>(a, b)"),
    Row("max.NaN", "f16 bf16 f32", "T T", "T", "greater_nan<T>(a, b)"),
    Row("min.xorsign.abs", "f32", "T T", "T", "xor_sign(lesser<T>, a, b)"),
    Row("max.xorsign.abs", "f32", "T T", "T", "xor_sign(greater<T>, a, b)"),
    Row("min.NaN.xorsign.abs", "f32", "T T", "T", "xor_sign(lesser_nan<T>, a, b)"),
    Row("max.NaN.xorsign.abs", "f32", "T T", "T", "xor_sign(greater_nan<T>, a, b)"),
    Row("abs", _ALL_F, "T", "T", "set_sign<T>(a, false)"),
    Row("neg", _ALL_F, "T", "T", "set_sign<T>(a, !negative<T>(a))"),
    Row("copysign", _F, "T T", "T", "set_sign<T>(b, negative<T>(a))"),
    Row("testp.finite", _F, "T", "pred", "std::isfinite(a)"),
    Row("testp.infinite", _F, "T", "pred", "std::isinf(a)"),
    Row("testp.number", _F, "T", "pred", "!std::isnan(a)"),
    Row("testp.notanumber", _F, "T", "pred", "std::isnan(a)"),
    Row("testp.normal", _F, "T", "pred", "std::isnormal(a)"),
    Row("testp.subnormal", _F, "T", "pred", "std::fpclassify(a) == FP_SUBNORMAL"),
    # An L2 policy is a hint: its value is passed on and never looked at.
    Row("createpolicy.fractional.L2::evict_first createpolicy.fractional.L2::evict_last", "b64", "f32", "T", "u64(a)"),
]
TABLE: Final = {
    f"{name}.{kind}": (row, kind) for row in _ROWS for name in row.names.split() for kind in row.types.split()
}

INTEGER_COMPARE: Final = {
    **{"eq": "a == b", "ne": "a != b", "lt": "a < b", "le": "a <= b", "gt": "a > b", "ge": "a >= b"},
    **{"lo": "a < b", "ls": "a <= b", "hi": "a > b", "hs": "a >= b"},
}
FLOAT_COMPARE: Final = {
    **{"eq": "a == b", "ne": "a < b || a > b", "lt": "a < b", "le": "a <= b", "gt": "a > b", "ge": "a >= b"},
    **{"equ": "!(a < b || a > b)", "neu": "!(a == b)", "ltu": "!(a >= b)", "leu": "!(a > b)"},
    **{"gtu": "!(a <= b)", "geu": "!(a < b)", "num": "a == a && b == b", "nan": "a != a || b != b"},
}
ATOMIC: Final = {
    **{"add": "a + b", "min": "a < b ? a : b", "max": "a > b ? a : b", "and": "a & b", "or": "a | b", "xor": "a ^ b"},
    **{"exch": "b", "cas": "a == b ? c : a", "inc": "a >= b ? 0 : a + 1", "dec": "a == 0 || a > b ? b : a - 1"},
}
ATOMIC_TYPES: Final = {
    **{"add": "u32 s32 u64 f32 f64", "min": "u32 s32 u64 s64", "max": "u32 s32 u64 s64"},
    **dict.fromkeys(("and", "or", "xor", "exch"), "b32 b64"),
    **{"cas": "b16 b32 b64", "inc": "u32", "dec": "u32"},
}
SPACES: Final = {
    **{
        "global": "kGlobal",
        "const": "kGlobal",
        "param": "kGlobal",
        "shared": "kSharedSpace",
        "shared::cta": "kSharedSpace",
    },
    **{"local": "kLocalSpace"},
}
# Where a line is kept, and for how long, changes no value.
HINTS: Final = {
    *("ca", "cg", "cs", "wb", "wt", "L1::evict_first", "L1::evict_last", "L1::evict_normal", "L1::evict_unchanged"),
    *("L1::no_allocate", "L2::64B", "L2::128B", "L2::256B", "L2::cache_hint", "L2::evict_first", "L2::evict_last"),
}
FENCES: Final = {
    "gl",
    "cta",
    "sys",
    *(f"{kind}.{scope}" for kind in ("acq_rel", "sc") for scope in ("cta", "gpu", "sys")),
}
ORDERINGS: Final = {"relaxed", "acquire", "release", "acq_rel", "cta", "gpu", "sys"}
COLLECTIVES: Final = {
    **{
        "shfl.sync.up.b32": "kUp",
        "shfl.sync.down.b32": "kDown",
        "shfl.sync.bfly.b32": "kBfly",
        "shfl.sync.idx.b32": "kIdx",
    },
    **{"vote.sync.all.pred": "kAll", "vote.sync.any.pred": "kAny", "vote.sync.uni.pred": "kUni"},
    "vote.sync.ballot.b32": "kBallot",
    **{f"redux.sync.add.{t}": "kAdd" for t in ("u32", "s32")},
    **{"redux.sync.min.u32": "kMin", "redux.sync.max.u32": "kMax", "redux.sync.min.s32": "kMinSigned"},
    **{"redux.sync.max.s32": "kMaxSigned", "redux.sync.and.b32": "kAnd", "redux.sync.or.b32": "kOr"},
    "redux.sync.xor.b32": "kXor",
}
SPECIAL: Final = {
    **{f"%tid.{x}": f"t.tid[{i}]" for i, x in enumerate("xyz")},
    **{
        f"%{n}.{x}": f"t.{f}()[{i}]"
        for n, f in (("ntid", "block"), ("ctaid", "ctaid"), ("nctaid", "grid"))
        for i, x in enumerate("xyz")
    },
    "%laneid": "t.index % 32",
    "%warpid": "t.index / 32",
}
INTEGER: Final = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$")


def conversion(mode: list[str], to: str, source: str) -> str:
    """cvt of the value ``a``: which roundings a pair of types takes, and the C++ for it."""
    if mode[1:] == ["ftz"] and source == "f32" and mode[0] in ("rni", "rzi", "rmi", "rpi"):  # Triton's floor and ceil
        return conversion(mode[:1], to, source).replace("(a", "(flush(a)", 1)
    from_float, to_float = source in FLOATS, to in FLOATS
    rounding = mode[0] if mode else ""
    whole = f"integral({'f32(a)' if source in ('f16', 'bf16') else 'a'}, {rounding[:2]})"
    if not from_float and not to_float and mode in ([], ["sat"]):
        return f"clamp_integer<{to}>(a)" if mode else f"{to}(a)"
    if from_float and not to_float and mode in (["rni"], ["rzi"], ["rmi"], ["rpi"]):
        return f"to_integer<{to}>(a, {rounding[:2]})"
    if not from_float and to in ("f16", "f32", "f64") and mode in (["rn"], ["rz"], ["rm"], ["rp"]):
        return f"narrow<{to}>(a, {rounding})"
    if from_float and to == source:
        if mode == ["sat"] and to == "f32":
            return "saturate(a)"
        if mode in (["rni"], ["rzi"], ["rmi"], ["rpi"]):
            return f"{to}({whole})"
    if from_float and to_float and not mode and SIZES[to] > SIZES[source]:
        return f"{to}({'f32(a)' if SIZES[source] == 2 else 'a'})"
    narrowing = {("f32", "f64"): "rn rz rm rp", ("f16", "f32"): "rn rz", ("bf16", "f32"): "rn rz"}
    if len(mode) == 1 and rounding in narrowing.get((to, source), "").split():
        return f"narrow<{to}>(a, {rounding})"
    raise PtxError(f"no conversion {'.'.join(['', *mode])} from {source} to {to}")


def memory(modifiers: list[str], count: int) -> tuple[str, int, list[str]]:
    """Space and vector length; what is neither nor a hint is handed back."""
    rest = [x for x in modifiers if x not in HINTS]
    space = next((SPACES[x] for x in rest if x in SPACES), "kGeneric")
    rest = [x for x in rest if x not in SPACES]
    vector = next((x for x in rest if re.fullmatch("v[248]", x)), "v1")
    if vector != f"v{count}":
        raise PtxError(f"{count} values; expected {vector}")
    return space, count, [x for x in rest if x != vector]
