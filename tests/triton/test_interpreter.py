"""The kernels under Triton's interpreter, in a process of their own: Triton reads ``TRITON_INTERPRET`` once, on import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_kernels_are_the_reference_under_the_interpreter() -> None:
    file = Path(__file__).parent / "interpreted.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(file), "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=file.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
