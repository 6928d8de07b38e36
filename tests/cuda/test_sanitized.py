"""The CUDA kernels under the address and undefined-behaviour sanitizers, on memory of exactly their operands' sizes."""

import shutil
import subprocess
from pathlib import Path

import pytest

from .conftest import FLAGS, ROOT, SHIMMED

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "-Wno-psabi"]


def test_no_access_out_of_bounds_and_no_undefined_behaviour(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    sources = [
        *SHIMMED,
        ROOT / "csrc/cpu/rows_baseline.cpp",
        ROOT / "csrc/cpu/conv_baseline.cpp",
        ROOT / "tests/cuda/sanitized.cpp",
    ]
    subprocess.run(["g++", *FLAGS, *SANITIZERS, *sources, "-o", tmp_path / "sanitized"], check=True)
    options = {"ASAN_OPTIONS": "detect_stack_use_after_return=0"}  # stacks are the fibers' own
    done = subprocess.run([tmp_path / "sanitized"], capture_output=True, text=True, env=options)
    assert done.returncode == 0, done.stdout + done.stderr
