"""The extension that nvcc built, on a machine without a GPU: it imports, and every op says what is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bdkernels import cuda, testing
from bdkernels.compiled import CompiledOps

needs_build = pytest.mark.skipif(not cuda.built(), reason=cuda.reason() or "present")


@needs_build
def test_it_imports_without_a_driver() -> None:
    """And brings its own CUDA runtime: nothing of CUDA is loaded with it."""
    script = "import bdkernels._cuda; print(open('/proc/self/maps').read())"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert "_cuda" in loaded
    if not torch.version.cuda:
        assert "libcudart" not in loaded
    assert "libcuda.so" not in loaded


@needs_build
@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (0, 3, 4, 4)])
@pytest.mark.parametrize("op", testing.OPS)
def test_every_op_says_that_there_is_no_device(op: str, shape: testing.Shape) -> None:
    case = testing.random_case(op, torch.Generator().manual_seed(0), shape, torch.float32)
    if op == "fused_step_":
        case["bad_row"] = None
    ops = CompiledOps(cuda._module, lambda tensor: (0, 0))
    with pytest.raises(RuntimeError, match=r"^no CUDA device is present: "):
        getattr(ops, op)(**case)


@needs_build
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_an_old_driver_is_told_from_none(tmp_path: Path) -> None:
    """By NVIDIA's own runtime in the extension, given a driver library that knows its version and nothing else."""
    source, driver = tmp_path / "driver.cpp", tmp_path / "libcuda.so.1"
    source.write_text('extern "C" int cuDriverGetVersion(int* version) { return *version = 11080, 0; }')
    subprocess.run(["g++", "-shared", "-fPIC", source, "-o", driver], check=True)
    script = "import bdkernels._cuda as c; c.require_device()"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert re.search(
        r"RuntimeError: the NVIDIA driver is for CUDA 11\.8 and bdkernels\._cuda was built with CUDA 1[2-9]\.\d: update",
        done.stderr,
    ), done.stderr


def test_a_missing_extension_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bdkernels._cuda", None)  # ModuleNotFoundError, as where it was not built
    module, reason = cuda._load()
    assert module is None
    assert reason.startswith("bdkernels._cuda was not built: install the CUDA toolkit (nvcc on PATH, or CUDA_HOME)")
    monkeypatch.setattr(cuda, "_cuda", module)
    monkeypatch.setattr(cuda, "_reason", reason)
    assert not cuda.built()
    assert not cuda.available()
    case = testing.random_case("fused_step", torch.Generator().manual_seed(0), (2, 3, 4, 4), torch.float32)
    with pytest.raises(RuntimeError, match="was not built"):
        cuda._module()
    assert cuda.reason() == reason
    with pytest.raises(RuntimeError, match="was not built"):
        CompiledOps(cuda._module, lambda tensor: (0, 0)).fused_step(**case)
