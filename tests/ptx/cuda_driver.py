"""The CUDA backend without a GPU: its own bindings and launchers, and its kernels run from nvcc's PTX.

    with simulated_cuda(80) as launched:
        bdk.fused_step(x, ...)  # on CPU tensors

nvcc compiles ``csrc/cuda`` with the flags of ``setup.py``; ``cudart.cpp`` stands where the CUDA runtime would.
"""

from __future__ import annotations

import ast
import ctypes
import importlib.util
import inspect
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Final
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bdkernels import native, testing
from bdkernels.compiled import CompiledOps
from tests.ptx.executor import HERE, Kernel
from tests.ptx.parser import parse

ROOT: Final = HERE.parents[1]
ARCHS: Final = (80, 90)
WRITTEN: Final = {"fused_step_": {"x", "history", "bad_row"}}
_LAUNCH_FAILURE: Final = 719
_Launcher: Final = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_size_t,
)


def _of_setup(name: str) -> Any:
    """A constant of setup.py: what is run is what is shipped."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise LookupError(f"setup.py has no {name}")


@cache
def _build() -> tuple[ModuleType, ctypes.CDLL, dict[int, str]]:
    """``_cuda`` on the simulated runtime, the same as a library, and the PTX of each arch."""
    with tempfile.TemporaryDirectory() as folder:
        return _build_in(Path(folder))


def _build_in(folder: Path) -> tuple[ModuleType, ctypes.CDLL, dict[int, str]]:
    import pybind11

    include = ["-I", str(ROOT / "csrc"), "-I", str(ROOT / "csrc/include")]
    archs = [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in ARCHS]
    objects, texts = [], dict.fromkeys(ARCHS, "")
    for source in map(Path, _of_setup("CUDA_SOURCES")):
        made = folder / f"{source.stem}.o"
        keep = ["--keep", f"--keep-dir={folder}"]
        _run("nvcc", *_of_setup("NVCC_FLAGS"), *archs, *include, *keep, "-c", ROOT / "csrc" / source, "-o", made)
        objects.append(made)
        if source.suffix == ".cu":
            for arch in ARCHS:
                texts[arch] += (folder / f"{source.stem}.compute_{arch}.ptx").read_text()
    include += ["-I", pybind11.get_include(), "-I", sysconfig.get_path("include")]
    sources = [ROOT / "csrc/bindings/cuda_module.cpp", HERE / "cudart.cpp"]
    library = folder / "_cuda.so"
    _run("g++", "-shared", "-fPIC", "-std=c++17", "-O1", *include, *sources, *objects, "-o", library)
    # A name of its own: pybind11 has one module a name, and would hand out another `_cuda` that was loaded before.
    spec = importlib.util.spec_from_file_location(f"{__name__}._cuda", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, ctypes.CDLL(str(library)), texts


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stderr[:2000]}")


class _Allocations(TorchDispatchMode):
    """Keeps every tensor that an op makes: a kernel may write those, and what it was given to write."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.tensors.append(result)
        return result


class _Device:
    """Runs what is launched; each op's arguments may be read, its results written, and nothing else touched."""

    def __init__(self, arch: int, order: str) -> None:
        module, _, texts = _build()
        self.order, self.text = order, texts[arch]
        self.ops = CompiledOps(lambda: module, lambda tensor: (0, 0))
        self.launched: list[str] = []
        self.error: Exception | None = None
        self.readonly: list[Tensor] = []
        self.written: list[Tensor] = []
        self.allocations = _Allocations()

    def op(self, name: str) -> Callable[..., Any]:
        run = getattr(self.ops, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(run).bind(*args, **kwargs).arguments
            tensors = {k: v for k, v in given.items() if isinstance(v, Tensor)}
            self.written = [v for k, v in tensors.items() if k in WRITTEN.get(name, ())]
            self.readonly = [v for k, v in tensors.items() if k not in WRITTEN.get(name, ())]
            self.error = None
            try:
                with _Allocations() as self.allocations:
                    return run(*args, **kwargs)
            except RuntimeError:
                if self.error is not None:
                    raise self.error from None
                raise

        return call

    def launch(self, name: bytes, grid: Any, block: Any, arguments: Any, shared: int) -> int:
        try:
            kernel = _kernel(self.text, name.decode())
            packed = [ctypes.string_at(arguments[i], p.size) for i, p in enumerate(kernel.parameters)]
            buffers = [*self.written, *self.allocations.tensors]
            options = {"order": self.order, "readonly": self.readonly, "buffers": buffers}
            kernel(grid[:3], block[:3], *packed, shared=shared, **options)
        except Exception as error:  # it cannot pass through C++: `call` raises it
            self.error = error
            return _LAUNCH_FAILURE
        self.launched.append(kernel.name)
        return 0


@cache
def _kernel(text: str, name: str) -> Kernel:
    return Kernel(text, name)


def kernels(arch: int) -> set[str]:
    """Names of all kernels that nvcc makes for ``arch``."""
    return set(parse(_build()[2][arch]).entries)


@contextmanager
def simulated_cuda(arch: int, order: str = "ascending") -> Iterator[list[str]]:
    """Ops on CPU tensors run the CUDA backend's kernels; what was launched is listed. See ``Kernel.__call__``.

    Raises :class:`~tests.ptx.executor.Fault` where a kernel breaks a rule of the machine.
    """
    device = _Device(arch, order)
    launcher = _Launcher(device.launch)
    set_launcher = _build()[1].simulated_launches_go_to
    set_launcher(launcher)
    try:
        with mock.patch.multiple(native, available=lambda: True, **{op: device.op(op) for op in testing.OPS}):
            yield device.launched
    finally:
        set_launcher(None)
