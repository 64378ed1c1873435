"""PTX text to instructions: registers numbered, local scopes resolved, labels left as names."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from ptx_emulator.errors import PtxError

WIDTHS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "b128": 128}


@dataclass(frozen=True)
class Reg:
    """A register: its number in the warp's register list and its width in bits (1 for a predicate)."""

    index: int
    width: int
    name: str
    negated: bool = False


@dataclass(frozen=True)
class Imm:
    """A constant. Floats written as 0f... and 0d... are kept as their bits; `real` says a float was written."""

    value: int | float
    bits: bool = False


@dataclass(frozen=True)
class Sym:
    """A name of the module or a label."""

    name: str


@dataclass(frozen=True)
class Vec:
    """{a, b, ...}"""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """a|b: two results."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Mem:
    """[base + offset], or [base, {coordinates}] of a tensor map."""

    base: Reg | Sym | Imm
    offset: int = 0
    coordinates: tuple[Operand, ...] = ()


@dataclass(frozen=True)
class Sink:
    """`_`, a result that nobody wants."""


Operand = Reg | Imm | Sym | Vec | Pair | Mem | Sink


@dataclass(frozen=True)
class Instruction:
    """One instruction: `opcode` split at its dots, operands, guard, and where it came from."""

    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Reg | None
    text: str
    place: str  # file:line of the kernel's source

    @property
    def root(self) -> str:
        return self.opcode[0]


@dataclass(frozen=True)
class Label:
    """A place that branches name."""

    name: str


@dataclass(frozen=True)
class Param:
    """A kernel parameter: its type (`u32`, `b8`, ...) and, for an array, its size in bytes."""

    name: str
    type: str
    size: int


@dataclass
class Program:
    """A kernel's entry."""

    name: str
    params: list[Param]
    threads: int
    max_registers: int = 0  # of a thread at launch, where the program says so
    body: list[Instruction | Label] = field(default_factory=list)
    registers: list[Reg] = field(default_factory=list)
    special: dict[str, Reg] = field(default_factory=dict)
    tables: dict[str, tuple[str, ...]] = field(default_factory=dict)
    constants: dict[str, bytes] = field(default_factory=dict)


SPECIAL_WIDTHS = {"%clock64": 64, "%globaltimer": 64, "%gridid": 64, "%total_smem_size": 32}
_TYPE_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}


def parse(text: str) -> Program:
    """Read the one kernel of a module."""
    entry = re.search(r"\.visible\s+\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", text, re.S)
    if entry is None:
        raise PtxError("no kernel in the PTX text")
    if re.search(r"^\s*(\.visible\s+|\.weak\s+)?\.func\b", text, re.M):
        raise PtxError("device functions are not supported by the emulator")
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", entry[3])
    registers = re.search(r"\.maxnreg\s+(\d+)", entry[3])
    program = Program(
        entry[1], _params(entry[2]), int(threads[1]) if threads else 0, int(registers[1]) if registers else 0
    )
    for name, size, values in re.findall(r"\.global[^;=]*\.b8\s+([\w$]+)\[(\d+)\]\s*=\s*\{([^}]*)\}", text):
        program.constants[name] = bytes(int(x) for x in values.split(",")).ljust(int(size), b"\0")
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M))
    _Body(program, files).read(_body_text(text, entry.end()))
    return program


def _params(text: str) -> list[Param]:
    params = []
    for line in re.sub(r"//.*", "", text).split(","):
        if not line.strip():
            continue
        match = re.match(
            r"\s*\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)(?:\s+\.ptr.*?)?\s+([\w$]+)(?:\[(\d+)\])?\s*$", line
        )
        if match is None:
            raise PtxError(f"cannot read the parameter {line.strip()!r}")
        size = int(match[3]) if match[3] else _TYPE_BYTES[match[1].lstrip("busfp")]
        params.append(Param(match[2], match[1], size))
    return params


def _body_text(text: str, start: int) -> str:
    depth, end = 1, start
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            break
    return text[start:end]


def _statements(text: str) -> Iterator[str]:
    """Statements, scope braces and labels, in order; line directives come as statements."""
    text = re.sub(r"//.*", "", text)
    text = re.sub(r"^\s*(\.loc\s+.*)$", r"\1;", text, flags=re.M)
    position, end = 0, len(text)
    label = re.compile(r"\s*([\w$]+):(?!:)")
    while position < end:
        if match := label.match(text, position):
            yield match[1] + ":"
            position = match.end()
        elif text[position].isspace():
            position += 1
        elif text[position] in "{}":
            yield text[position]
            position += 1
        else:
            stop = text.index(";", position)
            if statement := text[position:stop].strip():
                yield statement
            position = stop + 1


class _Body:
    """Reads the statements of one kernel."""

    def __init__(self, program: Program, files: dict[str, str]) -> None:
        self.program = program
        self.files = files
        self.scopes: list[dict[str, Reg | str]] = [{}]
        self.ranges: dict[str, list[Reg]] = {}
        self.num_scopes = 0
        self.place = "?"

    def read(self, text: str) -> None:
        statements = list(_statements(text))
        for number, statement in enumerate(statements):
            if statement == "{":
                self.num_scopes += 1
                self.scopes.append({})
                self._declare_labels(statements, number + 1)
            elif statement == "}":
                self.scopes.pop()
            elif statement.endswith(":") and " " not in statement:
                self.program.body.append(Label(self._label(statement[:-1])))
            elif statement.startswith(".loc"):
                _, number_of_file, line, *_ = statement.split()
                self.place = f"{self.files.get(number_of_file, number_of_file)}:{line}"
            elif statement.startswith(".reg"):
                self._declare(statement)
            elif statement.startswith(".pragma"):
                pass
            elif match := re.match(r"\.branchtargets\s+(.*)", statement, re.S):
                label = self.program.body.pop()
                assert isinstance(label, Label)
                self.program.tables[label.name] = tuple(x.strip() for x in match[1].split(","))
            elif statement.startswith("."):
                raise PtxError(f"unknown directive {statement!r}")
            else:
                self.program.body.append(self._instruction(statement))

    def _declare_labels(self, statements: list[str], first: int) -> None:
        """Labels of the scope that begins at `first`: local names, made unique."""
        depth = 0
        for statement in statements[first:]:
            depth += {"{": 1, "}": -1}.get(statement, 0)
            if depth < 0:
                return
            if depth == 0 and statement.endswith(":") and not statement.startswith("$"):
                self.scopes[-1][statement[:-1]] = f"{statement[:-1]}@{self.num_scopes}"

    def _label(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if isinstance(found := scope.get(name), str):
                return found
        return name

    def _new(self, name: str, width: int) -> Reg:
        reg = Reg(len(self.program.registers), width, name)
        self.program.registers.append(reg)
        return reg

    def _declare(self, statement: str) -> None:
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S).groups()  # type: ignore[union-attr]
        width = 1 if kind == "pred" else int(kind.lstrip("busfx").split("x")[0] or 0)
        for name in names.split(","):
            name = name.strip()
            if match := re.match(r"(.*)<(\d+)>", name):
                for number in range(int(match[2])):
                    self.scopes[-1][f"{match[1]}{number}"] = self._new(f"{match[1]}{number}", width)
            else:
                self.scopes[-1][name] = self._new(name, width)

    def _instruction(self, statement: str) -> Instruction:
        guard = None
        rest = statement
        if match := re.match(r"@(!?)([%\w$]+)\s+", rest):
            found = self._operand(match[2])
            if not isinstance(found, Reg):
                raise PtxError(f"unknown predicate in {statement!r}")
            guard = Reg(found.index, 1, found.name, negated=match[1] == "!")
            rest = rest[match.end() :]
        opcode, _, operands = rest.replace("\t", " ").replace("\n", " ").partition(" ")
        return Instruction(
            tuple(re.split(r"\.(?=[a-zA-Z0-9])", opcode)),
            tuple(self._operand(x) for x in _split(operands)),
            guard,
            re.sub(r"\s+", " ", statement),
            self.place,
        )

    def _operand(self, text: str) -> Operand:
        text = text.strip()
        if text == "_":
            return Sink()
        if text.startswith("{"):
            return Vec(tuple(self._operand(x) for x in _split(text[1:-1])))
        if text.startswith("["):
            return self._memory(text[1:-1])
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first), self._operand(second))
        if text.startswith("!"):
            found = self._operand(text[1:])
            assert isinstance(found, Reg)
            return Reg(found.index, found.width, found.name, negated=True)
        if re.match(r"-?\d|-?\.\d", text):
            return _immediate(text)
        for scope in reversed(self.scopes):
            if (found_here := scope.get(text)) is not None:
                return Sym(found_here) if isinstance(found_here, str) else found_here
        if text.startswith("%"):
            if text not in self.program.special:
                self.program.special[text] = self._new(text, SPECIAL_WIDTHS.get(text, 32))
            return self.program.special[text]
        return Sym(text)

    def _memory(self, text: str) -> Mem:
        parts = _split(text)
        coordinates: tuple[Operand, ...] = ()
        if len(parts) > 1:
            vector = self._operand(parts[1])
            if len(parts) > 2 or not isinstance(vector, Vec):
                raise PtxError(f"cannot read the address [{text}]")
            coordinates = vector.items
        base_text, _, offset = parts[0].partition("+")
        base = self._operand(base_text)
        if not isinstance(base, Reg | Sym | Imm):
            raise PtxError(f"cannot read the address [{text}]")
        return Mem(base, int(offset.strip() or "0", 0), coordinates)


def _split(text: str) -> list[str]:
    """Split at the commas that are outside brackets."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    if current.strip():
        parts.append(current)
    return parts


def _immediate(text: str) -> Imm:
    lower = text.lower()
    if lower.startswith("0f"):
        return Imm(struct.unpack(">I", bytes.fromhex(text[2:]))[0], bits=True)
    if lower.startswith("0d"):
        return Imm(struct.unpack(">Q", bytes.fromhex(text[2:]))[0], bits=True)
    lower = lower.rstrip("u")
    try:
        return Imm(int(lower, 0))
    except ValueError:
        return Imm(float(lower))
