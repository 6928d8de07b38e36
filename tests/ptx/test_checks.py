"""Each rule of the machine: a kernel that keeps it runs, and the same kernel with the fault planted is caught."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pytest

from tests.ptx.executor import ORDERS, Fault, Kernel
from tests.ptx.ptx_for_tests import entry

N: Final = 77  # elements: not a multiple of anything
SHARED: Final = ".shared .align 16 .b8 part[256];"

# y[i] = x[i]; the tail is left out by the predicate.
COPY: Final = """
    setp.{compare}.u32 %p0, %i, {n};
    mad.wide.u32 %at0, %i, 4, %g0; mad.wide.u32 %at1, %i, 4, %g1;
    @%p0 ld.global.u32 %r0, [%at0]; @%p0 st.global.u32 [%at1{offset}], %r0;"""

# y[i] = x[i ^ 32] by way of shared memory: the other warp's element.
EXCHANGE: Final = """
    mov.u32 %r9, part; mad.lo.u32 %r1, %i, 4, %r9; xor.b32 %r2, %i, 32; mad.lo.u32 %r2, %r2, 4, %r9;
    mad.wide.u32 %at0, %i, 4, %g0; ld.global.u32 %r0, [%at0];
    st.shared.u32 [%r1], %r0;
    {barrier}
    ld.shared.u32 %r3, [{read}];
    mad.wide.u32 %at1, %i, 4, %g1; st.global.u32 [%at1], %r3;
    {again}"""

# y[i] = y[i + 4] + 1 for lanes 0 to 3, through a shuffle.
SHUFFLE: Final = """
    {before}
    shfl.sync.{shuffle}, {mask};
    mad.wide.u32 %at1, %i, 4, %g1; st.global.u32 [%at1], %r1;"""

FAULTS: Final[dict[str, tuple[str, dict[str, str], dict[str, str], int, str]]] = {
    # name: kernel, its good form, what the fault changes, threads, what is said
    "one element too many": (
        COPY,
        {"compare": "lt", "n": "77", "offset": ""},
        {"compare": "le"},
        96,
        "out of bounds: load of 4 bytes",
    ),
    "one byte off": (
        COPY,
        {"compare": "lt", "n": "76", "offset": ""},
        {"offset": "+1"},
        96,
        "misaligned: store of 4 bytes",
    ),
    "below the buffer": (
        COPY,
        {"compare": "lt", "n": "77", "offset": ""},
        {"offset": "-4"},
        96,
        "out of bounds: store",
    ),
    "a vector off its alignment": (
        "ld.global.v2.u32 {{%r0, %r1}}, [%g0+{offset}]; st.global.v2.u32 [%g1], {{%r0, %r1}};",
        {"offset": "8"},
        {"offset": "4"},
        1,
        "misaligned: load of 8 bytes, 4 past a multiple",
    ),
    "a vector over the end": (
        "setp.lt.u32 %p0, %i, {vectors}; mad.wide.u32 %at1, %i, 16, %g1; @%p0 st.global.v4.u32 [%at1], {{%i, %i, %i, %i}};",
        {"vectors": "19"},
        {"vectors": "20"},
        32,
        "out of bounds: store of 16 bytes at byte 304 of a buffer of 308",
    ),
    "a store to the input": (
        "st.global.u32 [{to}], 1;",
        {"to": "%g1"},
        {"to": "%g0"},
        1,
        "store to a read-only buffer",
    ),
    "an atomic on the input": (
        "red.global.add.u32 [{to}], 1;",
        {"to": "%g1"},
        {"to": "%g0"},
        1,
        "atomic to a read-only buffer",
    ),
    "all threads store to one element": (
        "setp.lt.u32 %p0, %i, {most}; @%p0 st.global.u32 [%g1], 1;",
        {"most": "1"},
        {"most": "2"},
        64,
        "race in global memory: store of bytes that thread . of block 0 wrote",
    ),
    "an element of a neighbour": (
        "mad.wide.u32 %at1, %i, 4, %g1; ld.global.u32 %r0, [%at1+{next}]; st.global.u32 [%at1], %r0;",
        {"next": "0"},
        {"next": "4"},
        64,
        "race in global memory",
    ),
    "a store beside an atomic": (
        "setp.eq.u32 %p0, %i, 63; red.global.add.u32 [%g1], 1; @%p0 {store};",
        {"store": "red.global.add.u32 [%g1], 5"},
        {"store": "st.global.u32 [%g1], 5"},
        64,
        "race in global memory",
    ),
    "a read-only load of what was written": (
        "st.global.u32 [%g1], 3; ld.global{cache}.u32 %r0, [%g1]; st.global.u32 [%g1], %r0;",
        {"cache": ""},
        {"cache": ".nc"},
        1,
        "ld.global.nc of memory that this launch has written",
    ),
    "no barrier": (
        EXCHANGE,
        {"barrier": "bar.sync 0;", "read": "%r2", "again": ""},
        {"barrier": ""},
        64,
        "race in shared memory|depends on shared memory",
    ),
    "no barrier before the next round": (
        EXCHANGE,
        {"barrier": "bar.sync 0;", "read": "%r2", "again": "bar.sync 0; st.shared.u32 [%r1], %i;"},
        {"again": "st.shared.u32 [%r1], %i;"},
        64,
        "race in shared memory",
    ),
    "a warp's barrier for the block's": (
        EXCHANGE,
        {"barrier": "bar.sync 0;", "read": "%r2", "again": ""},
        {"barrier": "bar.warp.sync -1;"},
        64,
        "race in shared memory|depends on shared memory",
    ),
    "out of shared memory": (
        EXCHANGE,
        {"barrier": "bar.sync 0;", "read": "%r2", "again": ""},
        {"read": "%r1+4"},
        64,
        "out of bounds: load of 4 bytes at byte 256 of shared memory of 256",
    ),
    "shared memory that nothing wrote": (
        "setp.lt.u32 %p0, %i, {written}; mov.u32 %r9, part; mad.lo.u32 %r1, %i, 4, %r9; @%p0 st.shared.u32 [%r1], 5;"
        "ld.shared.u32 %r2, [%r1]; mad.wide.u32 %at1, %i, 4, %g1; st.global.u32 [%at1], %r2;",
        {"written": "64"},
        {"written": "60"},
        64,
        "uninitialised: a stored value depends on shared memory that nothing has written",
    ),
    "a register that nothing wrote": (
        "setp.lt.u32 %p0, %i, {written}; @%p0 mov.u32 %r1, 5; add.u32 %r2, %r1, 1;"
        "mad.wide.u32 %at1, %i, 4, %g1; st.global.u32 [%at1], %r2;",
        {"written": "64"},
        {"written": "60"},
        64,
        "uninitialised: a stored value depends on a register",
    ),
    "a branch on nothing": (
        "setp.lt.u32 %p0, %i, {written}; @%p0 setp.eq.u32 %p1, %i, 3; @%p1 bra END; END: st.global.u32 [%g1], 1;",
        {"written": "1"},
        {"written": "0"},
        1,
        "uninitialised: a predicate depends on a register",
    ),
    "threads that leave before the barrier": (
        "setp.ge.u32 %p0, %i, {most}; @%p0 exit; bar.sync 0;",
        {"most": "64"},
        {"most": "50"},
        64,
        "skipped barrier: 14 of 64 threads exited before it",
    ),
    "a barrier on either side of a branch": (
        "setp.ge.u32 %p0, %i, {most}; @%p0 bra OTHER; bar.sync 0; bra END; OTHER: bar.sync 0; END: mov.u32 %r0, 1;",
        {"most": "64"},
        {"most": "32"},
        64,
        "divergent barrier",
    ),
    "a barrier of part of the block": ("bar.sync 0, {count};", {"count": "64"}, {"count": "32"}, 64, "is not modelled"),
    "a shuffle against a barrier": (
        "setp.eq.u32 %p0, %i, {one}; @%p0 bra END; shfl.sync.bfly.b32 %r1, %i, 1, 31, -1; END: bar.sync 0;",
        {"one": "99"},
        {"one": "5"},
        64,
        "deadlock: the warp instruction waits for lanes",
    ),
    "a shuffle from a lane that left": (
        SHUFFLE,
        {"before": "", "shuffle": "down.b32 %r1, %i, 4, 31", "mask": "-1"},
        {"before": "setp.ge.u32 %p0, %i, 20; @%p0 exit;"},
        32,
        "shuffle from lane 20, which takes no part in it",
    ),
    "a shuffle from a lane that is not there": (
        SHUFFLE,
        {"before": "", "shuffle": "bfly.b32 %r1, %i, 1, 31", "mask": "-1"},
        {"shuffle": "bfly.b32 %r1, %i, 16, 31"},
        24,
        "shuffle from lane (2[4-9]|3.), which takes no part in it",
    ),
    "a mask without the lane": (
        SHUFFLE,
        {"before": "", "shuffle": "bfly.b32 %r1, %i, 1, 31", "mask": "-1"},
        {"mask": "0xffff"},
        32,
        "the lane is not in its own member mask",
    ),
    "lanes with different masks": (
        SHUFFLE,
        {"before": "", "shuffle": "bfly.b32 %r1, %i, 1, 31", "mask": "-1"},
        {"before": "setp.lt.u32 %p0, %i, 16; selp.b32 %r5, -1, 0xffffff00, %p0;", "mask": "%r5"},
        32,
        "not in its own member mask|deadlock: lanes of a warp",
    ),
    "a loop without end": (
        "mov.u32 %r0, 0; ROUND: add.u32 %r0, %r0, {step}; setp.lt.u32 %p0, %r0, 100; @%p0 bra ROUND;",
        {"step": "1"},
        {"step": "0"},
        1,
        "endless loop: more than 1000 jumps back",
    ),
    "a trap": ("setp.lt.u32 %p0, %i, {most}; @%p0 trap;", {"most": "0"}, {"most": "1"}, 32, "trap"),
    "a division by zero": ("div.u32 %r0, %i, {by};", {"by": "3"}, {"by": "0"}, 1, "integer division by zero"),
}


def launch(body: str, threads: int, order: str = "ascending") -> None:
    x, y = np.arange(N, dtype=np.int32), np.zeros(N, dtype=np.int32)
    kernel = Kernel(entry(body, 2, SHARED), "test")
    kernel(1, threads, x, y, readonly=(x,), order=order, jump_limit=1000)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name: str) -> None:
    body, good, fault, threads, said = FAULTS[name]
    for order in ORDERS:
        launch(body.format(**good), threads, order)
        with pytest.raises(Fault, match=said):
            launch(body.format(**good | fault), threads, order)


def test_a_fault_names_instruction_and_thread() -> None:
    with pytest.raises(
        Fault, match=r"test, line \d+ `@%p0 ld.global.u32 %r0, \[%at0\]`: .*block \(0, 0, 0\), thread \(77, 0, 0\)"
    ):
        launch(COPY.format(compare="le", n="77", offset=""), 96)


def test_the_end_is_exact_to_the_byte() -> None:
    for size in (4, 3):
        y = np.zeros(size, dtype=np.uint8)
        kernel = Kernel(entry("st.global.u16 [%g0+2], 7;"), "test")
        if size == 4:
            kernel(1, 1, y)
        else:
            with pytest.raises(Fault, match="out of bounds: store of 2 bytes at byte 2 of a buffer of 3"):
                kernel(1, 1, y)


def test_undefined_values_may_be_made_but_not_used() -> None:
    """A masked lane computes on registers that its load skipped; only what it stores must be defined."""
    body = """
        setp.lt.u32 %p0, %i, 10; mad.wide.u32 %at0, %i, 4, %g0; mad.wide.u32 %at1, %i, 4, %g1;
        @%p0 ld.global.f32 %f0, [%at0];
        mul.f32 %f1, %f0, 0f40000000; setp.gt.f32 %p1, %f1, 0f00000000;
        and.pred %p2, %p0, %p1; setp.gt.and.f32 %p3, %f1, 0f00000000, %p0;
        selp.f32 %f2, %f1, 0f00000000, %p0;
        shfl.sync.bfly.b32 %f3, %f1, 1, 31, -1;
        @%p2 st.global.f32 [%at1], %f1; @!%p0 st.global.f32 [%at1], %f2; @%p3 st.global.f32 [%at1], %f3;"""
    launch(body, 32)


def test_neighbouring_bytes_do_not_race_and_warps_may_order_themselves() -> None:
    """Two threads store to two halves of one word; a warp's own barrier orders its shared memory."""
    body = """
        mad.wide.u32 %at1, %i, 2, %g1; cvt.u16.u32 %h0, %i; st.global.u16 [%at1], %h0;
        mov.u32 %r9, part; mad.lo.u32 %r1, %i, 4, %r9; xor.b32 %r2, %i, 1; mad.lo.u32 %r2, %r2, 4, %r9;
        st.shared.u32 [%r1], %i; {sync} ld.shared.u32 %r3, [%r2]; {sync} st.shared.u32 [%r1], %r3;"""
    launch(body.format(sync="bar.warp.sync -1;"), 64)
    with pytest.raises(Fault, match="race in shared memory"):
        launch(body.format(sync="shfl.sync.bfly.b32 %r4, %i, 1, 31, -1;"), 64)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"block": 0}, "0 threads a block"),
        ({"block": 2048}, "2048 threads a block"),
        ({"order": "sideways"}, "expected one of ascending, descending, random"),
        ({"buffers": "overlap"}, "share some of their bytes"),
    ],
)
def test_launches_that_cannot_be(arguments: dict[str, Any], error: str) -> None:
    x, y = np.arange(N), np.arange(N)
    given = {"block": 32, **arguments}
    if "buffers" in given:
        given["buffers"] = (x[1:],)
    with pytest.raises(ValueError, match=error):
        Kernel(entry("mov.u32 %r0, 1;", 2), "test")(1, given.pop("block"), x, y, **given)


def test_blocks_race_with_each_other() -> None:
    body = "mov.u32 %r0, %ctaid.x; mad.lo.u32 %r0, %r0, {step}, %i; mad.wide.u32 %at1, %r0, 4, %g1; st.global.u32 [%at1], %r0;"
    for step, good in ((16, True), (15, False)):
        y = np.zeros(64, dtype=np.int32)
        kernel = Kernel(entry(body.format(step=step), 2), "test")
        if good:
            kernel(4, 16, y, y)
            assert (y == np.arange(64)).all()
        else:
            with pytest.raises(Fault, match="race in global memory: store of bytes that thread 15 of block 0 wrote"):
                kernel(4, 16, y, y)
