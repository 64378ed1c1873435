"""Every instruction that does more than compute, as a closure over (block, warp); here control flow and barriers.

A closure returns None to go on, or WAIT, JUMP (the program counter is set) or EXIT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ptx_emulator.errors import PtxError
from ptx_emulator.instructions import asynchronous, lane_ops, matrix_ops, memory_ops
from ptx_emulator.instructions.operands import reader
from ptx_emulator.parser import Imm, Instruction, Sym
from ptx_emulator.warp import EXIT, JUMP, WAIT, Warp

if TYPE_CHECKING:
    from ptx_emulator.code import Code
    from ptx_emulator.emulator import Block

Act = Callable[["Block", Warp], Any]


def decode(instruction: Instruction, code: Code) -> Act:
    """The closure for one instruction."""
    for table in _TABLES:
        for length in (4, 3, 2, 1):
            if (decoder := table.get(".".join(instruction.opcode[:length]))) is not None:
                return decoder(instruction, code)
    raise PtxError(f"unknown instruction {instruction.text!r} ({instruction.place})")


# Flow


def _branch(instruction: Instruction, code: Code) -> Act:
    (target,) = instruction.operands
    assert isinstance(target, Sym)
    place = code.labels[target.name]
    guard = instruction.guard

    def act(block: Block, warp: Warp) -> Any:
        if guard is None:
            warp.pc = place
        else:
            warp.branch(place, warp.lanes(guard))
        return JUMP

    return act


def _branch_table(instruction: Instruction, code: Code) -> Act:
    index, table = instruction.operands
    assert isinstance(table, Sym)
    read = reader(index, 32, code)
    places = [code.labels[name] for name in code.program.tables[table.name]]

    def act(block: Block, warp: Warp) -> Any:
        chosen = read(warp.registers)[warp.active()]
        if (chosen != chosen[0]).any():
            raise PtxError(f"lanes of a warp part at {instruction.text!r}")
        warp.pc = places[int(chosen[0])]
        return JUMP

    return act


def _leave(instruction: Instruction, code: Code) -> Act:
    guard = instruction.guard

    def act(block: Block, warp: Warp) -> Any:
        lanes = warp.lanes(guard)
        if not lanes.any():
            return None
        return EXIT if warp.leave(lanes) else JUMP

    return act


def _trap(instruction: Instruction, code: Code) -> Act:
    def act(block: Block, warp: Warp) -> Any:
        if warp.lanes(instruction.guard).any():
            raise PtxError(f"the kernel executes {instruction.text!r}")

    return act


def _nothing(instruction: Instruction, code: Code) -> Act:
    return lambda block, warp: None


# Between warps


def _named_barrier(instruction: Instruction, code: Code) -> Act:
    """bar.sync, bar.arrive and barrier.sync."""
    number = reader(instruction.operands[0], 32, code)
    count = reader(instruction.operands[1], 32, code) if len(instruction.operands) > 1 else None
    arrive_only = instruction.opcode[1] == "arrive" or "arrive" in instruction.opcode
    guard = instruction.guard

    def act(block: Block, warp: Warp) -> Any:
        lanes = warp.lanes(guard)
        if not lanes.any():
            return None
        if warp.arrived is None:
            warp.whole(lanes, instruction.text)
            threads = int(count(warp.registers)[0]) if count is not None else block.num_threads
            generation = block.arrive(warp, int(number(warp.registers)[0]), threads)
            if arrive_only:
                return None
            warp.arrived = generation
        if warp.arrived.open:
            return WAIT
        block.watch.pass_named(warp, warp.arrived)
        warp.arrived = None
        return None

    return act


def _fence(instruction: Instruction, code: Code) -> Act:
    is_proxy = "proxy" in instruction.opcode

    def act(block: Block, warp: Warp) -> Any:
        if is_proxy and warp.lanes(instruction.guard).any():
            block.watch.proxy_fence(warp)

    return act


def _set_registers(instruction: Instruction, code: Code) -> Act:
    """setmaxnreg: taking more waits until other warps of the block have given enough back."""
    (amount,) = instruction.operands
    if not isinstance(amount, Imm) or amount.value % 8 or not 24 <= amount.value <= 256:
        raise PtxError(f"{instruction.text!r}: a multiple of 8 from 24 to 256 is needed")
    if not code.program.max_registers:
        raise PtxError(f"{instruction.text!r} in a kernel without .maxnreg")
    wanted, takes = int(amount.value), instruction.opcode[1] == "inc"

    def act(block: Block, warp: Warp) -> Any:
        warp.whole(warp.lanes(instruction.guard), instruction.text)
        more = 32 * (wanted - warp.num_registers)
        if (more < 0) if takes else (more > 0):
            raise PtxError(f"{instruction.text!r} where a thread has {warp.num_registers} registers")
        if more > block.free_registers:
            return WAIT
        block.free_registers -= more
        warp.num_registers = wanted
        if more < 0:
            block.progress()
        return None

    return act


_DECODERS: dict[str, Callable[[Instruction, Code], Act]] = {
    "bra": _branch,
    "brx.idx": _branch_table,
    "ret": _leave,
    "exit": _leave,
    "trap": _trap,
    "brkpt": _trap,
    "bar.sync": _named_barrier,
    "bar.arrive": _named_barrier,
    "barrier.sync": _named_barrier,
    "barrier.arrive": _named_barrier,
    "bar.warp.sync": _nothing,
    "fence": _fence,
    "membar": _fence,
    "setmaxnreg": _set_registers,
    "griddepcontrol": _nothing,
    "nanosleep": _nothing,
    "prefetch": _nothing,
    "prefetchu": _nothing,
}

_TABLES: list[dict[str, Callable[..., Act]]] = [
    _DECODERS,
    *(x.DECODERS for x in (memory_ops, lane_ops, asynchronous, matrix_ops)),
]
