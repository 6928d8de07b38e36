"""What this machine has and what will run on it: ``python -m bdkernels.env [--selfcheck] [--json]``.

The self-check runs every op of every backend that is present against the reference, in float32, bfloat16 and float16,
bit for bit (a loss: at most twice as wrong), and the reference's noise against the NumPy contract. It exits with 1
where one differs. Only the standard library is imported up front, so a broken torch is reported rather than raised.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

VECTOR_FLAGS: Final = (
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_bf16", "neon", "asimd", "sve", "sve2",
)  # fmt: skip
"""The names, as Linux gives them, of the vector instructions worth telling."""


@dataclass(frozen=True)
class Check:
    """One line of the self-check; ``error`` is empty where all is well."""

    backend: str
    op: str
    dtype: str
    error: str

    def __str__(self) -> str:
        return f"{'FAIL' if self.error else 'ok':5} {self.backend:14} {self.op:14} {self.dtype:9} {self.error}".rstrip()


def found() -> dict[str, str | int]:
    """Every finding by name, each a string or a number; a probe that fails says why in its place."""
    probes: dict[str, Callable[[], str | int]] = {
        "python": platform.python_version,
        "os": lambda: f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu,
        "cores": _cores,
        "vector": _vector,
        "torch": _torch,
        "threads": _threads,
        "numpy": lambda: _version("numpy"),
        "diffusers": lambda: _version("diffusers"),
        "triton": lambda: _version("triton"),
        "nvcc": _nvcc,
        "cuda": _cuda,
        "native": _native,
        "cpu tensors run on": partial(_runs, "cpu"),
        "cuda tensors run on": partial(_runs, "cuda"),
    }
    return {name: _guarded(probe) for name, probe in probes.items()}


def _guarded(probe: Callable[[], str | int]) -> str | int:
    """What ``probe`` found, or its failure in one line: no broken package may hide the rest."""
    try:
        return probe()
    except ModuleNotFoundError as error:
        return f"not installed ({error.name})"
    except Exception as error:
        return f"broken ({_line(error)})"


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _cpuinfo(*fields: str) -> str:
    """The first value of one of ``fields`` in ``/proc/cpuinfo``, empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    match = re.search(rf"^(?:{'|'.join(fields)})\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else ""


def _cpu() -> str:
    if sys.platform == "darwin":
        return _run("sysctl", "-n", "machdep.cpu.brand_string")
    return _cpuinfo("model name", "Model", "Hardware") or platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _vector() -> str:
    flags = _cpuinfo("flags", "Features").split()
    return " ".join(f for f in VECTOR_FLAGS if f in flags) or "unknown"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def _nvcc() -> str:
    if shutil.which("nvcc") is None:
        return "not found"
    match = re.search(r"release ([\d.]+)", _run("nvcc", "--version"))
    return match[1] if match else "found, version unknown"


def _torch() -> str:
    import torch

    return str(torch.__version__)


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        return "no device"
    names = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        names.append(f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})")
    return ", ".join(names)


def _native() -> str:
    from bdkernels import native

    return native.isa() if native.available() else f"missing: {native.reason()}"


def _runs(device: str) -> str:
    """Name of the backend that float32 tensors on ``device`` will run on, or why there are none."""
    import torch

    from bdkernels import backends

    if device == "cuda" and not torch.cuda.is_available():
        return "no device"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return backends.name_for(torch.device(device), torch.float32)


def self_check() -> Iterator[Check]:
    """The self-check, one result per backend, op and dtype; a backend that is not present is left out."""
    try:
        from bdkernels import backends, testing
    except Exception as error:
        yield Check("reference", "import", "", _line(error))
        return
    yield Check("reference", "normal", "float32", _failure(_check_contract))
    for backend in backends.BACKENDS:
        if backend == "reference" or backends.missing(backend):
            continue
        for op in testing.OPS:
            for dtype in testing.DTYPES:
                failure = _failure(partial(_check_op, backend, op, dtype))
                yield Check(backend, op, str(dtype).removeprefix("torch."), failure)


def _failure(check: Callable[[], None]) -> str:
    """The message of what ``check`` raises, empty where it passes: a crash is as wrong as a wrong number."""
    try:
        check()
    except Exception as error:
        return _line(error)
    return ""


def _check_contract() -> None:
    import torch

    from bdkernels import noise, reference, testing

    shape, seeds = (3, 31, 33), torch.arange(-8, 8) * 0x1234567890AB
    got = reference.normal(seeds, torch.tensor(2**32 - 1), noise.STREAM_POISON, shape, torch.float32)
    expected = noise.normal(seeds.numpy(), shape, 2**32 - 1, noise.STREAM_POISON)
    testing.assert_same_bits("normal", got, torch.from_numpy(expected))


def _check_op(backend: str, op: str, dtype: torch.dtype) -> None:
    """``op`` against the reference: with and without every option, odd sizes, a NaN from the network."""
    import torch

    from bdkernels import backends, testing

    generator = torch.Generator().manual_seed(0)
    for shape in ((5, 3, 7, 9), (33, 3, 32, 32), (1, 1, 1, 1)):
        for full in (True, False):
            case = testing.random_case(op, generator, shape, dtype, full)
            if "model_output" in case:
                case["model_output"][shape[0] // 2, 0, 0, 0] = torch.nan
            with backends.use_backend(backend):
                testing.assert_matches_reference(op, case, backends.serves(backend))


def main(arguments: Sequence[str] | None = None, prog: str = "python -m bdkernels.env") -> int:
    """Prints the findings, and the self-check where asked; 1 where it failed.

    Args:
        arguments: Words of the command line, `sys.argv`'s where absent.
        prog: The command that its help and its mistakes name.
    """
    parser = argparse.ArgumentParser(prog=prog, description="What was found on this machine, and what will run.")
    parser.add_argument("--selfcheck", action="store_true", help="prove every present backend against the reference")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    options = parser.parse_args(arguments)
    findings = found()
    checks: list[Check] = []
    if not options.json:
        print("\n".join(f"{name:19} {value}" for name, value in findings.items()))
    for check in self_check() if options.selfcheck else ():
        checks.append(check)
        if not options.json:
            print(check, flush=True)
    if options.json:
        results = {"selfcheck": [asdict(c) for c in checks]} if options.selfcheck else {}
        print(json.dumps(findings | results, indent=2))
    return int(any(c.error for c in checks))


if __name__ == "__main__":
    sys.exit(main())
