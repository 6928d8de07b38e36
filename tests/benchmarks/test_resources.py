"""The compiled kernels take no more of a GPU than the committed table says, and move images 128 bits at a time."""

from __future__ import annotations

import copy
import json

import pytest

from benchmarks import machine_code, resources, roofline

RESULTS = json.loads(resources.RESULTS.read_text())
TABLE = RESULTS["cuda"]
ARCHS = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]


def of_arch(arch: str) -> dict[str, machine_code.Row]:
    return {name: rows[arch] for name, rows in TABLE["kernels"].items()}


def test_this_build_is_no_worse_than_the_table() -> None:
    tool, binary = machine_code.cuobjdump(), resources.extension()
    if tool is None or binary is None:
        pytest.skip("cuobjdump or bdkernels._cuda is missing: pip install triton; install nvcc and build again")
    if resources.compiler() != TABLE["compiler"]:
        pytest.skip(f"{resources.compiler()} made this build: the table is {TABLE['compiler']}'s")
    arch = next(a for a in ("sm_80", *ARCHS) if a in resources.architectures(tool, binary))
    assert not resources.regressions(of_arch(arch), resources.measure(tool, binary, arch))


@pytest.mark.parametrize("arch", ARCHS)
def test_the_table_has_no_stack_no_spills_and_whole_vectors(arch: str) -> None:
    for name, row in of_arch(arch).items():
        assert row["stack"] == row["spills"] == 0, name
        if "Any" not in name and name != "loss_total_kernel":
            assert row["stores"]["128"] >= 1, name
            assert row["stores"].keys() <= {"128", "64"}, name  # 64: the part of a loss
            assert ("64" in row["stores"]) == name.startswith("loss"), name
        if name.startswith("step") and "Any" not in name:
            assert "16" not in row["loads"], name
            assert row["loads"].get("32", 0) <= 1, name  # four bytes of a region


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"registers": 45}, "has 45 registers: expected about 40"),
        ({"stack": 16}, "has stack 16: expected none"),
        ({"spills": 2}, "has spills 2: expected none"),
        ({"loads": {"128": 5, "32": 4}}, "has 4 loads of 32 bits: expected 0"),
        ({"stores": {"64": 2}}, "has 2 stores of 64 bits: expected 0"),
    ],
)
def test_a_regression_is_told(change: machine_code.Row, message: str) -> None:
    row = {"registers": 40, "stack": 0, "shared": 0, "spills": 0, "loads": {"128": 6}, "stores": {"128": 1}}
    assert not resources.regressions({"k": row}, {"k": copy.deepcopy(row) | {"registers": 44}})
    assert resources.regressions({"k": row}, {"k": row | change}) == [f"k {message}"]
    assert resources.regressions({"k": row}, {}) == ["k is in one of the two only"]


def test_a_row_is_read_from_machine_code() -> None:
    code = """
        /*0a10*/  LDG.E.128.CONSTANT R8, desc[UR10][R30.64] ;
        /*0a20*/  @P0 LDG.E R2, desc[UR10][R30.64+0x4] ;
        /*0a30*/  LDG.E.U8 R2, desc[UR10][R30.64+0x4] ;
        /*0a38*/  FMUL R2, R2, R3 ;
        /*0a3c*/  @!P1 IMAD.WIDE.U32 R4, R2, 0x10, R4 ;
        /*0a40*/  STG.E.64 desc[UR10][R4.64], R2 ;
        /*0a50*/  STL [R1], R2 ;
        /*0a60*/  EXIT ;
        /*0a70*/  BRA 0xa70 ;
        /*0a80*/  NOP ;
    """
    assert machine_code.row(" REG:40 STACK:8 SHARED:0 ", code) == {
        **{"registers": 40, "stack": 8, "shared": 0, "spills": 1, "instructions": 8, "arithmetic": 2},
        **{"loads": {"8": 1, "32": 1, "128": 1}, "stores": {"64": 1}, "constant": {"128": 1}},
    }


def test_the_table_is_what_is_calculated_of_the_rows_and_nothing_is_moved_twice() -> None:
    kernels = {backend: RESULTS[backend]["kernels"] for backend in ("cuda", "triton")}
    figures = roofline.calculated(kernels)
    assert RESULTS["calculated"] == {"elements": roofline.ELEMENTS, "figures": figures}
    for line in figures:
        assert line["bytes"] == line["bound"], line


def test_times_are_those_of_the_slower_of_memory_and_issue() -> None:
    device = roofline.Device("one", "sm_0", 1e9, 1, 1e9)
    row = {
        "registers": 1,
        "instructions": 80,
        "arithmetic": 40,
        "loads": {"128": 2},
        "stores": {"128": 1},
        "constant": {},
    }
    kernel = roofline.Kernel("fused_step", "k", 3, 0)
    line = roofline.figures("cuda", kernel, "float32", row, device)
    assert (line["bytes"], line["bound"], line["accesses_per_16_bytes"], line["arithmetic_per_element"]) == (
        12,
        12,
        1,
        10,
    )
    assert line["memory_us"] == pytest.approx(1e6 * 12 * roofline.ELEMENTS / 1e9)
    assert line["issue_us"] == pytest.approx(1e6 * 80 * roofline.ELEMENTS / 4 / 32 / 4e9, abs=0.01)
