"""Writes the README's tables of results from the files in ``benchmarks/results``.

    python -m benchmarks.tables

A table stands between ``<!-- results: FILE -->`` and ``<!-- end -->``: a line an op and shape, a column a provider, ns per
element, or images a second of ops that are told so, and in brackets its time relative to ours; calculated ones have a c.
Files of ``benchmarks.scale``, ``attacks``, ``detection`` and ``repairs`` make a line an axis, a model, a detector, and a kind
of attack.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from bdengine.errors import UserError
from bdengine.files import read_json, write_atomic

from . import attacks, detection, repairs
from .bench import PROVIDERS
from .report import PER_SECOND, Row, argument_parser, exit_code, fastest, of_row
from .scale import Growth

ROOT: Final = Path(__file__).parents[1]
RESULTS: Final = ROOT / "benchmarks" / "results"
_BLOCK: Final = re.compile(r"(<!-- results: (?P<file>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(measured: Sequence[Row]) -> str:
    """The table of ``measured``, with ours in bold."""
    names = [name for name in PROVIDERS if any(row.provider == name for row in measured)]
    unit = f", {PER_SECOND.replace('_per_', '/')}" if any(PER_SECOND in row.more for row in measured) else ""
    lines = [f"| op, float32{unit} | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for op, shape in dict.fromkeys((row.op, tuple(row.shape)) for row in measured):
        here = {row.provider: row for row in measured if (row.op, tuple(row.shape)) == (op, shape)}
        ours = fastest([*here.values()])
        if ours is None:
            raise UserError(f"{op} has no row of ours: expected one")
        cells = [_cell(here[name], ours) if name in here else "—" for name in names]
        lines.append(f"| `{op}` {'x'.join(map(str, shape))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Row, ours: Row) -> str:
    digits = 2 if ours.ns_per_element < 100 else 0
    speed = row.more.get(PER_SECOND)
    text = f"{row.ns_per_element:.{digits}f}" if speed is None else f"{speed:.3g}" if speed < 1000 else f"{speed:.0f}"
    if row.more.get("calculated"):
        text += "c"
    if row is ours:
        return f"**{text}**"
    ratio = row.ns_per_element / ours.ns_per_element
    return f"{text} ({ratio:.{1 if digits else 2}f}x)"


def curves(grown: Sequence[Growth]) -> str:
    """The table of cost curves."""
    lines = ["| measured | sizes | values | exponent | expected |", "| --- | --- | --- | ---: | ---: |"]
    for g in grown:
        sizes, values = ", ".join(map(str, g.sizes)), ", ".join(f"{value:.3g}" for value in g.values)
        error = "" if g.error is None else f" ± {g.error:.2f}"
        exponent = f"{g.exponent:.2f}".replace("-0.00", "0.00")
        lines.append(f"| {g.of}, by {g.axis} | {sizes} | {values} {g.unit} | {exponent}{error} | {g.expected:g} |")
    return "\n".join(lines)


TABLES: Final[dict[str, Callable[[dict[str, Any]], str]]] = {
    "rows": lambda document: markdown([of_row(row) for row in document["rows"]]),
    "growth": lambda document: curves([Growth(**row) for row in document["growth"]]),
    "detectors": detection.table,
    "kinds": repairs.table,
    "attacks": attacks.table,
}
"""What makes the table of a document, by a key that it has."""


def filled(text: str) -> str:
    """``text`` with every table made anew.

    Raises:
        UserError: A table's file is not there.
    """

    def block(found: re.Match[str]) -> str:
        document = read_json(RESULTS / found["file"])
        made = next(make(document) for key, make in TABLES.items() if key in document)
        return f"{found[1]}{made}\n{found[3]}"

    return _BLOCK.sub(block, text)


def main() -> int:
    """Entry point; returns 2 where a file is missing, 130 after Ctrl-C."""
    argument_parser("tables", __doc__).parse_args()
    readme = ROOT / "README.md"
    return exit_code(lambda: write_atomic(readme, filled(readme.read_text())), "it begins anew")


if __name__ == "__main__":
    sys.exit(main())
