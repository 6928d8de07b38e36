"""Runs PTX on the CPU: translated to C++, compiled once per content, every thread executed and every access checked.

    kernel = Kernel(ptx_text, "add")
    kernel(grid, block, x, y, 3.0, n)

Values are PTX's to the bit. A run that breaks a rule of the machine (bounds, alignment, races, barriers, shuffles,
undefined values, loops without end) raises :class:`Fault` with the instruction and the thread.

Limits: no device functions, tensor cores, clusters or asynchronous copies; barriers are of the whole block; threads run one
at a time, so orderings that fences and atomics make between blocks are not tracked and such traffic is reported as a race.
Threads may store one value to the same shared bytes, as compilers let them. A writable byte costs 24 bytes of bookkeeping.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from tests.ptx.parser import Instruction, Parameter, PtxError, parse
from tests.ptx.translator import Translator

HERE: Final = Path(__file__).parent
ORDERS: Final = ("ascending", "descending", "random")
_FLAGS: Final = ("-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-fwrapv", "-w")
_FORMATS: Final = {"f32": "<f", "f64": "<d"}


class Fault(RuntimeError):
    """A kernel broke a rule of the machine."""


class _Request(ctypes.Structure):
    """One launch; the same layout as ``Request`` in runtime.cpp."""

    _fields_: Final = [
        ("parameters", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(ctypes.c_uint64)),
        ("seed", ctypes.c_uint64),
        ("jump_limit", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("buffer_count", ctypes.c_uint32),
        ("dynamic_shared", ctypes.c_uint32),
        ("order", ctypes.c_uint32),
    ]


Array = np.ndarray | torch.Tensor


class Kernel:
    """One entry of a PTX text. ``name`` may be a part of the entry's name that only it has.

    Raises :class:`PtxError` for an entry that is not there and for any instruction that has no translation.
    """

    def __init__(self, text: str, name: str) -> None:
        module = parse(text)
        found = [n for n in module.entries if n == name] or [n for n in module.entries if name in n]
        if len(found) != 1:
            raise PtxError(f"entry `{name}`; expected one of {', '.join(module.entries)}")
        entry = module.entries[found[0]]
        self.name, self.parameters, self.limits = entry.name, entry.parameters, entry.limits
        self.body = entry.body
        self._launch = ctypes.CDLL(str(_build(Translator(module, entry).source()))).ptx_launch

    def __call__(
        self,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        *args: Any,
        shared: int = 0,
        order: str = "ascending",
        seed: int = 0,
        readonly: Sequence[Array] = (),
        buffers: Sequence[Array] = (),
        jump_limit: int = 1_000_000,
    ) -> None:
        """Runs every thread of ``grid`` blocks of ``block`` threads.

        ``args``: arrays (NumPy, CPU tensors; their bytes may be accessed), ``None`` for a null pointer, numbers, and ``bytes``
        for a struct by value. ``buffers``: more arrays that may be accessed, for pointers inside a struct. ``readonly``:
        arrays that may only be read. ``order``: of threads and blocks, ``random`` by ``seed``. ``jump_limit``: jumps back
        that one thread may take. Raises :class:`Fault`, ``TypeError`` for an argument, ``ValueError`` for an impossible launch.
        """
        if len(args) != len(self.parameters):
            raise TypeError(f"{self.name}: {len(args)} arguments; expected {len(self.parameters)}")
        if order not in ORDERS:
            raise ValueError(f"order {order!r}; expected one of {', '.join(ORDERS)}")
        blocks, threads = _triple(grid), _triple(block)
        self._check_block(threads)
        packed = b""
        for parameter, argument in zip(self.parameters, args, strict=True):
            packed = packed.ljust(parameter.offset, b"\0") + _pack(parameter, argument)
        given = np.frombuffer(packed + b"\0", np.uint8).copy()
        spans = _spans([*(a for a in args if isinstance(a, Array)), *buffers], [*readonly, given[:-1]])
        words = [word for span, fixed in spans.items() for word in (*span, fixed)]
        request = _Request(
            parameters=given.ctypes.data,
            buffers=(ctypes.c_uint64 * max(len(words), 1))(*words),
            seed=seed,
            jump_limit=jump_limit,
            grid=(ctypes.c_uint32 * 3)(*blocks),
            block=(ctypes.c_uint32 * 3)(*threads),
            buffer_count=len(spans),
            dynamic_shared=shared,
            order=ORDERS.index(order),
        )
        message = ctypes.create_string_buffer(1000)
        if (number := self._launch(ctypes.byref(request), message, len(message))) >= 0:
            failed = self.body[number]
            raise Fault(f"{self.name}, line {failed.line} `{failed.text}`: {message.value.decode()}")

    def opcodes(self) -> list[str]:
        """Opcodes with every modifier, in the order of the text."""
        return [s.opcode for s in self.body if isinstance(s, Instruction)]

    def _check_block(self, threads: tuple[int, ...]) -> None:
        required = self.limits.get("reqntid")
        if required and threads != _triple(required):
            raise ValueError(f"{self.name}: block {threads}; expected {_triple(required)}")
        most = int(np.prod(self.limits.get("maxntid", (1024,))))
        if not 0 < int(np.prod(threads)) <= min(most, 1024):
            raise ValueError(f"{self.name}: {int(np.prod(threads))} threads a block; expected 1 to {min(most, 1024)}")


def _triple(size: int | Sequence[int]) -> tuple[int, ...]:
    values = (size,) if isinstance(size, int) else tuple(size)
    return (*values, 1, 1)[:3]


def _span(array: Array) -> tuple[int, int]:
    """First byte of an array, and the one behind its last."""
    if isinstance(array, torch.Tensor):
        first, strides, item = (
            array.data_ptr(),
            [s * array.element_size() for s in array.stride()],
            array.element_size(),
        )
    else:
        first, strides, item = array.ctypes.data, list(array.strides), array.itemsize
    if 0 in array.shape:
        return first, first
    reach = [(size - 1) * stride for size, stride in zip(array.shape, strides, strict=True)]
    return first + sum(r for r in reach if r < 0), first + sum(r for r in reach if r > 0) + item


def _spans(arrays: list[Array], readonly: Sequence[Array]) -> dict[tuple[int, int], int]:
    """The buffers with their read-only flag; an array passed twice is one buffer. Raises ``ValueError`` for overlaps."""
    spans = {_span(a): 0 for a in arrays} | {_span(a): 1 for a in readonly}
    ordered = sorted(span for span in spans if span[0] < span[1])
    for (_, end), (begin, _) in pairwise(ordered):
        if begin < end:
            raise ValueError("two buffers share some of their bytes; expected the same array or none of it")
    return {span: spans[span] for span in ordered}


def _pack(parameter: Parameter, value: Any) -> bytes:
    """The bytes of one argument."""
    if isinstance(value, bytes):
        if len(value) != parameter.size:
            raise TypeError(f"{parameter.name}: a struct of {len(value)} bytes; expected {parameter.size}")
        return value
    if value is None or isinstance(value, Array):
        if parameter.size != 8:
            raise TypeError(f"{parameter.name}: an array for a parameter of type {parameter.type}")
        address = 0 if value is None else value.data_ptr() if isinstance(value, torch.Tensor) else value.ctypes.data
        return struct.pack("<Q", address)
    if parameter.type in _FORMATS:
        return struct.pack(_FORMATS[parameter.type], value)
    if not isinstance(value, int | np.integer) or parameter.count:
        raise TypeError(f"{parameter.name}: {value!r} for a parameter of type {parameter.type}")
    bits = 8 * parameter.size
    if not -(1 << bits - 1) <= value < 1 << bits:
        raise TypeError(f"{parameter.name}: {value} does not fit {bits} bits")
    return (int(value) % (1 << bits)).to_bytes(parameter.size, "little")


# ---- compilers ----


def _build(source: str) -> Path:
    """The shared library of a translated kernel; compiled where no earlier run left it."""
    runtime = _runtime()
    target = runtime / f"{_digest(source)}.so"
    if not target.exists():
        _compile(
            target,
            "-shared",
            "-I",
            str(runtime),
            "-x",
            "c++",
            "-",
            "-x",
            "none",
            str(runtime / "runtime.o"),
            source=source,
        )
    return target


@cache
def _runtime() -> Path:
    """A folder for what belongs to this runtime: its object, its header precompiled (half of a kernel's time), kernels."""
    sources = sorted([*HERE.glob("*.h"), *HERE.glob("*.cpp")])
    folder = (
        Path(tempfile.gettempdir())
        / f"ptx-executor-{os.getuid()}"
        / _digest(*(path.read_text() for path in sources), *_FLAGS)
    )
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "runtime.o").exists():
        _compile(folder / "runtime.h.gch", "-x", "c++-header", str(HERE / "runtime.h"))
        _compile(folder / "runtime.o", "-O2", "-r", "-nostdlib", str(HERE / "memory.cpp"), str(HERE / "scheduler.cpp"))
    return folder


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:32]


def _compile(target: Path, *flags: str, source: str = "") -> None:
    unfinished = target.with_name(f"{target.name}.{os.getpid()}")
    command = ["g++", *_FLAGS, *flags, "-o", str(unfinished)]
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PtxError(f"g++ refused the translation: {done.stderr[:2000]}")
    unfinished.replace(target)


def compile_cu(path: Path, arch: str, *flags: str) -> str:
    """The PTX that nvcc makes of a ``.cu`` file for ``arch``, such as ``sm_80``; unfused unless ``flags`` say otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernel.ptx"
        command = ["nvcc", "-ptx", f"-arch={arch}", "-std=c++17", "-fmad=false", *flags, "-o", str(target), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"nvcc: {done.stderr[:2000]}")
        return target.read_text()
