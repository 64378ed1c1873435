"""Instructions that pass values between the lanes of a warp."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx_emulator.errors import PtxError
from ptx_emulator.instructions.operands import reader, type_of
from ptx_emulator.numeric import Array, u4, u8
from ptx_emulator.parser import Instruction, Pair, Reg, Sink
from ptx_emulator.warp import Warp

if TYPE_CHECKING:
    from ptx_emulator.code import Code
    from ptx_emulator.emulator import Block

Act = Callable[["Block", Warp], Any]

_LANE = np.arange(32)


def _members(block: Block, warp: Warp, lanes: Array, mask: Array, text: str) -> None:
    """The active lanes must be exactly those that the mask names."""
    named = (int(mask[np.argmax(lanes)]) >> _LANE & 1).astype(bool)
    if (named != lanes).any():
        raise PtxError(
            f"{text!r} names lanes {np.flatnonzero(named)}, but {np.flatnonzero(lanes)} execute it"
        )


def _shuffle(instruction: Instruction, code: Code) -> Act:
    mode = instruction.opcode[2]
    target, *operands = instruction.operands
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, Sink())
    read_a, read_b, read_c, read_mask = (reader(x, 32, code) for x in operands)
    guard = instruction.guard

    def act(block: Block, warp: Warp) -> Any:
        lanes = warp.lanes(guard)
        if not lanes.any():
            return
        registers = warp.registers
        a, b, c = read_a(registers), read_b(registers).astype(int) & 31, read_c(registers).astype(int)
        _members(block, warp, lanes, read_mask(registers), instruction.text)
        segment = c >> 8 & 31
        largest = (_LANE & segment) | (c & 31 & ~segment)
        if mode == "up":
            source = _LANE - b
            valid = source >= largest
        elif mode == "down":
            source = _LANE + b
            valid = source <= largest
        elif mode == "bfly":
            source = _LANE ^ b
            valid = source <= largest
        else:
            source = (_LANE & segment) | (b & ~segment)
            valid = source <= largest
        source = np.where(valid, source, _LANE)
        if not lanes[source[lanes]].all():
            raise PtxError(f"{instruction.text!r} reads from an inactive lane")
        if isinstance(first, Reg):
            warp.write(first.index, a[source], lanes)
        if isinstance(second, Reg):
            warp.write(second.index, valid, lanes)

    return act


def _vote(instruction: Instruction, code: Code) -> Act:
    mode = instruction.opcode[2]
    target, operand, mask = instruction.operands
    read, read_mask, guard = reader(operand, 1, code), reader(mask, 32, code), instruction.guard
    assert isinstance(target, Reg)

    def act(block: Block, warp: Warp) -> Any:
        lanes = warp.lanes(guard)
        _members(block, warp, lanes, read_mask(warp.registers), instruction.text)
        votes = read(warp.registers) & lanes
        if mode == "ballot":
            value = np.full(32, int(sum(1 << int(x) for x in np.flatnonzero(votes))), u4)
        else:
            agreed = {
                "all": votes[lanes].all(),
                "any": votes.any(),
                "uni": votes[lanes].all() or not votes.any(),
            }
            value = np.full(32, bool(agreed[mode]))
        warp.write(target.index, value, lanes)

    return act


def _match(instruction: Instruction, code: Code) -> Act:
    """match.any: the lanes that hold the same value."""
    target, operand, mask = instruction.operands
    bits = type_of(instruction.opcode[-1])
    read, read_mask, guard = reader(operand, bits, code), reader(mask, 32, code), instruction.guard
    if instruction.opcode[1] != "any" or not isinstance(target, Reg):
        raise PtxError(f"unknown instruction {instruction.text!r}")
    index = target.index

    def act(block: Block, warp: Warp) -> Any:
        lanes = warp.lanes(guard)
        _members(block, warp, lanes, read_mask(warp.registers), instruction.text)
        values = read(warp.registers)
        equal = (values[:, None] == values[None, :]) & lanes[None, :]
        warp.write(index, (equal.astype(u8) << _LANE.astype(u8)).sum(1).astype(u4), lanes)

    return act


def _reduce_lanes(instruction: Instruction, code: Code) -> Act:
    operation, type_ = instruction.opcode[2], instruction.opcode[-1]
    target, operand, mask = instruction.operands
    read, read_mask, guard = reader(operand, 32, code), reader(mask, 32, code), instruction.guard
    assert isinstance(target, Reg)
    function: Any = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
                     "or": np.bitwise_or, "xor": np.bitwise_xor}[operation]  # fmt: skip
    view = "i4" if type_ == "s32" else "u4"

    def act(block: Block, warp: Warp) -> Any:
        lanes = warp.lanes(guard)
        _members(block, warp, lanes, read_mask(warp.registers), instruction.text)
        total = function.reduce(read(warp.registers)[lanes].view(view), dtype=view)
        warp.write(target.index, np.full(32, total, view).view(u4), lanes)

    return act


def _elect(instruction: Instruction, code: Code) -> Act:
    target, mask = instruction.operands
    assert isinstance(target, Pair)
    read_mask = reader(mask, 32, code)

    def act(block: Block, warp: Warp) -> Any:
        lanes = warp.active()
        _members(block, warp, lanes, read_mask(warp.registers), instruction.text)
        leader = int(np.argmax(lanes))
        if isinstance(target.first, Reg):
            warp.write(target.first.index, np.full(32, leader, u4), lanes)
        if isinstance(target.second, Reg):
            warp.write(target.second.index, np.int64(leader) == _LANE, lanes)

    return act


def _active_mask(instruction: Instruction, code: Code) -> Act:
    (target,) = instruction.operands
    assert isinstance(target, Reg)

    def act(block: Block, warp: Warp) -> Any:
        lanes = warp.active()
        warp.write(target.index, np.full(32, sum(1 << int(x) for x in np.flatnonzero(lanes)), u4), lanes)

    return act


DECODERS: dict[str, Callable[[Instruction, Code], Act]] = {
    "shfl.sync": _shuffle,
    "vote.sync": _vote,
    "match": _match,
    "redux.sync": _reduce_lanes,
    "elect.sync": _elect,
    "activemask": _active_mask,
}
