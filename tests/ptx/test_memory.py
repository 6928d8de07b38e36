"""Loads and stores of every width and space, atomics, warp instructions, barriers and jumps."""

from __future__ import annotations

import struct
from typing import Final

import numpy as np
import pytest
import torch

from tests.ptx.executor import ORDERS, Kernel
from tests.ptx.ptx_for_tests import HEAD, entry


@pytest.mark.parametrize(
    ("vector", "kind"), [("", "b8"), ("", "b16"), (".v2", "b16"), (".v4", "b32"), (".v2", "b64"), (".v8", "b32")]
)
def test_copies_of_every_width(vector: str, kind: str) -> None:
    count, size = int(vector[2:] or 1), int(kind[1:]) // 8
    names = ", ".join(f"%v{i}" for i in range(count))
    group = f"{{{names}}}" if vector else names
    body = f"""
        mad.wide.u32 %at0, %i, {count * size}, %g0;
        ld.global.nc.L1::evict_first{vector}.{kind} {group}, [%at0];
        mad.wide.u32 %at1, %i, {count * size}, %g1;
        st.global.L1::no_allocate{vector}.{kind} [%at1], {group};"""
    registers = f".reg .b{max(8 * size, 16)} %v<{count}>;"
    x = torch.randint(0, 256, (32 * count * size,), dtype=torch.uint8)
    y = torch.zeros_like(x)
    Kernel(entry(body, 2, registers), "test")(1, 32, x, y, readonly=(x,))
    assert torch.equal(x, y)


def test_hints_and_fences_change_nothing() -> None:
    body = """
        createpolicy.fractional.L2::evict_last.b64 %w0, 1.0;
        ld.global.L1::evict_last.L2::cache_hint.b32 {%r0}, [%g0 + 4], %w0;
        membar.gl; fence.acq_rel.gpu;
        st.global.L1::evict_last.L2::cache_hint.b32 [%g1 + 0], {%r0}, %w0;"""
    x, y = np.array([1, 2], dtype=np.int32), np.zeros(1, dtype=np.int32)
    Kernel(entry(body, 2), "test")(1, 1, x, y, readonly=(x,))
    assert y[0] == 2


def test_narrow_loads_are_extended() -> None:
    body = """
        ld.global.s8 %r0, [%g0]; ld.global.u8 %r1, [%g0]; ld.global.s16 %r2, [%g0+2]; ld.global.u16 %r3, [%g0 + 2];
        ld.global.s8 %w0, [%g0+1]; st.global.v4.b32 [%g1], {%r0, %r1, %r2, %r3}; st.global.b64 [%g1+16], %w0;"""
    x, y = np.array([0x80, 0xFF, 0x01, 0x90], dtype=np.uint8), np.zeros(6, dtype=np.int32)
    Kernel(entry(body, 2), "test")(1, 1, x, y, readonly=(x,))
    assert y.tolist() == [-128, 128, -28671, 0x9001, -1, -1]


def test_parameters_of_every_kind() -> None:
    ptx = (
        HEAD
        + """
        .visible .entry test(.param .u64 .ptr .global .align 8 out, .param .align 8 .b8 st[24],
            .param .f32 x, .param .b8 y, .param .s16 z)
        {
        .reg .b64 %o, %s, %t; .reg .b32 %a<8>; .reg .b16 %h<3>;
        ld.param.u64 %o, [out];
        ld.param.u64 %s, [st+8];
        ld.param.v2.b32 {%a0, %a1}, [st];
        ld.param.f32 %a2, [x]; ld.param.u8 %h0, [y]; ld.param.s16 %a3, [z];
        cvt.u32.u16 %a4, %h0;
        ld.u32 %a5, [%s];
        mov.b64 %t, st; ld.param.u32 %a6, [%t+16]; cvta.param.u64 %t, %t; ld.u32 %a7, [%t+4];
        st.global.v4.u32 [%o], {%a0, %a1, %a2, %a3};
        st.global.v4.u32 [%o+16], {%a4, %a5, %a6, %a7};
        ret;
        }"""
    )
    out, inner = torch.zeros(8, dtype=torch.int32), np.array([77], dtype=np.int32)
    given = struct.pack("<iiQi4x", 3, -4, inner.ctypes.data, 9)
    kernel = Kernel(ptx, "test")
    kernel(1, 1, out, given, 1.5, 200, -7, readonly=(inner,))
    assert out.tolist() == [3, -4, 0x3FC00000, -7, 200, 77, 9, -4]
    for wrong in (
        (out, given[1:], 1.5, 200, -7),
        (out, given, 1.5, 256, -7),
        (out, given, 1.5, 1.0, -7),
        (out, given, 1.5, 2),
    ):
        with pytest.raises(TypeError):
            kernel(1, 1, *wrong)


def test_variables_in_every_space() -> None:
    """A constant table, a global counter, static and dynamic shared memory, a local array, generic addresses of each."""
    declarations = """
        .const .align 4 .f32 table[3] = {0f3F800000, 0f40000000, 0f40400000};
        .global .align 4 .b8 bytes[8] = {1, 0, 0, 0, 0xff, 255, 0, 0};
        .extern .shared .align 16 .b8 dynamic[];"""
    registers = ".local .align 8 .b8 here[16]; .shared .align 4 .b32 fixed[3];"
    body = """
        mov.u64 %at0, table; ld.const.f32 %r0, [%at0+8];
        mov.u64 %at1, bytes; ld.global.u32 %r1, [%at1+4];
        mov.u64 %at2, here; st.local.u32 [%at2+4], 5; cvta.local.u64 %at3, %at2; ld.u32 %r2, [%at3+4];
        mov.u32 %r8, fixed; st.shared.u32 [%r8+8], 6;
        mov.u64 %at4, fixed; cvta.shared.u64 %at5, %at4; ld.u32 %r3, [%at5+8];
        st.shared.u32 [dynamic+12], 7;
        mov.u32 %r9, dynamic; ld.shared.u32 %r4, [%r9+12];
        cvta.to.shared.u64 %at6, %at5; ld.shared.u32 %r5, [%at6 + 8];
        cvta.to.global.u64 %at7, %g0; st.global.v4.b32 [%at7], {%r0, %r1, %r2, %r3}; st.global.v2.b32 [%at7+16], {%r4, %r5};"""
    out = np.zeros(6, dtype=np.int32)
    Kernel(entry(body, 1, registers, declarations), "test")(1, 1, out, shared=16)
    assert out.tolist() == [0x40400000, 0xFFFF, 5, 6, 7, 6]


def test_special_registers() -> None:
    names = [f"%{n}.{x}" for n in ("tid", "ntid", "ctaid", "nctaid") for x in "xyz"] + ["%laneid", "%warpid"]
    body = """
        mov.u32 %r0, %ctaid.x; mad.lo.u32 %r0, %r0, 3, 0; mov.u32 %r1, %ctaid.y; add.u32 %r0, %r0, %r1;
        mad.lo.u32 %r0, %r0, 40, %i; mov.u32 %r2, %tid.y; mad.lo.u32 %r0, %r2, 20, %r0;
        mad.wide.u32 %at0, %r0, 56, %g0;"""
    body += "".join(f"mov.u32 %r5, {name}; st.global.u32 [%at0+{4 * i}], %r5;" for i, name in enumerate(names))
    out = np.full((2, 3, 2, 20, 14), -1, dtype=np.int32)
    Kernel(entry(body), "test")((2, 3), (20, 2), out)
    for bx, by, y, x in np.ndindex(2, 3, 2, 20):
        linear = y * 20 + x
        assert out[bx, by, y, x].tolist() == [x, y, 0, 20, 2, 1, bx, by, 0, 2, 3, 1, linear % 32, linear // 32]


@pytest.mark.parametrize("order", ORDERS)
def test_atomics(order: str) -> None:
    body = """
        mad.wide.u32 %at1, %i, 8, %g0; ld.global.u64 %w0, [%at1];
        cvt.u32.u64 %r0, %w0;
        atom.global.min.s64 %w1, [%g1], %w0;
        red.global.gpu.relaxed.max.s64 [%g1+8], %w0;
        atom.add.u64 %w2, [%g1+16], %w0;
        red.global.xor.b64 [%g1+24], %w0;
        atom.global.gpu.acq_rel.add.u32 %r1, [%g2], 1;
        red.global.and.b32 [%g2+4], %r0;
        red.global.or.b32 [%g2+8], %r0;
        red.global.inc.u32 [%g2+12], 9;
        atom.global.cas.b32 %r2, [%g2+16], 0, 5;
        red.global.min.u32 [%g2+20], %r0;
        st.shared.f32 [fixed], 0f00000000;
        bar.sync 0;
        red.shared.add.f32 [fixed], 0f00000001;
        red.global.add.f32 [%g2+24], 0f00000001;
        red.global.add.f32 [%g2+28], 0f3F800000;
        bar.sync 0;
        ld.shared.u32 %r3, [fixed];
        setp.eq.u32 %p0, %i, 0;
        @%p0 st.global.u32 [%g2+32], %r3;"""
    x = np.random.default_rng(0).integers(-(2**62), 2**62, 96)
    low = x.astype(np.uint32)
    wide = np.array([2**63 - 1, -(2**63), 0, 0])
    words = np.array([0, 2**32 - 1, 0, 0, 0, 2**32 - 1, 0, 0, 0], dtype=np.uint32)
    Kernel(entry(body, 3, ".shared .align 4 .f32 fixed[1];"), "test")(1, 96, x, wide, words, readonly=(x,), order=order)
    with np.errstate(over="ignore"):
        assert wide.tolist() == [x.min(), x.max(), x.sum(), np.bitwise_xor.reduce(x)]
    both, either = np.bitwise_and.reduce(low), np.bitwise_or.reduce(low)
    # Adding in global memory flushes subnormals, in shared memory it does not.
    assert words.tolist() == [96, both, either, 96 % 10, 5, low.min(), 0, np.float32(96).view(np.uint32), 96]


SHUFFLES: Final = {
    "up.b32 %r1|%p0, %r0, 3, 0": lambda i: (i - 3, i >= 3),
    "down.b32 %r1|%p0, %r0, 5, 31": lambda i: (i + 5, i + 5 < 32),
    "bfly.b32 %r1|%p0, %r0, 17, 31": lambda i: (i ^ 17, True),
    "idx.b32 %r1|%p0, %r0, 9, 31": lambda i: (9, True),
    "down.b32 %r1|%p0, %r0, 3, 0x181f": lambda i: (i + 3, i % 8 + 3 < 8),
    "idx.b32 %r1|%p0, %r0, 6, 0x181f": lambda i: (i // 8 * 8 + 6, True),
    "up.b32 %r1|%p0, %r0, 1, 0x1c00": lambda i: (i - 1, i % 4 >= 1),
}


@pytest.mark.parametrize("order", ORDERS)
def test_shuffles(order: str) -> None:
    """Two full warps, segments of 32, 8 and 4 lanes; a lane without a source keeps its own value."""
    body = "add.u32 %r0, %i, 100;"
    for row, shuffle in enumerate(SHUFFLES):
        body += f"shfl.sync.{shuffle}, -1; selp.u32 %r2, 1, 0, %p0;"
        body += f"mad.wide.u32 %at0, %i, 8, %g0; st.global.v2.b32 [%at0+{row * 512}], {{%r1, %r2}};"
    out = np.zeros((len(SHUFFLES), 64, 2), dtype=np.int32)
    Kernel(entry(body), "test")(1, 64, out, order=order)
    for row, source in enumerate(SHUFFLES.values()):
        for i in range(64):
            lane, inside = source(i % 32)
            assert out[row, i].tolist() == [100 + i // 32 * 32 + (lane if inside else i % 32), inside]


def test_votes_and_warp_reductions() -> None:
    x = np.random.default_rng(3).integers(-(2**31), 2**31, 64).astype(np.int32)
    redux = ("add.s32", "min.s32", "max.s32", "min.u32", "max.u32", "and.b32", "or.b32", "xor.b32")
    body = """
        mad.wide.u32 %at0, %i, 4, %g0; ld.global.u32 %r0, [%at0];
        setp.lt.s32 %p0, %r0, 0; setp.lt.u32 %p4, %i, 32;
        vote.sync.ballot.b32 %r1, %p0, -1;
        vote.sync.all.pred %p1, %p4, -1; vote.sync.any.pred %p2, %p0, -1; vote.sync.uni.pred %p3, %p4, -1;
        selp.u32 %r2, 1, 0, %p1; selp.u32 %r3, 2, 0, %p2; selp.u32 %r4, 4, 0, %p3; or.b32 %r2, %r2, %r3; or.b32 %r2, %r2, %r4;
        mad.wide.u32 %at1, %i, 40, %g1; st.global.u32 [%at1], %r1; st.global.u32 [%at1+4], %r2;"""
    body += "".join(
        f"redux.sync.{op} %r5, %r0, -1; st.global.u32 [%at1+{8 + 4 * i}], %r5;" for i, op in enumerate(redux)
    )
    out = np.zeros((64, 10), dtype=np.uint32)
    Kernel(entry(body, 2), "test")(1, 64, x, out, readonly=(x,))
    for warp in (0, 1):
        part = x[32 * warp : 32 * warp + 32]
        u = part.view(np.uint32)
        ballot = sum(int(v < 0) << i for i, v in enumerate(part))
        signed = [np.uint32(v & 0xFFFFFFFF) for v in (int(part.sum(dtype=np.int64)), int(part.min()), int(part.max()))]
        expected = [ballot, 7 if warp == 0 else 6, *signed, u.min(), u.max()]
        expected += [f.reduce(u) for f in (np.bitwise_and, np.bitwise_or, np.bitwise_xor)]
        assert (out[32 * warp : 32 * warp + 32] == np.array(expected, dtype=np.uint32)).all()


def test_part_of_a_warp() -> None:
    """Lanes 0 to 7 shuffle among themselves while the others have left, and a block may end in the middle of a warp."""
    body = """
        setp.ge.u32 %p0, %i, 8; @%p0 exit;
        shfl.sync.bfly.b32 %r1, %i, 4, 31, 0xff; bar.warp.sync 0xff;
        mad.wide.u32 %at0, %i, 4, %g0; st.global.u32 [%at0], %r1;"""
    out = np.zeros(8, dtype=np.int32)
    Kernel(entry(body), "test")(1, 20, out)
    assert out.tolist() == [i ^ 4 for i in range(8)]


@pytest.mark.parametrize("order", ORDERS)
def test_barriers_and_loops(order: str) -> None:
    """A sum over the block in shared memory, halved each round: loops, predicates and barriers together."""
    body = """
        mov.u32 %r9, part; mad.lo.u32 %r0, %i, 4, %r9;
        mov.u32 %r8, %ctaid.x; mad.lo.u32 %r7, %r8, 128, %i;
        mad.wide.u32 %at0, %r7, 4, %g0; ld.global.u32 %r1, [%at0]; st.shared.u32 [%r0], %r1;
        mov.u32 %r2, 64;
    ROUND:
        barrier.sync 0;
        setp.ge.u32 %p0, %i, %r2; @%p0 bra REST;
        shl.b32 %r3, %r2, 2; add.u32 %r3, %r0, %r3; ld.shared.u32 %r4, [%r3]; ld.shared.u32 %r5, [%r0];
        add.u32 %r5, %r5, %r4; st.shared.u32 [%r0], %r5;
    REST:
        shr.u32 %r2, %r2, 1; setp.ne.u32 %p1, %r2, 0; @%p1 bra.uni ROUND;
        setp.eq.u32 %p2, %i, 0; mad.wide.u32 %at1, %r8, 4, %g1;
        @%p2 st.global.u32 [%at1], %r5;"""
    x, out = np.random.default_rng(0).integers(0, 1000, (5, 128), dtype=np.int32), np.zeros(5, dtype=np.int32)
    Kernel(entry(body, 2, ".shared .align 4 .b32 part[128];"), "test")(5, 128, x, out, readonly=(x,), order=order)
    assert (out == x.sum(1)).all()
