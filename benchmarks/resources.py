"""What the compiled kernels take of a GPU: registers, stack, shared memory, and how wide they read and write.

    python -m benchmarks.resources

Read from the machine code in ``bdkernels._cuda``, by the cuobjdump of the CUDA toolkit or of triton's wheel, without a
GPU. The file has one section a compiler, ``{"cuda": {"compiler": ..., "kernels": {kernel: {arch: row}}}, ...}``; a row:

    registers, stack, shared    of one thread, of one thread in bytes, of one block in bytes
    spills                      instructions that move registers to local memory or back
    loads, stores               of global memory in the code, by width in bits

A kernel on ``Any`` goes element by element; every other one must move images 128 bits at a time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

RESULTS: Final = Path(__file__).parent / "results" / "resources.json"
MORE_REGISTERS: Final = 1.1
"""By how much a kernel's registers may grow before it counts as a regression."""

Row = dict[str, Any]
Kernels = dict[str, dict[str, Row]]


def cuobjdump() -> str | None:
    """Path of cuobjdump, from PATH or from triton's wheel; None where there is neither."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin or "").parent / "backends/nvidia/bin/cuobjdump" if triton else Path()
    return str(bundled) if bundled.is_file() else None


def extension() -> Path | None:
    """The built ``bdkernels._cuda``, None where it was not built."""
    found = importlib.util.find_spec("bdkernels._cuda")
    return Path(found.origin) if found and found.origin else None


def compiler() -> str:
    """The release of nvcc on PATH, such as "nvcc 13.0"; empty where there is none."""
    if shutil.which("nvcc") is None:
        return ""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return f"nvcc {match[1]}" if (match := re.search(r"release ([\d.]+)", said)) else ""


def _read(tool: str, *words: str) -> str:
    return subprocess.run([tool, *words], capture_output=True, text=True, check=True).stdout


def architectures(tool: str, binary: Path) -> list[str]:
    """Those that ``binary`` has machine code of, the oldest first."""
    return sorted(
        set(re.findall(r"\.(sm_\d+)\.cubin", _read(tool, "--list-elf", str(binary)))), key=lambda a: int(a[3:])
    )


def readable(symbol: str) -> str:
    """``step_kernel<float, Bfloat16, false, true>`` of a mangled name."""
    name = _read("c++filt", symbol).strip()
    match = re.search(r"(\w+)(<[^()]*>)?\(", name)
    return re.sub(r"\bbdk::(cuda::)?", "", match[1] + (match[2] or "")) if match else symbol


def widths(code: str, kind: str) -> dict[str, int]:
    """How many instructions of one kind (``LDG``, ``STG``) there are of each width in bits."""
    found: Counter[int] = Counter()
    for modifiers in re.findall(rf"\b{kind}((?:\.\w+)*) ", code):
        match = re.search(r"\.[US]?(8|16|64|128)\b", modifiers)
        found[int(match[1]) if match else 32] += 1
    return {str(width): found[width] for width in sorted(found)}


def row(usage: str, code: str) -> Row:
    """The row of one kernel from cuobjdump's words on its resources, and its instructions."""
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"],
        "shared": numbers["SHARED"],
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "loads": widths(code, "LDG"),
        "stores": widths(code, "STG"),
    }


def measure(tool: str, binary: Path, arch: str) -> dict[str, Row]:
    """The row of every kernel in ``binary`` for ``arch``."""
    usage = _read(tool, "-arch", arch, "-res-usage", str(binary))
    code = _read(tool, "-arch", arch, "-sass", str(binary))
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
    flat = re.sub(r'\{\s*"registers"[^{}]*(?:\{[^{}]*\}[^{}]*)*\}', lambda match: " ".join(match[0].split()), text)
    file.write_text(flat + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures every kernel on every architecture of the build, prints and writes the table; 1 where a tool is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__.split("\n")[0])
    parser.parse_args(arguments)
    tool, binary = cuobjdump(), extension()
    if tool is None or binary is None:
        missing = "cuobjdump (pip install triton)" if tool is None else "bdkernels._cuda (install nvcc, build again)"
        print(f"{missing} was not found: nothing to measure", file=sys.stderr)
        return 1
    kernels: Kernels = {}
    for arch in architectures(tool, binary):
        for name, found in measure(tool, binary, arch).items():
            kernels.setdefault(name, {})[arch] = found
            print(f"{name:48} {arch:7} {found}")
    write("cuda", {"compiler": compiler(), "kernels": kernels})
    return 0


if __name__ == "__main__":
    sys.exit(main())
