"""Instructions that only compute, as Python source: registers in, registers out, no memory and no other lane.

`R` is the warp's list of registers, each an array of 32 lanes that holds bits and is never changed in place. Runs of
such instructions become one Python function (code.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx_emulator import numeric
from ptx_emulator.errors import PtxError
from ptx_emulator.parser import Imm, Instruction, Operand, Pair, Reg, Sink, Sym, Vec

NAMESPACE: dict[str, Any] = {k: v for k, v in vars(numeric).items() if not k.startswith("_")} | {"np": np}

_STORED = {1: "np.bool_", 8: "u1", 16: "u2", 32: "u4", 64: "u8"}
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
            "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}  # fmt: skip
_ROUNDINGS = {"rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi"}
_FLOATS = {"f16", "bf16", "f32", "f64"}
_TYPES = (
    {f"{kind}{width}" for kind in "usb" for width in (8, 16, 32, 64)}
    | _FLOATS
    | {"f16x2", "bf16x2", "s16x2", "u16x2", "tf32", "pred"}
)


def width_of(type_: str) -> int:
    """Bits of a type."""
    return (
        {"pred": 1, "bf16": 16, "tf32": 32}.get(type_)
        or (32 if type_.endswith("x2") else 0)
        or int(type_.lstrip("usbf"))
    )


class Source:
    """Collects statements and the constants that they name."""

    def __init__(self, symbols: dict[str, int]) -> None:
        self.symbols = symbols
        self.constants: dict[str, Any] = {}
        self.names: dict[tuple[str, Any], str] = {}

    def constant(self, value: int, width: int) -> str:
        key = (_STORED[width], value)
        if key not in self.names:
            name = self.names[key] = f"C{len(self.names)}"
            dtype = np.bool_ if width == 1 else numeric.UNSIGNED[width]
            array: numeric.Array = np.full(
                32, bool(value) if width == 1 else value & ((1 << width) - 1), dtype
            )
            array.flags.writeable = False
            self.constants[name] = array
        return self.names[key]

    def bits(self, operand: Operand, width: int) -> str:
        """An operand as stored bits of this width."""
        if isinstance(operand, Reg):
            if operand.negated:
                return f"~R[{operand.index}]"
            if operand.width < width:
                raise PtxError(f"register {operand.name} is narrower than {width} bits")
            return f"R[{operand.index}]" + (f".astype({_STORED[width]})" if operand.width > width else "")
        if isinstance(operand, Imm):
            return self.constant(int(operand.value), width)
        if isinstance(operand, Sym):
            if operand.name not in self.symbols:
                raise PtxError(f"unknown symbol {operand.name}")
            return self.constant(self.symbols[operand.name], width)
        raise PtxError(f"cannot read the operand {operand}")

    def value(self, operand: Operand, type_: str) -> str:
        """An operand as an array of this type; 16-bit floats widen to float32."""
        if type_ in _FLOATS and isinstance(operand, Imm) and not operand.bits:
            operand = Imm(_float_bits(float(operand.value), type_), bits=True)
        bits = self.bits(operand, width_of(type_))
        if type_ == "bf16":
            return f"bf16_to_f4({bits})"
        if type_ == "f16":
            return f"f2_to_f4({bits})"
        if type_[0] == "s":
            return f"{bits}.view(i{width_of(type_) // 8})"
        if type_ in ("f32", "f64"):
            return f"{bits}.view(f{width_of(type_) // 8})"
        return bits

    def store(self, target: Operand, expression: str, type_: str, guard: Reg | None) -> str:
        """A statement that puts a value of this type into a register."""
        if isinstance(target, Sink):
            return "pass"
        if not isinstance(target, Reg):
            raise PtxError(f"cannot write to {target}")
        width = width_of(type_)
        if type_ == "bf16":
            expression = f"f4_to_bf16({expression})"
        elif type_ == "f16":
            expression = f"f4_to_f2({expression})"
        elif type_[0] in "sf" and type_ != "f16x2":
            if target.width > width:
                expression = f"({expression}).astype({'i' if type_[0] == 's' else 'f'}{target.width // 8})"
                width = target.width
            expression = f"({expression}).view(u{width // 8})"
        elif target.width > width > 1:
            expression = f"({expression}).astype({_STORED[target.width]})"
        if target.width < width:
            raise PtxError(f"register {target.name} is narrower than {type_}")
        if guard is not None:
            expression = f"where({self.bits(guard, 1)}, {expression}, R[{target.index}])"
        return f"R[{target.index}] = {expression}"


def _float_bits(value: float, type_: str) -> int:
    if type_ == "bf16":
        return int(numeric.f4_to_bf16(np.array([value], np.float32))[0])
    dtype = {"f16": np.float16, "f32": np.float32, "f64": np.float64}[type_]
    return int(np.array([value], dtype).view(numeric.UNSIGNED[width_of(type_)])[0])


Handler = Callable[[Instruction, Source], list[str]]


def written(instruction: Instruction) -> list[int]:
    """The registers that such an instruction writes."""
    target = instruction.operands[0]
    items: tuple[Operand, ...] = (target,)
    if isinstance(target, Vec):
        items = target.items
    elif isinstance(target, Pair):
        items = (target.first, target.second)
    return [x.index for x in items if isinstance(x, Reg)]


def _type(instruction: Instruction) -> str:
    if instruction.opcode[-1] not in _TYPES:
        raise PtxError(f"unknown type in {instruction.text!r}")
    return instruction.opcode[-1]


def _modifiers(instruction: Instruction, known: set[str]) -> None:
    """Refuse a modifier that is not modelled."""
    unknown = [x for x in instruction.opcode[1:] if x not in known and x not in _TYPES]
    if unknown:
        raise PtxError(f"unknown modifier .{unknown[0]} in {instruction.text!r}")


def _finish(instruction: Instruction, expression: str, type_: str) -> str:
    if "ftz" in instruction.opcode and type_ == "f32":
        expression = f"flush({expression})"
    if "sat" in instruction.opcode and type_ == "f32":
        expression = f"minimum(maximum({expression}, f4(0)), f4(1))"
    return expression


def _packed(function: str, type_: str, operands: list[str]) -> str:
    to, back = ("bf16_to_f4", "f4_to_bf16") if type_ == "bf16x2" else ("f2_to_f4", "f4_to_f2")
    return f"on_halves({function}, {to}, {back}, {', '.join(operands)})"


def _simple(template: str, packed: str = "", *, floats: bool = True) -> Handler:
    """A handler from a template over the operands a, b, c; `packed` is the function for two 16-bit floats."""

    def handle(instruction: Instruction, source: Source) -> list[str]:
        type_ = _type(instruction)
        _modifiers(instruction, {"rn", "ftz", "lo", "approx", "sat", "full"})
        target, *operands = instruction.operands
        if type_ in ("f16x2", "bf16x2"):
            if not packed:
                raise PtxError(f"unknown instruction {instruction.text!r}")
            expression = _packed(packed, type_, [source.bits(x, 32) for x in operands])
        elif type_ in ("s16x2", "u16x2"):
            halves = (f"{source.bits(x, 32)}.view({'i' if type_[0] == 's' else 'u'}2)" for x in operands)
            expression = f"({template.format(**dict(zip('abc', halves, strict=False)))}).view(u4)"
            type_ = "b32"
        else:
            if type_ in _FLOATS and not floats:
                raise PtxError(f"unknown instruction {instruction.text!r}")
            names = dict(zip("abc", (source.value(x, type_) for x in operands), strict=False))
            expression = _finish(instruction, template.format(**names), type_)
        return [source.store(target, expression, type_, instruction.guard)]

    return handle


def _negate(instruction: Instruction, source: Source) -> list[str]:
    type_ = _type(instruction)
    target, operand = instruction.operands
    if type_[0] == "s":
        return [source.store(target, f"-{source.value(operand, type_)}", type_, instruction.guard)]
    sign = {
        "f16": 0x8000,
        "bf16": 0x8000,
        "f32": 1 << 31,
        "f64": 1 << 63,
        "f16x2": 0x80008000,
        "bf16x2": 0x80008000,
    }
    width = width_of(type_)
    expression = f"{source.bits(operand, width)} ^ {source.constant(sign[type_], width)}"
    return [source.store(target, expression, f"b{width}", instruction.guard)]


def _absolute(instruction: Instruction, source: Source) -> list[str]:
    type_ = _type(instruction)
    target, operand = instruction.operands
    if type_[0] == "s":
        return [source.store(target, f"np.abs({source.value(operand, type_)})", type_, instruction.guard)]
    kept = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "f64": (1 << 63) - 1,
            "f16x2": 0x7FFF7FFF, "bf16x2": 0x7FFF7FFF}  # fmt: skip
    width = width_of(type_)
    expression = f"{source.bits(operand, width)} & {source.constant(kept[type_], width)}"
    return [source.store(target, expression, f"b{width}", instruction.guard)]


def _multiply(instruction: Instruction, source: Source) -> list[str]:
    """mul and mad, and their wide and high forms."""
    type_ = _type(instruction)
    target, *operands = instruction.operands
    a, b = (source.value(x, type_) for x in operands[:2])
    if "wide" in instruction.opcode:
        wide = f"{type_[0]}{width_of(type_) * 2}"
        dtype = f"{'i' if type_[0] == 's' else 'u'}{width_of(wide) // 8}"
        expression, result = f"{a}.astype({dtype}) * {b}.astype({dtype})", wide
    elif "hi" in instruction.opcode:
        expression, result = f"multiply_high({a}, {b})", type_
    elif type_ in ("f16x2", "bf16x2"):
        expression, result = _packed("np.multiply", type_, [source.bits(x, 32) for x in operands[:2]]), type_
    else:
        expression, result = f"{a} * {b}", type_
    if instruction.root == "mad":
        expression = f"{expression} + {source.value(operands[2], result)}"
    return [source.store(target, _finish(instruction, expression, result), result, instruction.guard)]


def _fma(instruction: Instruction, source: Source) -> list[str]:
    type_ = _type(instruction)
    _modifiers(instruction, {"rn", "ftz", "sat"})
    target, *operands = instruction.operands
    if type_ in ("f16x2", "bf16x2"):
        expression = _packed("fma_f4", type_, [source.bits(x, 32) for x in operands])
    else:
        values = ", ".join(source.value(x, type_) for x in operands)
        if type_ == "f64":
            raise PtxError(f"unknown instruction {instruction.text!r}")
        expression = f"fma_f4({values})"
    return [source.store(target, _finish(instruction, expression, type_), type_, instruction.guard)]


def _divide(instruction: Instruction, source: Source) -> list[str]:
    type_ = _type(instruction)
    target, *operands = instruction.operands
    a, b = (source.value(x, type_) for x in operands)
    if type_ in _FLOATS:
        expression = f"{a} / {b}"
    else:
        expression = f"{'divide' if instruction.root == 'div' else 'remainder'}({a}, {b})"
    return [source.store(target, _finish(instruction, expression, type_), type_, instruction.guard)]


def _shift(instruction: Instruction, source: Source) -> list[str]:
    type_ = _type(instruction)
    target, operand, amount = instruction.operands
    a = source.value(operand, type_)
    if isinstance(amount, Imm) and 0 <= amount.value < width_of(type_):
        sign = "i" if type_[0] == "s" else "u"
        expression = (
            f"{a} {'<<' if instruction.root == 'shl' else '>>'} {sign}{width_of(type_) // 8}({amount.value})"
        )
    else:
        function = "shift_left" if instruction.root == "shl" else "shift_right"
        expression = f"{function}({a}, {source.bits(amount, 32)})"
    return [source.store(target, expression, type_, instruction.guard)]


def _set_predicate(instruction: Instruction, source: Source) -> list[str]:
    type_ = _type(instruction)
    target, *operands = instruction.operands
    comparison = instruction.opcode[1]
    a, b = (source.value(x, type_) for x in operands[:2])
    if comparison == "num":
        expression = f"~(np.isnan({a}) | np.isnan({b}))"
    elif comparison == "nan":
        expression = f"np.isnan({a}) | np.isnan({b})"
    elif comparison in _COMPARE:
        expression = f"({a} {_COMPARE[comparison]} {b})"
        if comparison == "ne" and type_ in _FLOATS:
            expression = f"({expression} & ~(np.isnan({a}) | np.isnan({b})))"
    elif comparison[:-1] in _COMPARE and comparison.endswith("u"):
        expression = f"(({a} {_COMPARE[comparison[:-1]]} {b}) | np.isnan({a}) | np.isnan({b}))"
    else:
        raise PtxError(f"unknown comparison in {instruction.text!r}")
    _modifiers(instruction, {comparison, "and", "or", "xor", "ftz"})
    inverse = f"~({expression})"
    if len(operands) == 3:
        operator = {"and": "&", "or": "|", "xor": "^"}[instruction.opcode[2]]
        combined = source.bits(operands[2], 1)
        expression, inverse = f"({expression}) {operator} {combined}", f"({inverse}) {operator} {combined}"
    if isinstance(target, Pair):
        return [
            f"T = {expression}; U = {inverse}",
            source.store(target.first, "T", "pred", instruction.guard),
            source.store(target.second, "U", "pred", instruction.guard),
        ]
    return [source.store(target, expression, "pred", instruction.guard)]


def _select(instruction: Instruction, source: Source) -> list[str]:
    type_ = _type(instruction)
    target, first, second, predicate = instruction.operands
    width = width_of(type_)
    if type_ in _FLOATS:  # immediates may be written as floats
        first, second = (
            Imm(_float_bits(float(x.value), type_), bits=True) if isinstance(x, Imm) and not x.bits else x
            for x in (first, second)
        )
    expression = (
        f"where({source.bits(predicate, 1)}, {source.bits(first, width)}, {source.bits(second, width)})"
    )
    return [source.store(target, expression, f"b{width}" if width > 1 else "pred", instruction.guard)]


def _move(instruction: Instruction, source: Source) -> list[str]:
    type_ = _type(instruction)
    target, operand = instruction.operands
    width = width_of(type_)
    if isinstance(target, Vec):
        part = width // len(target.items)
        lines = [f"T = {source.bits(operand, width)}"]
        for number, item in enumerate(target.items):
            piece = f"(T >> u{width // 8}({part * number})).astype(u{part // 8})"
            lines.append(source.store(item, piece, f"b{part}", instruction.guard))
        return lines
    if isinstance(operand, Vec):
        part = width // len(operand.items)
        pieces = [
            f"({source.bits(item, part)}.astype(u{width // 8}) << u{width // 8}({part * number}))"
            for number, item in enumerate(operand.items)
        ]
        return [source.store(target, " | ".join(pieces), f"b{width}", instruction.guard)]
    if type_ in _FLOATS and isinstance(operand, Imm) and not operand.bits:
        operand = Imm(_float_bits(float(operand.value), type_), bits=True)
    return [
        source.store(
            target, source.bits(operand, width), "pred" if width == 1 else f"b{width}", instruction.guard
        )
    ]


def _convert(instruction: Instruction, source: Source) -> list[str]:
    to, *rest = [x for x in instruction.opcode[1:] if x in _TYPES]
    modifiers = {x for x in instruction.opcode[1:] if x not in _TYPES}
    if unknown := modifiers - _ROUNDINGS - {"ftz", "sat", "relu", "satfinite"}:
        raise PtxError(f"unknown modifier .{min(unknown)} in {instruction.text!r}")
    target, *operands = instruction.operands
    if to in ("bf16x2", "f16x2"):
        relu = "relu" in modifiers
        pack_as = {
            ("bf16x2", "rn"): "f4_to_bf16",
            ("bf16x2", "rz"): "f4_to_bf16_rz",
            ("f16x2", "rn"): "f4_to_f2",
        }
        function = pack_as[to, next(iter(modifiers & _ROUNDINGS))]
        high, low = (source.value(x, "f32") for x in operands)
        if relu:
            high, low = f"maximum({high}, f4(0))", f"maximum({low}, f4(0))"
        return [
            source.store(target, f"pack({function}({low}), {function}({high}))", "b32", instruction.guard)
        ]
    if to == "tf32":
        return [
            source.store(target, f"f4_to_tf32({source.value(operands[0], 'f32')})", "b32", instruction.guard)
        ]
    (from_,) = rest
    value = source.value(operands[0], from_)
    rounding = next(iter(modifiers & _ROUNDINGS), "rn")
    if to in _FLOATS:
        if rounding not in ("rn",) and not (from_ in _FLOATS and rounding.endswith("i")):
            if (to, rounding) == ("bf16", "rz"):
                return [source.store(target, f"f4_to_bf16_rz({value})", "b16", instruction.guard)]
            raise PtxError(f"unknown rounding in {instruction.text!r}")
        if rounding.endswith("i"):
            numpy_name = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}[rounding]
            value = f"np.{numpy_name}({value})"
        if to == "f64" or from_ == "f64" or from_ not in _FLOATS:
            value = f"{value}.astype({'f8' if to == 'f64' else 'f4'})"
        return [source.store(target, _finish(instruction, value, to), to, instruction.guard)]
    dtype = f"{'i' if to[0] == 's' else 'u'}{width_of(to) // 8}"
    if from_ in _FLOATS:
        return [source.store(target, f"to_integer({value}, {dtype}, '{rounding}')", to, instruction.guard)]
    if "sat" in modifiers:
        raise PtxError(f"unknown instruction {instruction.text!r}")
    return [source.store(target, f"{value}.astype({dtype})", to, instruction.guard)]


def _minmax(name: str, numpy_name: str) -> Handler:
    def handle(instruction: Instruction, source: Source) -> list[str]:
        type_ = _type(instruction)
        _modifiers(instruction, {"ftz", "NaN"} | ({"relu"} if type_ == "s32" else set()))
        target, *operands = instruction.operands
        spreads_nan = "NaN" in instruction.opcode
        if type_ in ("f16x2", "bf16x2"):
            function = f"np.{numpy_name}" if spreads_nan else name
            expression = _packed(function, type_, [source.bits(x, 32) for x in operands])
        elif type_ in ("s16x2", "u16x2"):
            halves = (f"{source.bits(x, 32)}.view({'i' if type_[0] == 's' else 'u'}2)" for x in operands)
            expression, type_ = f"np.{numpy_name}({', '.join(halves)}).view(u4)", "b32"
        else:
            function = name if type_ in _FLOATS and not spreads_nan else f"np.{numpy_name}"
            expression = ""
            for operand in operands:
                value = source.value(operand, type_)
                expression = f"{function}({expression}, {value})" if expression else value
            if "relu" in instruction.opcode:
                expression = f"np.maximum({expression}, i4(0))"
        return [source.store(target, _finish(instruction, expression, type_), type_, instruction.guard)]

    return handle


def _extract(instruction: Instruction, source: Source) -> list[str]:
    """bfe; with constant fields, as the compiler emits it, two shifts."""
    type_ = _type(instruction)
    target, operand, start, length = instruction.operands
    width = width_of(type_)
    if (
        not isinstance(start, Imm)
        or not isinstance(length, Imm)
        or not 0 < length.value <= width - start.value
    ):
        return _call("extract_bits", 0, 32, 32)(instruction, source)
    dtype = f"{'i' if type_[0] == 's' else 'u'}{width // 8}"
    left, right = width - start.value - length.value, width - length.value
    expression = f"({source.value(operand, type_)} << {dtype}({left})) >> {dtype}({right})"
    return [source.store(target, expression, type_, instruction.guard)]


def _call(function: str, *widths: int) -> Handler:
    """A handler that calls a function of numeric.py; a width of 0 is the instruction's type."""

    def handle(instruction: Instruction, source: Source) -> list[str]:
        type_ = _type(instruction)
        target, *operands = instruction.operands
        values = [
            source.bits(x, width) if width else source.value(x, type_)
            for x, width in zip(operands, widths, strict=True)
        ]
        result = "b32" if function in ("count_bits", "leading_zeros", "find_top_bit") else type_
        return [source.store(target, f"{function}({', '.join(values)})", result, instruction.guard)]

    return handle


def _logic3(instruction: Instruction, source: Source) -> list[str]:
    target, a, b, c, table = instruction.operands
    assert isinstance(table, Imm)
    values = ", ".join(source.bits(x, 32) for x in (a, b, c))
    return [source.store(target, f"logic3({values}, {table.value})", "b32", instruction.guard)]


def _funnel(instruction: Instruction, source: Source) -> list[str]:
    target, *operands = instruction.operands
    values = ", ".join(source.bits(x, 32) for x in operands)
    left, clamp = "l" in instruction.opcode, "clamp" in instruction.opcode
    return [source.store(target, f"funnel({values}, {left}, {clamp})", "b32", instruction.guard)]


def _address(instruction: Instruction, source: Source) -> list[str]:
    """cvta: the emulator's address spaces do not overlap, so an address is the same in all of them."""
    width = width_of(_type(instruction))
    target, operand = instruction.operands
    return [source.store(target, source.bits(operand, width), f"b{width}", instruction.guard)]


def _policy(instruction: Instruction, source: Source) -> list[str]:
    """createpolicy: a cache policy means nothing here."""
    return [source.store(instruction.operands[0], source.constant(0, 64), "b64", instruction.guard)]


HANDLERS: dict[str, Handler] = {
    "add": _simple("{a} + {b}", "np.add"),
    "sub": _simple("{a} - {b}", "np.subtract"),
    "mul": _multiply,
    "mad": _multiply,
    "fma": _fma,
    "div": _divide,
    "rem": _divide,
    "and": _simple("{a} & {b}", floats=False),
    "or": _simple("{a} | {b}", floats=False),
    "xor": _simple("{a} ^ {b}", floats=False),
    "not": _simple("~{a}", floats=False),
    "neg": _negate,
    "abs": _absolute,
    "shl": _shift,
    "shr": _shift,
    "min": _minmax("minimum", "minimum"),
    "max": _minmax("maximum", "maximum"),
    "setp": _set_predicate,
    "selp": _select,
    "mov": _move,
    "cvt": _convert,
    "cvta": _address,
    "createpolicy": _policy,
    "ex2": _simple("exp2({a})", "exp2"),
    "lg2": _simple("log2({a})"),
    "rcp": _simple("f4(1) / {a}"),
    "sqrt": _simple("np.sqrt({a})"),
    "rsqrt": _simple("reciprocal_root({a})"),
    "sin": _simple("np.sin({a})"),
    "cos": _simple("np.cos({a})"),
    "tanh": _simple("tanh({a})", "tanh"),
    "copysign": _simple("np.copysign({b}, {a})"),
    "popc": _call("count_bits", 0),
    "clz": _call("leading_zeros", 0),
    "bfind": _call("find_top_bit", 0),
    "brev": _call("reverse_bits", 0),
    "bfe": _extract,
    "bfi": _call("insert_bits", 0, 0, 32, 32),
    "prmt": _call("permute_bytes", 32, 32, 32),
    "lop3": _logic3,
    "shf": _funnel,
}
