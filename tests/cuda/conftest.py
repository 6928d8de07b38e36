"""The kernels of csrc/cuda, compiled by g++ with the headers of ``shim``, as the module that nvcc would make."""

import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SHIM = ROOT / "tests/cuda/shim"
FLAGS = ["-std=c++17", "-O1", "-Wall", "-fPIC", "-ffp-contract=off", "-fno-math-errno"]
FLAGS += [f"-I{folder}" for folder in (SHIM, ROOT / "csrc", ROOT / "csrc/include")]
KERNELS = ["-include", "cuda_runtime.h", "-x", "c++", ROOT / "csrc/cuda/step.cu", ROOT / "csrc/cuda/training.cu"]
SHIMMED = [*KERNELS, ROOT / "csrc/cuda/runtime.cpp", SHIM / "shim.cpp"]


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """``bdkernels._cuda`` for CPU tensors: the same bindings, launchers and kernels."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed: pip install pybind11")
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    made = tmp_path_factory.mktemp("shim") / "_cuda.so"
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    sources = [*SHIMMED, ROOT / "csrc/bindings/cuda_module.cpp"]
    subprocess.run(["g++", "-shared", *FLAGS, *include, *sources, "-o", made], check=True)
    spec = importlib.util.spec_from_file_location("_cuda", made)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
