"""What a kernel takes of a GPU, read from its machine code by the cuobjdump of the CUDA toolkit or of triton's wheel.

A row:

    registers, stack, shared    of one thread, of one thread in bytes, of one block in bytes
    spills                      instructions that move registers to local memory or back
    instructions, arithmetic    all in the code; those that are neither memory, control flow nor moves
    loads, stores               of global memory in the code, by width in bits
    constant                    those of the loads that go through the read-only path (``__ldg``), by width in bits
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

Row = dict[str, Any]

_INSTRUCTION: Final = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]+)([.\w]*)")
_NOT_ARITHMETIC: Final = (
    *("LD", "ST", "ULDC", "ATOM", "RED", "CCTL", "MEMBAR", "ERRBAR"),  # memory
    *(
        "BRA",
        "EXIT",
        "BAR",
        "BPT",
        "WARPSYNC",
        "BSSY",
        "BSYNC",
        "CALL",
        "RET",
        "NOP",
        "DEPBAR",
        "ENDCOLLECTIVE",
    ),  # control
    *("MOV", "UMOV", "S2", "CS2R", "R2", "P2R", "SHFL", "VOTE", "PLOP3", "UPLOP3"),  # moves
)
"""How the names of instructions that compute no number begin."""


def cuobjdump() -> str | None:
    """Path of cuobjdump, from PATH or from triton's wheel; None where there is neither."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin or "").parent / "backends/nvidia/bin/cuobjdump" if triton else Path()
    return str(bundled) if bundled.is_file() else None


def read(tool: str, *words: str) -> str:
    """What a tool prints."""
    return subprocess.run([tool, *words], capture_output=True, text=True, check=True).stdout


def instructions(code: str) -> list[tuple[str, str]]:
    """Name and modifiers of every instruction, without the padding behind the last."""
    found = _INSTRUCTION.findall(code)
    while found and found[-1][0] in ("NOP", "BRA"):  # a branch to itself, and what fills the line
        found.pop()
    return found


def _widths(modifiers: Iterable[str]) -> dict[str, int]:
    found: Counter[int] = Counter()
    for text in modifiers:
        match = re.search(r"\.[US]?(8|16|64|128|256)\b", text)
        found[int(match[1]) if match else 32] += 1
    return {str(width): found[width] for width in sorted(found)}


def row(usage: str, code: str) -> Row:
    """The row of one kernel from cuobjdump's words on its resources, and its instructions."""
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
    found = instructions(code)
    names = Counter(name for name, _ in found)
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"],
        "shared": numbers["SHARED"],
        "spills": names["LDL"] + names["STL"],
        "instructions": len(found),
        "arithmetic": sum(count for name, count in names.items() if not name.startswith(_NOT_ARITHMETIC)),
        "loads": _widths(modifiers for name, modifiers in found if name == "LDG"),
        "stores": _widths(modifiers for name, modifiers in found if name == "STG"),
        "constant": _widths(modifiers for name, modifiers in found if name == "LDG" and "CONSTANT" in modifiers),
    }
