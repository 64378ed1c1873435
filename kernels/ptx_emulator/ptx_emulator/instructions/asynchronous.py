"""mbarriers and asynchronous copies: TMA loads, stores and reductions, and cp.async.

Each copy is an object that can be carried out at once (eager), or as late as the program allows (lazy): a TMA load when
every warp waits, cp.async and bulk stores at the wait that names them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx_emulator.errors import PtxError
from ptx_emulator.instructions.operands import address_reader, reader
from ptx_emulator.memory.spaces import check_alignment
from ptx_emulator.memory.tensor_map import TensorMap
from ptx_emulator.numeric import Array
from ptx_emulator.parser import Imm, Instruction, Mem, Reg, Sink
from ptx_emulator.warp import WAIT, Warp

if TYPE_CHECKING:
    from ptx_emulator.code import Code
    from ptx_emulator.emulator import Block
    from ptx_emulator.memory.shared_races import Issued

Act = Callable[["Block", Warp], Any]


@dataclass
class BulkLoad:
    """A TMA load under way."""

    tensor_map: TensorMap
    coordinates: tuple[int, ...]
    target: int
    barrier: int
    text: str
    issued: Issued

    def perform(self, block: Block) -> None:
        self.tensor_map.load(self.coordinates, self.target, block.shared, block.memory)
        block.watch.load_write(self.issued, self.target, self.tensor_map.bytes, self.barrier)
        block.complete_transaction(self.barrier, self.tensor_map.bytes)


@dataclass
class BulkStore:
    """A TMA store or reduction under way."""

    tensor_map: TensorMap
    coordinates: tuple[int, ...]
    source: int
    operation: str | None
    text: str
    issued: Issued
    done: bool = False

    def perform(self, block: Block) -> None:
        if self.done:
            return
        self.done = True
        block.watch.async_read(self.issued, np.array([self.source]), self.tensor_map.bytes)
        self.tensor_map.store(self.coordinates, self.source, block.shared, block.memory, self.operation)


@dataclass
class LaneCopy:
    """cp.async of the active lanes."""

    sources: Array
    targets: Array
    size: int
    source_sizes: Array
    issued: Issued
    done: bool = False

    def perform(self, block: Block) -> None:
        if self.done:
            return
        self.done = True
        data = np.zeros((self.size, len(self.targets)), np.uint8)
        if (whole := self.source_sizes == self.size).any():
            data[:, whole] = (
                block.memory.load(self.sources[whole], 4, self.size // 4).T.copy().view(np.uint8).T
            )
        for lane in np.flatnonzero((self.source_sizes > 0) & ~whole):
            count = int(self.source_sizes[lane])
            data[:count, lane] = block.memory.load(self.sources[lane : lane + 1], 1, count)[:, 0]
        words = np.ascontiguousarray(data.T).view(np.uint32).T
        block.shared.check(self.targets, self.size, "cp.async")
        block.watch.copy_write(self.issued, self.targets, self.size)
        block.shared.store(self.targets, 4, words, "cp.async")


def _active_addresses(place: Any, code: Code) -> Callable[[Warp, Array], Array]:
    assert isinstance(place, Mem)
    read = address_reader(place, code)
    return lambda warp, lanes: read(warp.registers)[lanes]


# mbarrier


def _init(instruction: Instruction, code: Code) -> Act:
    place, count = instruction.operands
    addresses, read = _active_addresses(place, code), reader(count, 32, code)

    def act(block: Block, warp: Warp) -> Any:
        lanes = warp.lanes(instruction.guard)
        if lanes.any():
            for address, number in zip(addresses(warp, lanes), read(warp.registers)[lanes], strict=True):
                block.init_barrier(warp, int(address), int(number))

    return act


def _inval(instruction: Instruction, code: Code) -> Act:
    addresses = _active_addresses(instruction.operands[0], code)

    def act(block: Block, warp: Warp) -> Any:
        lanes = warp.lanes(instruction.guard)
        if lanes.any():
            for address in addresses(warp, lanes):
                block.invalidate_barrier(warp, int(address))

    return act


def _arrive(instruction: Instruction, code: Code) -> Act:
    """mbarrier.arrive, with or without expect_tx, and mbarrier.expect_tx."""
    operands = list(instruction.operands)
    if not isinstance(operands[0], Mem):
        if not isinstance(operands[0], Sink):
            raise PtxError(f"the state that {instruction.text!r} returns is not modelled")
        operands.pop(0)
    addresses = _active_addresses(operands[0], code)
    amount = reader(operands[1], 32, code) if len(operands) > 1 else None
    arrives = instruction.opcode[1] == "arrive"
    expects = "expect_tx" in instruction.opcode
    if "noComplete" in instruction.opcode:
        raise PtxError(f"unknown instruction {instruction.text!r}")

    def act(block: Block, warp: Warp) -> Any:
        lanes = warp.lanes(instruction.guard)
        if not lanes.any():
            return
        amounts = amount(warp.registers)[lanes] if amount is not None else np.ones(int(lanes.sum()), int)
        for address, number in zip(addresses(warp, lanes), amounts, strict=True):
            barrier = block.barrier(int(address))
            block.watch.touch(warp, int(address))
            if expects:
                barrier.expect(int(number))
            if arrives:
                block.watch.arrive(warp, barrier)
                if barrier.arrive(1 if expects else int(number)):
                    block.progress()

    return act


def _wait(instruction: Instruction, code: Code) -> Act:
    """try_wait and test_wait: the emulator's try_wait waits until the phase ends, as its time is not limited."""
    if "parity" not in instruction.opcode:
        raise PtxError(f"unknown instruction {instruction.text!r}")
    target, place, parity = instruction.operands[:3]
    addresses, read = _active_addresses(place, code), reader(parity, 32, code)
    assert isinstance(target, Reg)

    def act(block: Block, warp: Warp) -> Any:
        lanes = warp.lanes(instruction.guard)
        if not lanes.any():
            return None
        for address, bit in set(
            zip(addresses(warp, lanes).tolist(), read(warp.registers)[lanes].tolist(), strict=True)
        ):
            barrier = block.barrier(int(address))
            block.watch.touch(warp, int(address))
            if not barrier.has_ended(int(bit) & 1):
                return WAIT
            block.watch.wait(warp, barrier, int(bit) & 1)
        warp.write(target.index, np.ones(32, bool), lanes)
        return None

    return act


def _copy_arrive(instruction: Instruction, code: Code) -> Act:
    """cp.async.mbarrier.arrive: arrives once the lanes' copies so far have landed; done here at once."""
    addresses = _active_addresses(instruction.operands[0], code)
    if "noinc" not in instruction.opcode:
        raise PtxError(f"unknown instruction {instruction.text!r}")

    def act(block: Block, warp: Warp) -> Any:
        lanes = warp.lanes(instruction.guard)
        if not lanes.any():
            return
        for copy in [copy for group in warp.copy_groups for copy in group] + warp.copies:
            copy.perform(block)
            block.watch.finish(warp, copy.issued)
        for address in addresses(warp, lanes):
            barrier = block.barrier(int(address))
            block.watch.touch(warp, int(address))
            block.watch.arrive(warp, barrier)
            if barrier.arrive(1):
                block.progress()

    return act


# TMA


def _bulk_tensor(instruction: Instruction, code: Code) -> Act:
    """cp.async.bulk.tensor in both directions, and cp.reduce.async.bulk.tensor."""
    opcode = instruction.opcode
    if "im2col" in opcode or "multicast::cluster" in opcode:
        raise PtxError(f"unknown instruction {instruction.text!r}")
    first, second = instruction.operands[:2]
    assert isinstance(first, Mem) and isinstance(second, Mem)
    loads = opcode[opcode.index("tensor") + 2].startswith("shared")
    mapped, shared = (second, first) if loads else (first, second)
    map_address = address_reader(Mem(mapped.base, mapped.offset), code)
    coordinates = [reader(x, 32, code) for x in mapped.coordinates]
    shared_address = address_reader(shared, code)
    barrier_address = address_reader(instruction.operands[2], code) if loads else None  # type: ignore[arg-type]
    operation = opcode[opcode.index("bulk_group") - 1] if opcode[1] == "reduce" else None

    def act(block: Block, warp: Warp) -> Any:
        lanes = warp.lanes(instruction.guard)
        registers = warp.registers
        for lane in np.flatnonzero(lanes):
            tensor_map = block.launch.tensor_map(int(map_address(registers)[lane]))
            at = tuple(int(read(registers)[lane].astype(np.int32)) for read in coordinates)
            shared_at = int(shared_address(registers)[lane])
            if barrier_address is not None:
                barrier = int(barrier_address(registers)[lane])
                block.barrier(barrier)
                block.watch.touch(warp, barrier)
                issued = block.watch.issue(warp, "load")
                block.issue_load(BulkLoad(tensor_map, at, shared_at, barrier, instruction.text, issued))
            else:
                issued = block.watch.issue(warp, "store")
                store = BulkStore(tensor_map, at, shared_at, operation, instruction.text, issued)
                warp.stores.append(store)
                block.issue_store(store)

    return act


def _bulk_commit(instruction: Instruction, code: Code) -> Act:
    def act(block: Block, warp: Warp) -> Any:
        if warp.lanes(instruction.guard).any():
            warp.store_groups.append(warp.stores)
            warp.stores = []

    return act


def _bulk_wait(instruction: Instruction, code: Code) -> Act:
    """cp.async.bulk.wait_group, with or without .read: what it waits for is carried out."""
    (allowed,) = instruction.operands
    assert isinstance(allowed, Imm)
    keep = int(allowed.value)

    def act(block: Block, warp: Warp) -> Any:
        if warp.lanes(instruction.guard).any():
            while len(warp.store_groups) > keep:
                for store in warp.store_groups.pop(0):
                    store.perform(block)
                    block.watch.finish(warp, store.issued)

    return act


# cp.async


def _copy(instruction: Instruction, code: Code) -> Act:
    target, source, size, *rest = instruction.operands
    targets, sources = _active_addresses(target, code), _active_addresses(source, code)
    assert isinstance(size, Imm)
    num_bytes = int(size.value)
    amount = reader(rest[0], 32, code) if rest and not _is_policy(rest[0]) else None

    def act(block: Block, warp: Warp) -> Any:
        lanes = warp.lanes(instruction.guard)
        if not lanes.any():
            return
        sizes = (
            np.full(int(lanes.sum()), num_bytes)
            if amount is None
            else amount(warp.registers)[lanes].astype(int)
        )
        if (sizes > num_bytes).any():
            raise PtxError(f"{instruction.text!r} reads more than it writes")
        to, out_of = targets(warp, lanes), sources(warp, lanes)
        check_alignment(to, num_bytes, "cp.async to shared memory")
        check_alignment(out_of, num_bytes, "cp.async from global memory")
        copy = LaneCopy(out_of, to, num_bytes, sizes, block.watch.issue(warp, "copy"))
        warp.copies.append(copy)
        if block.eager():
            copy.perform(block)

    return act


def _is_policy(operand: Any) -> bool:
    return isinstance(operand, Reg) and operand.width == 64


def _copy_commit(instruction: Instruction, code: Code) -> Act:
    def act(block: Block, warp: Warp) -> Any:
        warp.copy_groups.append(warp.copies)
        warp.copies = []

    return act


def _copy_wait(instruction: Instruction, code: Code) -> Act:
    keep = int(instruction.operands[0].value) if instruction.operands else 0  # type: ignore[union-attr]
    everything = instruction.opcode[2] == "wait_all"

    def act(block: Block, warp: Warp) -> Any:
        if everything:
            warp.copy_groups.append(warp.copies)
            warp.copies = []
        while len(warp.copy_groups) > keep:
            for copy in warp.copy_groups.pop(0):
                copy.perform(block)
                block.watch.finish(warp, copy.issued)

    return act


DECODERS: dict[str, Callable[[Instruction, Code], Act]] = {
    "mbarrier.init": _init,
    "mbarrier.inval": _inval,
    "mbarrier.arrive": _arrive,
    "mbarrier.expect_tx": _arrive,
    "mbarrier.try_wait": _wait,
    "mbarrier.test_wait": _wait,
    "cp.async.mbarrier.arrive": _copy_arrive,
    "cp.async.bulk.tensor": _bulk_tensor,
    "cp.reduce.async.bulk": _bulk_tensor,
    "cp.async.bulk.commit_group": _bulk_commit,
    "cp.async.bulk.wait_group": _bulk_wait,
    "cp.async.ca": _copy,
    "cp.async.cg": _copy,
    "cp.async.commit_group": _copy_commit,
    "cp.async.wait_group": _copy_wait,
    "cp.async.wait_all": _copy_wait,
}
