"""One entry of a PTX module to C++: an instruction is a row of a table, or a function where its form is its own.

A row says what the operands are and what is computed of them. ``mul.wide.s32 %rd1, %r2, 4`` becomes::

    { using T = s32; using W = s64; const T a = get<T>(r._r2); const T b = T(4); put<W>(r._rd1, W(a) * W(b), r._r2.unset); }

An opcode, type or modifier without a row raises :class:`PtxError`; so does every approximate instruction, whose bits no
manual defines.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from tests.ptx import instructions as isa
from tests.ptx.parser import SIZES, Entry, Instruction, Label, Module, PtxError, Variable, split_operands


class Translator:
    """Builds the C++ of one entry; :meth:`source` is the whole file."""

    def __init__(self, module: Module, entry: Entry) -> None:
        self.entry = entry
        self.globals: list[Variable] = []
        self.symbols = {p.name: f"u64(t.parameters() + {p.offset})" for p in entry.parameters}
        self.bytes = {"shared": 0, "local": 0}
        self.sites = 0
        self.seen: set[str] = set()
        self.labels = {s.name for s in entry.body if isinstance(s, Label)}
        self._place([*module.variables, *entry.variables])

    def _place(self, variables: list[Variable]) -> None:
        for v in variables:
            if v.space in ("global", "const"):
                self.symbols[v.name] = f"u64(kVariable{len(self.globals)})"
                self.globals.append(v)
            elif v.size:
                offset = -(-self.bytes[v.space] // v.align) * v.align
                self.symbols[v.name] = f"{offset}"
                self.bytes[v.space] = offset + v.size
        dynamic = (
            f"{-(-self.bytes['shared'] // 16) * 16}"  # the array whose size the launch gives lies behind the others
        )
        self.symbols |= {v.name: dynamic for v in variables if v.space == "shared" and not v.size}

    # ---- operands ----

    def register(self, name: str) -> str:
        if name not in self.entry.registers:
            raise PtxError(f"`{name}` is not a register")
        return "r." + re.sub(r"\W", "_", name)

    def value(self, operand: str, kind: str) -> str:
        """A C++ expression of the operand as a value of PTX type ``kind``."""
        if kind == "pred":
            name = operand.removeprefix("!")
            if name in ("0", "1", "-1"):
                return f"bool({name})"
            return ("!" if operand.startswith("!") else "") + f"get<bool>({self.register(name)})"
        if operand in self.entry.registers:
            held = self.entry.registers[operand]
            if held == "pred" or SIZES[held] < SIZES[kind] or (kind in isa.FLOATS and SIZES[held] != SIZES[kind]):
                raise PtxError(f"`{operand}` holds {held}; expected {kind}")
            return f"get<{kind}>({self.register(operand)})"
        return self.constant(operand, kind)

    def constant(self, operand: str, kind: str) -> str:
        word = f"b{8 * SIZES[kind]}"
        if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", operand):
            digits = match[1] or match[2]
            if len(digits) != 2 * SIZES[kind]:
                raise PtxError(f"`{operand}` is not of type {kind}")
            return f"of_bits<{kind}>({word}(0x{digits}ull))"
        if kind in ("f32", "f64") and re.fullmatch(r"-?\d+\.\d*(e[-+]?\d+)?", operand):
            return f"{kind}({operand}{'f' if kind == 'f32' else ''})"
        if isa.INTEGER.match(operand) and kind not in isa.FLOATS:
            return f"{kind}({int(operand.rstrip('U'), 0) & (1 << 8 * SIZES[kind]) - 1:#x}ull)"
        if operand in isa.SPECIAL and kind in ("u32", "b32", "s32"):
            return f"{kind}({isa.SPECIAL[operand]})"
        if operand in self.symbols and SIZES[kind] >= 4:
            return f"{kind}({self.symbols[operand]})"
        raise PtxError(f"operand `{operand}` of type {kind} is not known")

    def unset(self, *operands: str) -> str:
        """The union of the operands' undefined origins."""
        registers = [o.removeprefix("!") for o in operands if o.removeprefix("!") in self.entry.registers]
        return " | ".join(f"{self.register(name)}.unset" for name in registers) or "kSet"

    def put(self, destination: str, kind: str, expression: str, unset: str) -> str:
        if destination == "_":
            return ""
        register, held = self.register(destination), self.entry.registers[destination]
        if (
            (kind == "pred") != (held == "pred")
            or SIZES[held] < SIZES[kind]
            or (kind in isa.FLOATS and SIZES[held] > SIZES[kind])
        ):
            raise PtxError(f"`{destination}` holds {held}; the result is {kind}")
        return f"put<{'bool' if kind == 'pred' else kind}>({register}, {expression}, {unset});"

    def address(self, operand: str) -> str:
        match = re.fullmatch(r"\[\s*([\w$%.]+)\s*(?:([+-])\s*(-?\w+))?\s*\]", operand)
        if match is None:
            raise PtxError(f"`{operand}` is not an address")
        base = (
            f"address({self.register(match[1])})"
            if match[1] in self.entry.registers
            else self.constant(match[1], "u64")
        )
        offset = int(match[3] or "0", 0) * (-1 if match[2] == "-" else 1)
        return f"{base} + u64({offset})"

    def operands(self, kinds: list[str], operands: tuple[str, ...]) -> str:
        if len(kinds) != len(operands):
            raise PtxError(f"{len(operands)} source operands; expected {len(kinds)}")
        types = ["bool" if kind == "pred" else kind for kind in kinds]
        return " ".join(
            f"const {t} {n} = {self.value(o, k)};" for n, t, k, o in zip("abcd", types, kinds, operands, strict=False)
        )

    # ---- instructions ----

    def row(self, opcode: str, o: tuple[str, ...]) -> str:
        row, kind = isa.TABLE[opcode]
        if kind.endswith("x2"):
            return self._pair(row, kind, o)
        names = {"T": kind, "W": isa.WIDE.get(kind, kind)}
        kinds = [names.get(k, k) for k in row.operands.split()]
        using = f"using T = {'bool' if kind == 'pred' else kind}; using W = {isa.WIDE.get(kind, 'T')};"
        result = self.put(o[0], names.get(row.result, row.result), row.expression, self.unset(*o[1:]))
        return f"{using} {self.operands(kinds, o[1:])} {result}"

    def _pair(self, row: isa.Row, kind: str, o: tuple[str, ...]) -> str:
        """Two floats in one register: the row's expression of the low halves, and of the high ones."""
        word, names = f"b{8 * SIZES[kind]}", "abcd"[: len(o) - 1]
        operation = f"[]({', '.join(f'T {n}' for n in names)}) {{ return T({row.expression}); }}"
        text = f"using T = {kind[:-2]}; {self.operands([word] * len(row.operands.split()), o[1:])}"
        return text + self.put(o[0], word, f"both<T>({operation}, {', '.join(names)})", self.unset(*o[1:]))

    def and_or(self, name: str, o: tuple[str, ...]) -> str:
        """and.pred, or.pred: one defined operand can decide, whatever the other is."""
        text, sign = self.operands(["pred", "pred"], o[1:]), "!" if name == "and" else ""
        a, b = (f"!{self.register(x.removeprefix('!'))}.unset && {sign}{n}" for x, n in zip(o[1:], "ab", strict=True))
        unset = f"({a}) || ({b}) ? u8(kSet) : u8({self.unset(*o[1:])})"
        return text + self.put(o[0], "pred", "a && b" if name == "and" else "a || b", unset)

    def setp(self, m: list[str], o: tuple[str, ...]) -> str:
        compare, *combine, kind = m
        table = isa.FLOAT_COMPARE if kind in isa.FLOATS else isa.INTEGER_COMPARE
        if kind not in SIZES or (kind in ("b16", "b32", "b64") and compare not in ("eq", "ne")):
            raise PtxError(f"no comparison of type {kind}")
        if compare not in table or combine not in ([], ["and"], ["or"], ["xor"]) or len(o) != 3 + len(combine):
            raise PtxError("unknown comparison")
        text = self.operands([kind, kind, *["pred"] * len(combine)], o[1:])
        sign = {"and": "&& c", "or": "|| c", "xor": "!= c"}[combine[0]] if combine else ""
        unset = self.unset(*o[1:])
        if combine and combine[0] != "xor":  # a defined c can decide
            c = self.register(o[3].removeprefix("!"))
            unset = f"!{c}.unset && {'!c' if combine[0] == 'and' else 'c'} ? u8(kSet) : u8({unset})"
        results = [x.strip() for x in o[0].split("|")]
        text += f" const bool yes = {table[compare]}; const u8 unset = {unset};"
        return text + "".join(
            self.put(d, "pred", f"{x} {sign}", "unset") for d, x in zip(results, ("yes", "!yes"), strict=False)
        )

    def selp(self, m: list[str], o: tuple[str, ...]) -> str:
        (kind,) = m
        text = self.operands([kind, kind, "pred"], o[1:])
        chosen = f"{self.unset(o[3])} | (c ? {self.unset(o[1])} : {self.unset(o[2])})"
        return text + self.put(o[0], f"b{8 * SIZES[kind]}", f"of_bits<b{8 * SIZES[kind]}>(c ? a : b)", chosen)

    def mov(self, m: list[str], o: tuple[str, ...]) -> str:
        (kind,) = m
        destination, source = o
        if kind == "pred":
            return self.put(destination, kind, self.value(source, kind), self.unset(source))
        word, bits = f"b{8 * SIZES[kind]}", 8 * SIZES[kind]
        if destination.startswith("{"):
            parts = split_operands(destination[1:-1])
            part = f"b{bits // len(parts)}"
            text = f"const {word} a = {self.value(source, word)}; const u8 unset = {self.unset(source)};"
            return text + "".join(
                self.put(d, part, f"a >> {i * bits // len(parts)}", "unset") for i, d in enumerate(parts)
            )
        if source.startswith("{"):
            parts = split_operands(source[1:-1])
            part = f"b{bits // len(parts)}"
            value = " | ".join(
                f"{word}({self.value(s, part)}) << {i * bits // len(parts)}" for i, s in enumerate(parts)
            )
            return self.put(destination, word, value, self.unset(*parts))
        return self.put(destination, word, self.value(source, word), self.unset(source))

    def cvta(self, m: list[str], o: tuple[str, ...]) -> str:
        to, space, kind = "to" in m, m[-2], m[-1]
        if m not in (["to", space, "u64"], [space, "u64"]) or space not in isa.SPACES:
            raise PtxError("unknown address conversion")
        window = {"shared": "kSharedWindow", "local": "kLocalWindow"}.get(space, "0")
        change = f"& ~u64({window})" if to else f"| {window}"
        return self.put(o[0], kind, f"{self.value(o[1], kind)} {change}", self.unset(o[1]))

    def cvt(self, m: list[str], o: tuple[str, ...]) -> str:
        *mode, to, source = m
        if to in ("f16x2", "bf16x2") and source == "f32" and mode in (["rn"], ["rz"]):
            half = to[:-2]
            high, low = (f"u32(of_bits<b16>(canonical(narrow<{half}>({x}, {mode[0]}))))" for x in "ab")
            return self.operands(["f32", "f32"], o[1:]) + self.put(
                o[0], "b32", f"{high} << 16 | {low}", self.unset(*o[1:])
            )
        if to not in SIZES or source not in SIZES or "pred" in (to, source):
            raise PtxError("unknown conversion")
        return self.operands([source], o[1:]) + self.put(o[0], to, isa.conversion(mode, to, source), self.unset(o[1]))

    def ld(self, m: list[str], o: tuple[str, ...]) -> str:
        *modifiers, kind = m
        targets = split_operands(o[0][1:-1]) if o[0].startswith("{") else [o[0]]
        word = f"b{8 * SIZES[kind]}"
        space, count, rest = isa.memory(modifiers, len(targets))
        access = "kReadOnlyRead" if rest == ["nc"] and space == "kGlobal" else "kRead"
        if rest not in ([], ["nc"]) or len(o) != 2 + ("L2::cache_hint" in modifiers):
            raise PtxError(f"unknown modifiers {rest}")
        text = f"const auto v = load<{kind}, {count}>(t, {space}, {access}, {self.address(o[1])});"
        held = kind if kind not in isa.FLOATS else word
        return text + "".join(
            self.put(d, held, f"{held}(v.value[{i}])", f"v.unset[{i}]") for i, d in enumerate(targets)
        )

    def st(self, m: list[str], o: tuple[str, ...]) -> str:
        *modifiers, kind = m
        sources = split_operands(o[1][1:-1]) if o[1].startswith("{") else [o[1]]
        space, count, rest = isa.memory(modifiers, len(sources))
        if rest or len(o) != 2 + ("L2::cache_hint" in modifiers):
            raise PtxError(f"unknown modifiers {rest}")
        word = f"b{8 * SIZES[kind]}"
        values = ", ".join(self.value(s, word) for s in sources)
        unset = ", ".join(f"u8({self.unset(s)})" for s in sources)
        text = f"const {word} v[] = {{{values}}}; const u8 unset[] = {{{unset}}};"
        return text + f"t.write({space}, {self.address(o[0])}, {SIZES[kind]}, {count}, v, unset);"

    def atom(self, m: list[str], o: tuple[str, ...]) -> str:
        *modifiers, kind = m
        space, _, rest = isa.memory([x for x in modifiers if x not in isa.ORDERINGS], 1)
        if len(rest) != 1 or kind not in isa.ATOMIC_TYPES.get(rest[0], "").split():
            raise PtxError(f"no atomic {' '.join(rest)} of type {kind}")
        expression = isa.ATOMIC[rest[0]]
        if rest[0] == "add" and kind == "f32" and space != "kSharedSpace":
            if space == "kGeneric":
                raise PtxError("a generic add of f32 flushes subnormals in global memory alone")
            expression = "flush(flush(a) + flush(b))"
        sources = o[2:4] if rest[0] == "cas" else o[2:3]
        if len(o) != 2 + len(sources) + ("L2::cache_hint" in modifiers):
            raise PtxError("wrong number of operands")
        text = "".join(f"const {kind} {n} = {self.value(s, kind)};" for n, s in zip("bc", sources, strict=False))
        text += f"const u64 at = {self.address(o[1])}; {kind} a; t.atomic_read({space}, at, {SIZES[kind]}, &a);"
        text += f"const {kind} after = {expression};"
        text += f"t.atomic_write({space}, at, {SIZES[kind]}, &after, {self.unset(*sources)});"
        return text + self.put(o[0], kind, "a", "kSet")

    def red(self, m: list[str], o: tuple[str, ...]) -> str:
        return self.atom(m, ("_", *o))

    def bra(self, m: list[str], o: tuple[str, ...]) -> str:
        if o[0] not in self.labels or m not in ([], ["uni"]):
            raise PtxError(f"no label `{o[0]}`")
        return ("t.jump_back(); " if o[0] in self.seen else "") + f"goto {_label(o[0])};"

    def ret(self, m: list[str], o: tuple[str, ...]) -> str:
        if m or o:
            raise PtxError("unknown form")
        return "return t.exit();"

    def trap(self, m: list[str], o: tuple[str, ...]) -> str:
        return 'throw Fault{"trap"};'

    def bar(self, m: list[str], o: tuple[str, ...]) -> str:
        if m == ["warp", "sync"]:
            return self._wait(
                f"t.wait_warp({{site}}, kWarpSync, {self.value(o[0], 'u32')}, 0, {self.unset(o[0])});", ""
            )
        if [x for x in m if x not in ("cta", "aligned")] != ["sync"] or len(o) not in (1, 2):
            raise PtxError("unknown barrier")
        count = self.value(o[1], "u32") if len(o) == 2 else "t.block()[0] * t.block()[1] * t.block()[2]"
        return self._wait(f"t.wait_block({{site}}, {self.value(o[0], 'u32')}, {count});", "")

    def _wait(self, call: str, answer: str) -> str:
        self.sites += 1
        return f"{call.format(site=self.sites)} t.resume = {self.sites}; return; case {self.sites}:; {answer}"

    def collective(self, opcode: str, o: tuple[str, ...]) -> str:
        name = opcode.split(".")[0]
        source_kind = "pred" if name == "vote" else "u32"
        result, _, inside = (x.strip() for x in o[0].partition("|"))
        lanes = [self.value(x, "u32") for x in o[2:-1]]
        if len(lanes) != (2 if name == "shfl" else 0):
            raise PtxError("wrong number of operands")
        given = [
            isa.COLLECTIVES[opcode],
            self.value(o[-1], "u32"),
            self.value(o[1], source_kind),
            self.unset(o[1]),
            *lanes,
        ]
        call = f'require({self.unset(*o[2:])}, "a lane or member mask"); t.wait_warp({{site}}, {", ".join(given)});'
        kind = opcode.split(".")[-1]
        answer = self.put(result, kind, "t.result", "t.result_unset")
        return self._wait(call, answer + (self.put(inside, "pred", "t.inside", "kSet") if inside else ""))

    def matrix(self, name: str, m: list[str], o: tuple[str, ...]) -> str:
        """ldmatrix, stmatrix of 8 x 8 elements of 16 bits: the first 8 lanes a matrix name its rows."""
        at, registers = (o[1], o[0]) if name == "ldmatrix" else o
        held = split_operands(registers.strip("{}"))
        space = next((x for x in m if x in ("shared", "shared::cta")), "")
        expected = ["sync", "aligned", "m8n8", f"x{len(held)}", *(["trans"] if "trans" in m else [])]
        if m != [*expected, *([space] if space else []), "b16"] or len(held) not in (1, 2, 4):
            raise PtxError("unknown matrix instruction")
        row = f"t.index % 32 < {8 * len(held)} ? {self.address(at)} : 0"
        given = f"{len(held)}, {str('trans' in m).lower()}, {isa.SPACES.get(space, 'kGeneric')}, {row}"
        if name == "ldmatrix":
            answer = "".join(
                self.put(r, "b32", f"t.elements[{i}]", f"t.elements_unset[{i}]") for i, r in enumerate(held)
            )
            return self._wait(f"t.wait_matrices({{site}}, kLoadMatrix, {given});", answer)
        text = "".join(
            f"t.elements[{i}] = {self.value(r, 'b32')}; t.elements_unset[{i}] = {self.unset(r)}; "
            for i, r in enumerate(held)
        )
        return text + self._wait(f"t.wait_matrices({{site}}, kStoreMatrix, {given});", "")

    def fence(self, m: list[str], o: tuple[str, ...]) -> str:
        """Threads run one at a time and see every store at once, so a fence has nothing to do."""
        if o or ".".join(m) not in isa.FENCES:
            raise PtxError("unknown fence")
        return ""

    def statement(self, s: Instruction) -> str:
        name, *modifiers = s.opcode.split(".")
        if any(x in modifiers for x in ("approx", "full")):
            raise PtxError("approximate: its bits are not defined; use the .rn form")
        if s.opcode in isa.TABLE:
            text = self.row(s.opcode, s.operands)
        elif s.opcode in ("and.pred", "or.pred"):
            text = self.and_or(name, s.operands)
        elif s.opcode in isa.COLLECTIVES:
            text = self.collective(s.opcode, s.operands)
        elif name in ("ldmatrix", "stmatrix"):
            text = self.matrix(name, modifiers, s.operands)
        elif name in _FORMS:
            text = _FORMS[name](self, modifiers, s.operands)
        else:
            raise PtxError("unknown instruction")
        guard = s.guard.removeprefix("!")
        condition = f"if ({'!' if s.guard.startswith('!') else ''}test({self.register(guard)})) " if guard else ""
        return f"{condition}{{ {text} }}"

    def source(self) -> str:
        """The C++ file. Raises :class:`PtxError` that names the line and the instruction that has no translation."""
        lines = []
        for number, s in enumerate(self.entry.body):
            if isinstance(s, Label):
                self.seen.add(s.name)
                lines.append(f"{_label(s.name)}:;")
                continue
            try:
                lines.append(f"t.statement = {number}; {self.statement(s)}")
            except (PtxError, ValueError, KeyError, IndexError) as error:
                raise PtxError(f"line {s.line}: `{s.text}`: {error}") from error
        fields = "\n".join(
            f"  Register<{'bool' if kind == 'pred' else f'b{8 * SIZES[kind]}'}> {self.register(name)[2:]};"
            for name, kind in self.entry.registers.items()
        )
        data = "\n".join(
            f"alignas({max(v.align, 16)}) u8 kVariable{i}[{v.size}] = {{{', '.join(map(str, v.data))}}};"
            for i, v in enumerate(self.globals)
        )
        table = ", ".join(
            f"{{kVariable{i}, {v.size}, {str(v.space == 'const').lower()}}}" for i, v in enumerate(self.globals)
        )
        body = "\n".join(lines)
        return (
            f'#include "runtime.h"\n#include <new>\nusing namespace ptx;\nnamespace {{\n{data}\n'
            f"struct Registers {{\n{fields}\n}};\n"
            f"void run(Thread& t, void* registers) {{\nRegisters& r = *static_cast<Registers*>(registers);\n"
            f"switch (t.resume) {{\ncase 0:;\n{body}\n}}\nt.exit();\n}}\n"
            "void reset(void* registers) { new (registers) Registers(); }\n"
            f"const Variable kVariables[] = {{{table or '{nullptr, 0, true}'}}};\n}}\n"
            f"const KernelInfo ptx::kernel = {{run, reset, sizeof(Registers), {self.bytes['shared']}, {self.bytes['local']}, "
            f"kVariables, {len(self.globals)}}};\n"
        )


# Instructions whose form is their own.
_FORMS: Final[dict[str, Callable[[Translator, list[str], tuple[str, ...]], str]]] = {
    **{
        "setp": Translator.setp,
        "selp": Translator.selp,
        "mov": Translator.mov,
        "cvta": Translator.cvta,
        "cvt": Translator.cvt,
    },
    **{"ld": Translator.ld, "st": Translator.st, "atom": Translator.atom, "red": Translator.red, "bra": Translator.bra},
    **{"ret": Translator.ret, "exit": Translator.ret, "trap": Translator.trap},
    **{"bar": Translator.bar, "barrier": Translator.bar, "fence": Translator.fence, "membar": Translator.fence},
}


def _label(name: str) -> str:
    return "L" + re.sub(r"\W", lambda match: f"_{ord(match[0]):x}", name)
