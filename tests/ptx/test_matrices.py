"""ldmatrix and stmatrix: where each element of a matrix goes, as the figures of the PTX manual have it."""

from __future__ import annotations

from typing import Final

import numpy as np
import pytest

from tests.ptx.executor import ORDERS, Fault, Kernel
from tests.ptx.parser import PtxError
from tests.ptx.ptx_for_tests import entry

SHARED: Final = ".shared .align 16 .b8 part[1024];"

# part[i] = x[i] for 256 words, and a lane's row of 16 bytes at rows[i].
FILL: Final = """
    mov.u32 %r9, part; mul.lo.u32 %r8, %i, 32; add.u32 %r8, %r9, %r8;
    mad.wide.u32 %at0, %i, 32, %g0;
    ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%at0]; st.shared.v4.u32 [%r8], {%r0, %r1, %r2, %r3};
    ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%at0+16]; st.shared.v4.u32 [%r8+16], {%r0, %r1, %r2, %r3};
    mad.wide.u32 %at1, %i, 4, %g1; ld.global.u32 %r7, [%at1]; add.u32 %r7, %r9, %r7;
    mad.wide.u32 %at2, %i, 16, %g2; bar.sync 0;"""


def fragments(matrices: np.ndarray, transposed: bool) -> np.ndarray:
    """Which lane holds element (row, column) of each matrix, and in which half: [lane, matrix, half]."""
    held = np.zeros((32, len(matrices), 2), dtype=np.uint16)
    for k, matrix in enumerate(matrices):
        for row in range(8):
            for column in range(8):
                major, minor = (column, row) if transposed else (row, column)
                held[4 * major + minor // 2, k, minor % 2] = matrix[row, column]
    return held


def registers(count: int) -> str:
    return "{" + ", ".join(f"%r{i}" for i in range(count)) + "}"


def given(count: int) -> tuple[np.ndarray, np.ndarray]:
    """512 elements, and where each lane's row starts: in any order; lanes past the matrices name no row."""
    random = np.random.default_rng(count)
    rows = (16 * random.permutation(64)[:32]).astype(np.int32)
    rows[8 * count :] = 7
    return random.integers(0, 2**16, 512, dtype=np.uint16), rows


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count: int, transposed: bool, order: str) -> None:
    name = f"ldmatrix.sync.aligned.m8n8.x{count}{'.trans' * transposed}.shared.b16"
    stores = "".join(f"st.global.u32 [%at2+{4 * i}], %r{i};" for i in range(count))
    x, rows = given(count)
    out = np.zeros((32, 4, 2), dtype=np.uint16)
    body = f"{FILL} {name} {registers(count)}, [%r7]; {stores}"
    Kernel(entry(body, 3, SHARED), "test")(1, 32, x, rows, out, readonly=(x, rows), order=order)
    matrices = np.stack([x[at // 2 : at // 2 + 8] for at in rows[: 8 * count]]).reshape(count, 8, 8)
    assert (out[:, :count] == fragments(matrices, transposed)).all()
    assert (out[:, count:] == 0).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(count: int, transposed: bool, order: str) -> None:
    """What the lanes hold goes to the rows that they name, and to nothing else."""
    name = f"stmatrix.sync.aligned.m8n8.x{count}{'.trans' * transposed}.shared.b16"
    loads = "".join(f"ld.global.u32 %r{i}, [%at2+{4 * i}];" for i in range(count))
    back = """bar.sync 0; mad.wide.u32 %at3, %i, 32, %g3;
        ld.shared.v4.u32 {%r0, %r1, %r2, %r3}, [%r8]; st.global.v4.u32 [%at3], {%r0, %r1, %r2, %r3};
        ld.shared.v4.u32 {%r0, %r1, %r2, %r3}, [%r8+16]; st.global.v4.u32 [%at3+16], {%r0, %r1, %r2, %r3};"""
    x, rows = given(count)
    matrices = np.random.default_rng(9).integers(0, 2**16, (count, 8, 8), dtype=np.uint16)
    held, out = np.zeros((32, 4, 2), dtype=np.uint16), np.zeros(512, dtype=np.uint16)
    held[:, :count] = fragments(matrices, transposed)
    body = f"{FILL} {loads} {name} [%r7], {registers(count)}; {back}"
    Kernel(entry(body, 4, SHARED), "test")(1, 32, x, rows, held, out, readonly=(x, rows, held), order=order)
    expected = x.copy()
    for at, row in zip(rows, matrices.reshape(-1, 8), strict=False):
        expected[at // 2 : at // 2 + 8] = row
    assert (out == expected).all()


LOAD: Final = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r0, %r1, %r2, %r3}, [%r7];"
STORE: Final = "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r7], {%r0};"
FAULTS: Final = {
    "a row off by two": (f"add.u32 %r7, %r7, 2; {LOAD}", 32, "misaligned: load of 16 bytes, 2 past"),
    "a row past the end": (f"add.u32 %r7, %r7, 1024; {LOAD}", 32, "out of bounds: load of 16 bytes"),
    "half a warp": (LOAD, 16, "without all 32 lanes"),
    "a lane that has left": (f"setp.eq.u32 %p0, %i, 9; @%p0 exit; {LOAD}", 32, "without all 32 lanes"),
    "an unset value": (
        f".reg .b32 %u; {STORE.replace('%r0', '%u')} bar.sync 0; ld.shared.u32 %r0, [%r7]; st.global.u32 [%at2], %r0;",
        32,
        "a stored value depends on a register",
    ),
    "two lanes and one row": (f"mov.u32 %r7, part; mov.u32 %r0, %i; {STORE}", 32, "race in shared memory: store"),
    "no barrier after": (f"{STORE} xor.b32 %r7, %r7, 16; ld.shared.u32 %r0, [%r7];", 32, "race in shared memory: load"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_matrix_fault_is_caught(name: str) -> None:
    body, threads, said = FAULTS[name]
    x, rows, out = np.zeros(512, dtype=np.uint16), np.arange(32, dtype=np.int32) * 16, np.zeros(256, dtype=np.uint16)
    kernel = Kernel(entry(FILL + body, 3, SHARED), "test")
    with pytest.raises(Fault, match=said):
        kernel(1, threads, x, rows, out, readonly=(x, rows))


@pytest.mark.parametrize(
    "text",
    [
        "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r0}, [%r7]",
        "ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r0, %r1}, [%r7]",
        "stmatrix.sync.aligned.m8n8.x4.global.b16 [%r7], {%r0, %r1, %r2, %r3}",
    ],
)
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(PtxError, match="unknown matrix instruction"):
        Kernel(entry(f"{text};"), "test")
