"""What the kernels of both GPU backends take of a GPU, and what that is worth, without a GPU.

    python -m benchmarks.resources

CUDA C++ is read from ``bdkernels._cuda``, Triton is compiled for each architecture; a row is that of ``machine_code.py``. The
file has a section a compiler, ``{"cuda": {"compiler": ..., "kernels": {kernel: {arch: row}}}, "triton": {...}}``, and
``calculated``, the figures of ``roofline.py``.

A CUDA kernel on ``Any`` goes element by element; every other one must move images 128 bits at a time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from . import roofline
from .machine_code import Row, cuobjdump, read, row

RESULTS: Final = Path(__file__).parent / "results" / "resources.json"
MORE_REGISTERS: Final = 1.1
"""By how much a kernel's registers may grow before it counts as a regression."""

Kernels = dict[str, dict[str, Row]]


def extension() -> Path | None:
    """The built ``bdkernels._cuda``, None where it was not built."""
    found = importlib.util.find_spec("bdkernels._cuda")
    return Path(found.origin) if found and found.origin else None


def compiler() -> str:
    """The release of nvcc on PATH, such as "nvcc 13.0"; empty where there is none."""
    if shutil.which("nvcc") is None:
        return ""
    said = read("nvcc", "--version")
    return f"nvcc {match[1]}" if (match := re.search(r"release ([\d.]+)", said)) else ""


def architectures(tool: str, binary: Path) -> list[str]:
    """Those that ``binary`` has machine code of, the oldest first."""
    return sorted(
        set(re.findall(r"\.(sm_\d+)\.cubin", read(tool, "--list-elf", str(binary)))), key=lambda a: int(a[3:])
    )


def readable(symbol: str) -> str:
    """``step_kernel<float, Bfloat16, false, true>`` of a mangled name."""
    name = read("c++filt", symbol).strip()
    match = re.search(r"(\w+)(<[^()]*>)?\(", name)
    return re.sub(r"\bbdk::(cuda::)?", "", match[1] + (match[2] or "")) if match else symbol


def measure(tool: str, binary: Path, arch: str) -> dict[str, Row]:
    """The row of every kernel in ``binary`` for ``arch``."""
    usage = read(tool, "-arch", arch, "-res-usage", str(binary))
    code = read(tool, "-arch", arch, "-sass", str(binary))
    usages = dict(re.findall(r"Function (\w+):\s*\n\s*(.*)", usage))
    codes = {part.split(None, 1)[0]: part for part in re.split(r"Function : ", code)[1:]}
    return {readable(symbol): row(usages[symbol], codes[symbol]) for symbol in sorted(codes)}


def regressions(committed: dict[str, Row], fresh: dict[str, Row]) -> list[str]:
    """In what ``fresh`` is worse than ``committed``, a sentence each; a kernel that one of them lacks is one, too."""
    found = [f"{name} is in one of the two only" for name in sorted(committed.keys() ^ fresh.keys())]
    for name in sorted(committed.keys() & fresh.keys()):
        before, now = committed[name], fresh[name]
        if now["registers"] > MORE_REGISTERS * before["registers"]:
            found.append(f"{name} has {now['registers']} registers: expected about {before['registers']}")
        found += [f"{name} has {what} {now[what]}: expected none" for what in ("stack", "spills") if now[what]]
        for kind in ("loads", "stores"):
            for width in ("8", "16", "32", "64"):
                if now[kind].get(width, 0) > before[kind].get(width, 0):
                    counts = f"{now[kind][width]} {kind} of {width} bits"
                    found.append(f"{name} has {counts}: expected {before[kind].get(width, 0)}")
    return found


def write(section: str, content: dict[str, Any], file: Path = RESULTS) -> None:
    """Replaces one compiler's section of the file, a row on each line."""
    sections = json.loads(file.read_text()) if file.exists() else {}
    sections[section] = content
    text = json.dumps(sections, indent=1)
    flat = re.sub(
        r'\{\s*"(?:registers|backend)"[^{}]*(?:\{[^{}]*\}[^{}]*)*\}', lambda match: " ".join(match[0].split()), text
    )
    file.write_text(flat + "\n")


def cuda_kernels(tool: str, binary: Path) -> Kernels:
    """The row of every kernel in ``binary`` on every architecture of the build."""
    kernels: Kernels = {}
    for arch in architectures(tool, binary):
        for name, found in measure(tool, binary, arch).items():
            kernels.setdefault(name, {})[arch] = found
    return kernels


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures every kernel of both backends, writes the file and prints the calculated table; 1 where a tool is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__.split("\n")[0])
    parser.parse_args(arguments)
    tool, binary = cuobjdump(), extension()
    if tool is None or binary is None or importlib.util.find_spec("triton") is None:
        missing = "bdkernels._cuda (install nvcc, build again)" if binary is None else "triton (pip install triton)"
        print(f"{missing} was not found: nothing to measure", file=sys.stderr)
        return 1
    import triton

    from .resources_triton import resources

    kernels = {"cuda": cuda_kernels(tool, binary), "triton": resources()}
    write("cuda", {"compiler": compiler(), "kernels": kernels["cuda"]})
    write("triton", {"compiler": f"triton {triton.__version__}", "kernels": kernels["triton"]})
    figures = roofline.calculated(kernels)
    write("calculated", {"elements": roofline.ELEMENTS, "figures": figures})
    print(roofline.table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
