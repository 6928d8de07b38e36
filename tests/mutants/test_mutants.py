"""Every planted fault is caught, and every rung passes without one: a rung that always fails would catch all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.mutants.faults import FAULTS, RUNGS, Fault, climb, copy_of_source, plant

pytestmark = [pytest.mark.slow, pytest.mark.ladder]


def needs(rung: str) -> None:
    for tool in ("g++", *(["nvcc"] if rung == "PTX of nvcc" else [])):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not on PATH")
    if "Triton" in rung or rung == "interpreter":
        pytest.importorskip("triton")


@pytest.mark.parametrize("rung", RUNGS)
def test_a_rung_passes_without_a_fault(rung: str, tmp_path: Path) -> None:
    needs(rung)
    passed, _, said = climb(rung, copy_of_source(tmp_path))
    assert passed, said


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_caught(fault: Fault, tmp_path: Path) -> None:
    needs(fault.rung)
    folder = copy_of_source(tmp_path)
    plant(fault, folder)
    _, seen, said = climb(fault.rung, folder)
    assert seen, said
