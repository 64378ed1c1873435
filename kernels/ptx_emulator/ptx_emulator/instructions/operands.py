"""Operands as functions of a warp's registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx_emulator.errors import PtxError
from ptx_emulator.instructions.alu import width_of
from ptx_emulator.numeric import UNSIGNED, Array, u8
from ptx_emulator.parser import Imm, Mem, Operand, Reg, Sym, Vec

if TYPE_CHECKING:
    from ptx_emulator.code import Code

Read = Callable[[list[Any]], Array]


def type_of(name: str) -> int:
    """Bits of a type."""
    return width_of(name)


def items_of(operand: Operand) -> tuple[Any, ...]:
    return operand.items if isinstance(operand, Vec) else (operand,)


def reader(operand: Operand, width: int, code: Code) -> Read:
    """A function that gives an operand's bits in all lanes."""
    if isinstance(operand, Reg):
        index, dtype = operand.index, UNSIGNED.get(width)
        if operand.width < width:
            raise PtxError(f"register {operand.name} is narrower than {width} bits")
        if operand.negated:
            return lambda registers: ~registers[index]
        if operand.width > width and dtype is not None:
            return lambda registers: registers[index].astype(dtype)
        return lambda registers: registers[index]
    if isinstance(operand, Imm):
        value = int(operand.value)
    elif isinstance(operand, Sym) and operand.name in code.symbols:
        value = code.symbols[operand.name]
    else:
        raise PtxError(f"cannot read the operand {operand}")
    array = (
        np.full(32, bool(value)) if width == 1 else np.full(32, value & ((1 << width) - 1), UNSIGNED[width])
    )
    return lambda registers: array


def address_reader(place: Mem, code: Code) -> Read:
    """A function that gives the addresses of a memory operand, as 64-bit integers."""
    offset = u8(place.offset & 0xFFFFFFFFFFFFFFFF)
    base = place.base
    if isinstance(base, Reg):
        index = base.index
        if base.width == 64:
            if place.offset == 0:
                return lambda registers: registers[index]
            return lambda registers: registers[index] + offset
        # Shared addresses are 32 bits wide and wrap.
        return lambda registers: (registers[index].astype(u8) + offset) & u8(0xFFFFFFFF)
    read = reader(base, 64, code)
    return lambda registers: read(registers) + offset
