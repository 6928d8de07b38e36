"""A sampler written as its formulas, laid out as rows of a table.

    tape = Tape("euler")
    for now, after in pairs(nodes):
        x, m, x0 = tape.evaluate(time, a=1 / alpha, b=-sigma / alpha)        x0 = clamp(a x + b m)
        tape.advance(p * x + q * x0, noise)                                  x' = clamp(p x + q x0 + noise z)

``x``, ``m`` and ``x0`` are symbols of their row; sums of them, also of those of earlier rows, are written with + - * /.
What a later row reads is kept in a history slot from the row that made it to the last that reads it; symbols of one row that
only one later row reads, as their sum. A sum over several earlier symbols that is needed again is named by `Tape.keep`,
which keeps one tensor in their place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from bdkernels import HISTORY_SLOTS, STORE_COLUMNS, STORES, Step, Store

from .table import End, Table, blank

X: Final = "x"
M: Final = "m"
X0: Final = "x0"
_NEXT = {X: Step.P, X0: Step.Q, M: Step.S}
_KEPT = {X: Store.E, M: Store.F, X0: Store.G}


@dataclass(frozen=True)
class Symbol:
    """A tensor of one row: its ``x``, ``m``, ``x0``, or a kept sum (named by its number)."""

    row: int
    name: str


@dataclass(frozen=True)
class Sum:
    """A linear combination of symbols."""

    terms: dict[Symbol, float]

    def __add__(self, other: Sum) -> Sum:
        return Sum({s: self.terms.get(s, 0.0) + other.terms.get(s, 0.0) for s in {**self.terms, **other.terms}})

    def __sub__(self, other: Sum) -> Sum:
        return self + -1.0 * other

    def __rmul__(self, factor: float) -> Sum:
        return Sum({s: factor * v for s, v in self.terms.items()})

    def __truediv__(self, divisor: float) -> Sum:
        return (1.0 / divisor) * self


@dataclass
class _Row:
    a: float
    b: float
    scale: float
    time: float
    after: Sum = field(default_factory=lambda: Sum({}))
    noise: float = 0.0


class Tape:
    """Rows being written; see the module."""

    def __init__(self, name: str, end: End = "zero") -> None:
        self.name, self.end = name, end
        self._rows: list[_Row] = []
        self._kept: dict[Symbol, Sum] = {}

    def evaluate(self, time: float, a: float, b: float, *, scale: float = 1.0) -> tuple[Sum, Sum, Sum]:
        """A network evaluation ``m = network(scale x, time)``.

        Returns:
            ``x``, ``m`` and ``x0 = clamp(a x + b m)`` of the new row.
        """
        self._rows.append(_Row(a, b, scale, time))
        return self._symbol(X), self._symbol(M), self._symbol(X0)

    def _symbol(self, name: str) -> Sum:
        return Sum({Symbol(len(self._rows) - 1, name): 1.0})

    def keep(self, value: Sum) -> Sum:
        """``value``, to be kept as one tensor for later rows; in this row it reads as itself."""
        symbol = Symbol(len(self._rows) - 1, str(len(self._kept)))
        self._kept[symbol] = value
        return Sum({symbol: 1.0})

    def advance(self, value: Sum, noise: float = 0.0) -> None:
        """End the row: ``x' = value + noise z``."""
        self._rows[-1].after, self._rows[-1].noise = value, noise

    def table(self) -> Table:
        """The rows.

        Raises:
            AssertionError: The sampler needs more slots, or stores a row, than the kernel has.
        """
        self._merge()
        rows = blank([line.time for line in self._rows])
        kept = self._last_uses()
        slots: list[Symbol | None] = [None] * HISTORY_SLOTS
        for k, (row, line) in enumerate(zip(rows, self._rows, strict=True)):
            row[[Step.A, Step.B, Step.IN, Step.Z]] = line.a, line.b, line.scale, line.noise
            for symbol, value in self._here(line.after, k).terms.items():
                row[_NEXT[symbol.name] if symbol.row == k else Step.H + slots.index(symbol)] += value
            read = list(slots)
            slots = [s if s is not None and kept[s] > k else None for s in slots]
            new = [s for s in kept if s.row == k]
            assert len(new) <= STORES, f"{self.name} stores {len(new)} tensors in row {k}"
            for i, symbol in enumerate(new):
                free = slots.index(None)
                slots[free] = symbol
                store = row[Step.STORE + i * STORE_COLUMNS :][:STORE_COLUMNS]
                store[Store.SLOT] = free
                for part, value in self._here(self._kept.get(symbol, Sum({symbol: 1.0})), k).terms.items():
                    store[_KEPT[part.name] if part.row == k else Store.J + read.index(part)] += value
        return Table(rows, self.name, end=self.end)

    def _merge(self) -> None:
        """Keep symbols of one row that the same one row reads as their sum: a slot less to write and to read."""
        readers: dict[Symbol, set[int | None]] = {}
        for symbol, value in self._kept.items():
            for s in value.terms:
                readers.setdefault(s, set()).update([None] if s.row < symbol.row else [])
        for k, line in enumerate(self._rows):
            for s in line.after.terms:
                readers.setdefault(s, set()).update([k] if s.row < k else [])
        for k, line in enumerate(self._rows):
            for row in sorted({s.row for s in line.after.terms} - {k}):
                group = {s: v for s, v in line.after.terms.items() if s.row == row}
                if len(group) > 1 and all(who <= {k} for s, who in readers.items() if s.row == row):
                    symbol = Symbol(row, str(len(self._kept)))
                    self._kept[symbol] = Sum(group)
                    line.after = Sum({s: v for s, v in line.after.terms.items() if s.row != row} | {symbol: 1.0})

    def _here(self, value: Sum, row: int) -> Sum:
        """``value`` with the sums that are kept in this row, and so in no slot yet, written out."""
        out = Sum({})
        for symbol, factor in value.terms.items():
            inner = self._kept.get(symbol) if symbol.row == row else None
            out = out + (Sum({symbol: factor}) if inner is None else factor * self._here(inner, row))
        return Sum({s: v for s, v in out.terms.items() if v != 0})

    def _last_uses(self) -> dict[Symbol, int]:
        """The last row that reads each symbol of an earlier row."""
        used: dict[Symbol, int] = {}
        for k in reversed(range(len(self._rows))):
            values = [self._here(self._rows[k].after, k)]
            values += [self._here(v, k) for s, v in self._kept.items() if s.row == k and s in used]
            for value in values:
                for symbol in value.terms:
                    if symbol.row < k:
                        used.setdefault(symbol, k)
        return dict(sorted(used.items(), key=lambda item: item[0].row))
