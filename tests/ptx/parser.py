"""PTX text to a module: its variables and, per entry, parameters, registers and statements.

Everything is read or refused: a directive or declaration this grammar does not know raises :class:`PtxError`. Source
positions (``.loc``, ``.file``) and debug sections say nothing of what a kernel computes and are dropped.
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_left
from dataclasses import dataclass, field
from functools import cache
from typing import Final

SIZES: Final = {
    **{f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)},
    **{"f16": 2, "bf16": 2, "f32": 4, "f64": 8, "f16x2": 4, "bf16x2": 4, "f32x2": 8, "pred": 1},
}
_WORD: Final = r"[\w$%]+"
_LINKAGE: Final = r"(?:\.(?:visible|weak|common)\s+)*"
_FUNCTION: Final = re.compile(rf"{_LINKAGE}(?:\.extern\s+)?{_LINKAGE}\.(entry|func)\b")
_PARAMETER: Final = re.compile(
    r"\.param\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+"
    r"(?:\.ptr\s+(?:\.(?:global|const|shared|local)\s+)?(?:\.align\s+\d+\s+)?)?"
    rf"(?P<name>{_WORD})(?:\[(?P<count>\d+)\])?$"
)
_VARIABLE: Final = re.compile(
    rf"{_LINKAGE}(?P<extern>\.extern\s+)?\.(?P<space>global|const|shared|local)\s+(?:\.align\s+(?P<align>\d+)\s+)?"
    rf"\.(?P<type>\w+)\s+(?P<name>{_WORD})(?P<dims>(?:\[\d*\])*)\s*(?:=\s*(?P<data>.*))?$",
    re.S,
)
_REGISTER: Final = re.compile(rf"({_WORD})(?:<(\d+)>)?$")
_LABEL: Final = re.compile(rf"({_WORD})\s*:(?!:)")
_INSTRUCTION: Final = re.compile(rf"(?:@(!?\s*{_WORD})\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)
_NAME: Final = re.compile(r"(?<![\w$%.])[%A-Za-z_$][\w$]*")
_DIRECTIVE: Final = re.compile(r"\.(maxntid|reqntid|minnctapersm|maxnreg|noreturn)\b\s*([\d, ]*)")


class PtxError(Exception):
    """PTX that is not understood: the text, and where it stands."""


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter: ``count`` is 0 for a scalar, the number of bytes for a struct passed by value."""

    name: str
    type: str
    offset: int
    size: int
    count: int


@dataclass(frozen=True)
class Variable:
    """A variable in memory; ``size`` is 0 for the shared array whose size the launch gives."""

    name: str
    space: str
    align: int
    size: int
    data: bytes


@dataclass(frozen=True)
class Label:
    name: str


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple[str, ...]
    guard: str
    line: int
    text: str


@dataclass
class Entry:
    name: str
    parameters: list[Parameter]
    limits: dict[str, tuple[int, ...]]
    registers: dict[str, str] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    body: list[Label | Instruction] = field(default_factory=list)


@dataclass
class Module:
    entries: dict[str, Entry] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)


def split_operands(text: str) -> list[str]:
    """Commas at depth 0 separate operands: ``{a, b}, [c]`` has two."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts] if text.strip() else []


@cache
def parse(text: str) -> Module:
    """The module that a PTX file holds, read once. Raises :class:`PtxError` for anything outside the grammar."""
    text = _strip(text)
    module, at = Module(), 0
    while match := re.compile(r"\S").search(text, at):
        at = match.start()
        if match := re.compile(r"\.(version|target|address_size)\b[^\n]*").match(text, at):
            at = match.end()
        elif match := _FUNCTION.match(text, at):
            opening = re.compile(r"[{;]").search(text, at)
            if opening is None:
                raise PtxError(f"line {_line(text, at)}: the function has no body")
            end = _closing_brace(text, opening.start()) if opening[0] == "{" else opening.start()
            if match[1] == "entry":
                entry = _entry(text, match.end(), opening.start(), end)
                module.entries[entry.name] = entry
            at = end + 1
        else:
            end = _semicolon(text, at)
            module.variables.append(_variable(text[at:end], _line(text, at)))
            at = end + 1
    return module


def _strip(text: str) -> str:
    """Without comments, positions and debug sections; every line keeps its number."""

    def newlines(match: re.Match[str]) -> str:
        return "\n" * match[0].count("\n")

    for pattern in (r"/\*.*?\*/", r"//[^\n]*", r"(?<=\n)[ \t]*\.(?:loc|file)\b[^\n]*", r"\.section\s+\S+\s*\{[^}]*\}"):
        text = re.sub(pattern, newlines, text, flags=re.S)
    return text


@cache
def _line_ends(text: str) -> list[int]:
    return [match.start() for match in re.finditer("\n", text)]


def _line(text: str, at: int) -> int:
    return bisect_left(_line_ends(text), at) + 1


def _semicolon(text: str, at: int) -> int:
    end = text.find(";", at)
    if end < 0:
        raise PtxError(f"line {_line(text, at)}: no `;` after `{text[at : at + 40].strip()}`")
    return end


def _closing_brace(text: str, at: int) -> int:
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, at):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    raise PtxError(f"line {_line(text, at)}: the brace is never closed")


def _align(offset: int, to: int) -> int:
    return -(-offset // to) * to


def _entry(text: str, start: int, opening: int, end: int) -> Entry:
    header = re.match(rf"\s*({_WORD})\s*(?:\(([^)]*)\))?(.*)$", text[start:opening], re.S)
    if header is None:
        raise PtxError(f"line {_line(text, start)}: the entry has no name")
    limits = {
        name: tuple(int(n) for n in numbers.split(",") if n.strip()) for name, numbers in _DIRECTIVE.findall(header[3])
    }
    if rest := _DIRECTIVE.sub("", header[3]).strip():
        raise PtxError(f"line {_line(text, start)}: unknown directive `{rest}`")
    entry = Entry(header[1], _parameters(header[2] or ""), limits)
    _body(entry, text, opening + 1, end)
    return entry


def _parameters(text: str) -> list[Parameter]:
    parameters, offset = [], 0
    for declaration in split_operands(text):
        match = _PARAMETER.match(declaration)
        if match is None or match["type"] not in SIZES:
            raise PtxError(f"unknown parameter `{declaration}`")
        size, count = SIZES[match["type"]], int(match["count"] or 0)
        offset = _align(offset, int(match["align"] or size))
        parameters.append(Parameter(match["name"], match["type"], offset, size * max(count, 1), count))
        offset += size * max(count, 1)
    return parameters


def _variable(text: str, line: int) -> Variable:
    match = _VARIABLE.match(text.strip())
    if match is None or match["type"] not in SIZES:
        raise PtxError(f"line {line}: unknown declaration `{text.strip()}`")
    size, count = SIZES[match["type"]], 1
    for dimension in re.findall(r"\[(\d*)\]", match["dims"]):
        count *= int(dimension or 0)
    values = [v.strip() for v in (match["data"] or "").strip("{} \n\t").split(",") if v.strip()]
    data = b"".join(_initial(value, size, line) for value in values)
    return Variable(match["name"], match["space"], int(match["align"] or size), size * count, data)


def _initial(value: str, size: int, line: int) -> bytes:
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", value):
        return int(value[2:], 16).to_bytes(size, "little")
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", value):
        return struct.pack("<Q", int(value.rstrip("U"), 0) & (1 << 64) - 1)[:size]
    raise PtxError(f"line {line}: initial value `{value}`; expected a number")


def _body(entry: Entry, text: str, at: int, end: int) -> None:
    """Fills registers, variables and statements. A name of an inner ``{ }`` gets a suffix, so names are unique."""
    scopes: list[dict[str, tuple[str, str, int]]] = [{}]
    suffixes, opened = [""], 0

    def unique(match: re.Match[str]) -> str:
        name = match[0]
        stem, number = re.fullmatch(r"(.*?)(\d*)", name).groups()  # type: ignore[union-attr]
        for scope in reversed(scopes):
            if name in scope and scope[name][2] < 0:
                found, kind, _ = scope[name]
            elif number and stem in scope and int(number) < scope[stem][2]:
                found, kind = scope[stem][0] + number, scope[stem][1]
            else:
                continue
            entry.registers[found] = kind
            return found
        return name

    while match := re.compile(r"\S").search(text, at, end):
        at, line = match.start(), _line(text, match.start())
        if text[at] in "{}":
            if text[at] == "{":
                opened += 1
                scopes.append({})
                suffixes.append(f"__{opened}")
            else:
                scopes.pop()
                suffixes.pop()
            at += 1
            continue
        if match := _LABEL.match(text, at, end):
            if Label(match[1]) in entry.body:
                raise PtxError(f"line {line}: the label `{match[1]}` stands twice")
            entry.body.append(Label(match[1]))
            at = match.end()
            continue
        stop = _semicolon(text, at)
        statement = " ".join(text[at:stop].split())
        at = stop + 1
        if match := re.match(r"\.reg\s+\.(\w+)\s+(.*)$", statement):
            if match[1] not in SIZES:
                raise PtxError(f"line {line}: registers of type `{match[1]}`")
            for declared in split_operands(match[2]):
                name, count = _REGISTER.match(declared).groups()  # type: ignore[union-attr]
                scopes[-1][name] = (name + suffixes[-1] + ("_" if count else ""), match[1], int(count or -1))
        elif statement.startswith((".shared", ".local", ".const", ".global")):
            entry.variables.append(_variable(statement, line))
        elif statement == '.pragma "nounroll"':
            continue
        elif match := _INSTRUCTION.match(statement):
            guard = _NAME.sub(unique, (match[1] or "").replace(" ", ""))
            operands = tuple(_NAME.sub(unique, operand) for operand in split_operands(match[3]))
            entry.body.append(Instruction(match[2], operands, guard, line, statement))
        elif statement:
            raise PtxError(f"line {line}: unknown statement `{statement}`")
