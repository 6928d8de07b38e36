"""The compiled kernels take no more of a GPU than the committed table says, and move images 128 bits at a time."""

from __future__ import annotations

import copy
import json

import pytest

from benchmarks import resources

TABLE = json.loads(resources.RESULTS.read_text())["cuda"]
ARCHS = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]


def of_arch(arch: str) -> dict[str, resources.Row]:
    return {name: rows[arch] for name, rows in TABLE["kernels"].items()}


def test_this_build_is_no_worse_than_the_table() -> None:
    tool, binary = resources.cuobjdump(), resources.extension()
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
def test_a_regression_is_told(change: resources.Row, message: str) -> None:
    row = {"registers": 40, "stack": 0, "shared": 0, "spills": 0, "loads": {"128": 6}, "stores": {"128": 1}}
    assert not resources.regressions({"k": row}, {"k": copy.deepcopy(row) | {"registers": 44}})
    assert resources.regressions({"k": row}, {"k": row | change}) == [f"k {message}"]
    assert resources.regressions({"k": row}, {}) == ["k is in one of the two only"]


def test_widths_are_read_from_machine_code() -> None:
    code = """
        /*0a10*/  LDG.E.128.CONSTANT R8, desc[UR10][R30.64] ;
        /*0a20*/  @P0 LDG.E R2, desc[UR10][R30.64+0x4] ;
        /*0a30*/  LDG.E.U8 R2, desc[UR10][R30.64+0x4] ;
        /*0a40*/  STG.E.64 desc[UR10][R4.64], R2 ;
    """
    assert resources.widths(code, "LDG") == {"8": 1, "32": 1, "128": 1}
    assert resources.widths(code, "STG") == {"64": 1}
