"""Which backend runs what, and what is said where one is missing. Devices are named only: no GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bdkernels as bdk
from bdkernels import backends, native, reference

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def module(reason: str = "", serves: str = "cuda") -> Any:
    return SimpleNamespace(available=lambda: not reason, reason=lambda: reason, serves=lambda: serves)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The modules of the two GPU backends, both present unless a test says otherwise, on a device of torch's."""
    modules = {"triton": module(), "cuda": module()}
    module_of = backends._module
    monkeypatch.setattr(backends, "_module", lambda name: modules.get(name) or module_of(name))
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    backends._preferred.cache_clear()
    yield modules
    backends._preferred.cache_clear()


def name(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    return backends.name_for(device, dtype)


def test_each_device_has_its_backend(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert name(CPU) == ("cpu" if native.available() else "reference")
    assert name(CUDA) == "triton"
    assert backends.backend_for(CUDA, torch.bfloat16) is gpu["triton"]
    assert name(CUDA, torch.float64) == name(CPU, torch.float64) == "reference"
    assert name(torch.device("meta")) == "reference"
    gpu["triton"] = module("no triton")
    assert name(CUDA) == "cuda"
    gpu["triton"] = module()
    monkeypatch.setattr(backends, "_FASTER_IN_CUDA", frozenset({"NVIDIA A100"}))
    backends._preferred.cache_clear()
    assert name(CUDA) == "cuda"


def test_missing_gpu_backends_are_named_once(gpu: dict[str, Any]) -> None:
    gpu["triton"], gpu["cuda"] = module("install triton"), module("build it with nvcc")
    with pytest.warns(RuntimeWarning, match="install triton; build it with nvcc; running the plain torch reference"):
        assert backends.backend_for(CUDA, torch.float32) is reference
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.backend_for(CUDA, torch.float32) is reference


@pytest.mark.parametrize("forced", ["triton", "cuda"])
def test_a_forced_backend_runs_what_it_serves(gpu: dict[str, Any], forced: str) -> None:
    with bdk.use_backend(forced):
        assert name(CUDA) == forced
        assert name(CUDA, torch.float64) == "reference"
        assert name(CPU) == ("cpu" if native.available() else "reference")
    with bdk.use_backend("reference"):
        assert name(CUDA) == name(CPU) == "reference"


def test_kernels_that_are_interpreted_serve_the_cpu(gpu: dict[str, Any]) -> None:
    gpu["triton"] = module(serves="cpu")
    with bdk.use_backend("triton"):
        assert name(CPU) == "triton"
        assert name(CUDA) == "cuda"


def test_the_environment_forces_a_backend() -> None:
    """In a new process: it is read on import. Neither Triton nor the GPU modules are imported for CPU tensors."""
    code = (
        "import sys, torch, bdkernels as bdk\n"
        "from bdkernels import backends\n"
        "print(backends.name_for(torch.device('cpu'), torch.float32))\n"
        "bdk.normal(torch.arange(2), (1, 2, 2))\n"
        "assert not {'triton', 'bdkernels.triton', 'bdkernels.cuda'} & set(sys.modules)\n"
    )
    for forced in ("reference", ""):
        done = run(code, BDK_BACKEND=forced)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [forced or ("cpu" if native.available() else "reference")]
    assert (
        "BDK_BACKEND is 'tritn': expected one of cpu, reference, triton, cuda" in run(code, BDK_BACKEND="tritn").stderr
    )


@pytest.mark.parametrize(
    ("version", "told"),
    [("3.6.0", True), ("3.7.0+git12345", True), ("3.7", True), ("3.7.1+git9", False), ("3.10.0", False)],
)
def test_an_old_triton_is_a_reason(version: str, told: bool) -> None:
    pytest.importorskip("triton")
    code = f"import triton; triton.__version__ = {version!r}; import bdkernels.triton as b; print(b.reason())"
    sentence = f"triton cannot be used (version {version} is older than 3.7.1): run `pip install bdengine[gpu]`"
    assert (sentence in run(code).stdout) == told


def test_a_forced_backend_without_a_device_says_so() -> None:
    """Triton may be installed or not; without a GPU it cannot run, and the one sentence says what to do."""
    code = "import torch, bdkernels as bdk\nbdk.normal(torch.arange(2), (1, 2, 2))"
    done = run(code, BDK_BACKEND="triton", CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="0")
    assert done.returncode != 0
    assert "RuntimeError: triton " in done.stderr.splitlines()[-1]
    assert "run " in done.stderr.splitlines()[-1]


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
