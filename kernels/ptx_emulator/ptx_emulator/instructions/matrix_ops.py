"""Matrix instructions: ldmatrix, stmatrix, mma.sync and wgmma."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx_emulator.errors import PtxError
from ptx_emulator.instructions import mma
from ptx_emulator.instructions.operands import address_reader, items_of, reader
from ptx_emulator.numeric import Array, f4, u4
from ptx_emulator.parser import Imm, Instruction, Mem, Reg, Vec
from ptx_emulator.warp import Warp

if TYPE_CHECKING:
    from ptx_emulator.code import Code
    from ptx_emulator.emulator import Block
    from ptx_emulator.memory.shared_races import Issued

Act = Callable[["Block", Warp], Any]


def _count(instruction: Instruction) -> int:
    return int(next(x for x in instruction.opcode if x in ("x1", "x2", "x4"))[1])


def _matrix_shape(instruction: Instruction) -> None:
    if "m8n8" not in instruction.opcode or instruction.opcode[-1] != "b16":
        raise PtxError(f"unknown instruction {instruction.text!r}")


def _load_matrix(instruction: Instruction, code: Code) -> Act:
    _matrix_shape(instruction)
    target, place = instruction.operands
    assert isinstance(place, Mem)
    registers, read, count = items_of(target), address_reader(place, code), _count(instruction)
    transposed = "trans" in instruction.opcode

    def act(block: Block, warp: Warp) -> Any:
        lanes = warp.lanes(instruction.guard)
        warp.whole(lanes, instruction.text)
        addresses = read(warp.registers)[: 8 * count]
        rows = np.ascontiguousarray(block.shared.load(addresses, 4, 4, "ldmatrix").T)  # (8 count, 4)
        block.watch.read_shared(warp, addresses, 16)
        for number, register in enumerate(registers):
            matrix = rows[8 * number : 8 * number + 8]
            if transposed:
                matrix = np.ascontiguousarray(matrix.view(np.uint16).T).view(u4)
            warp.write(register.index, matrix.reshape(32).copy(), lanes)

    return act


def _store_matrix(instruction: Instruction, code: Code) -> Act:
    _matrix_shape(instruction)
    place, source = instruction.operands
    assert isinstance(place, Mem)
    reads = [reader(x, 32, code) for x in items_of(source)]
    read, count, transposed = address_reader(place, code), _count(instruction), "trans" in instruction.opcode

    def act(block: Block, warp: Warp) -> Any:
        lanes = warp.lanes(instruction.guard)
        if not lanes.any():
            return
        warp.whole(lanes, instruction.text)
        addresses = read(warp.registers)[: 8 * count]
        matrices = [np.ascontiguousarray(x(warp.registers)).reshape(8, 4) for x in reads]
        if transposed:
            matrices = [np.ascontiguousarray(x.view(np.uint16).T).view(u4) for x in matrices]
        block.write_shared(warp, addresses, 4, np.concatenate(matrices).T)

    return act


def _multiply(instruction: Instruction, code: Code) -> Act:
    """mma.sync of 16 by 8 tiles with float32 sums."""
    shape, *layout, d_type, a_type, b_type, c_type = instruction.opcode[3:]
    shapes = {"bf16": "m16n8k16", "f16": "m16n8k16", "tf32": "m16n8k8"}
    known = a_type == b_type and shape == shapes.get(a_type) and (d_type, c_type) == ("f32", "f32")
    if not known or layout != ["row", "col"]:
        raise PtxError(f"unknown instruction {instruction.text!r}")
    target, *operands = instruction.operands
    results = items_of(target)
    a, b, c = ([reader(x, 32, code) for x in items_of(operand)] for operand in operands)

    def act(block: Block, warp: Warp) -> Any:
        lanes = warp.lanes(instruction.guard)
        warp.whole(lanes, instruction.text)
        left = mma.left_from_registers([x(warp.registers) for x in a], a_type)
        right = mma.right_from_registers([x(warp.registers) for x in b], a_type)
        total = mma.accumulators_to_matrix([x(warp.registers) for x in c]) + left @ right
        for register, value in zip(results, mma.matrix_to_accumulators(total), strict=True):
            warp.write(register.index, value, lanes)

    return act


@dataclass
class Product:
    """One warp's 16 rows of a wgmma under way."""

    text: str
    type_: str
    columns: int
    depth: int
    left: list[Array] | int  # A's registers or descriptor
    left_registers: list[Reg]
    right: int
    transposed: tuple[bool, bool]
    scales: tuple[int, int]
    accumulators: list[Any] | None
    sum_registers: list[Reg]
    first_row: int
    issued: Issued
    total: Array | None = None  # (16, n)
    result: list[Array] | None = None  # the same as registers

    def perform(self, block: Block) -> None:
        if self.result is not None:
            return
        if isinstance(self.left, int):
            rows = range(self.first_row, self.first_row + 16)
            left = self._operand(block, self.left, rows, self.transposed[0])
        else:
            left = mma.left_from_registers(self.left, self.type_)
        columns = range(self.columns)
        right = self._operand(block, self.right, columns, self.transposed[1])
        total = left @ right.T
        if self.scales != (1, 1):
            total = total * f4(self.scales[0] * self.scales[1])
        if self.accumulators is not None:
            total = self._sums_before(self.accumulators) + total
        self.total = total
        self.result = mma.matrix_to_accumulators(total)
        self.accumulators = None

    def check_registers(self, registers: list[Any]) -> None:
        """A and the sums must be left alone until the wait; later products may add to the same sums."""
        changed = [reg for reg in self.sum_registers if type(registers[reg.index]) is not mma.Pending]
        if isinstance(self.left, list):
            for reg, before in zip(self.left_registers, self.left, strict=True):
                now = registers[reg.index]
                # A write that no lane's predicate lets through makes a copy.
                if now is not before and (type(now) is mma.Pending or (now != before).any()):
                    changed.append(reg)
        if changed:
            raise PtxError(
                f"{changed[0].name} is written before the wgmma.wait_group that completes {self.text!r}"
            )

    @staticmethod
    def _sums_before(accumulators: list[Any]) -> Array:
        """What the accumulators hold, which an earlier product may have computed."""
        first = accumulators[0]
        if type(first) is mma.Pending and all(
            type(x) is mma.Pending and x.product is first.product and x.index == number
            for number, x in enumerate(accumulators)
        ):
            chained: Array = first.product.total
            return chained
        return mma.accumulators_to_matrix(
            [x.product.result[x.index] if type(x) is mma.Pending else x for x in accumulators]
        )

    def _operand(self, block: Block, descriptor: int, rows: range, transposed: bool) -> Array:
        """An operand in shared memory, (rows, k) in float32."""
        addresses = mma.operand_addresses(descriptor, rows, self.depth, self.type_, transposed)
        element = mma.ELEMENT[self.type_]
        bits = block.shared.load(addresses.ravel(), element, 1, "wgmma operand")
        block.watch.async_read(self.issued, addresses.ravel(), element)
        return mma.widen(bits, self.type_).reshape(addresses.shape)


def _product(instruction: Instruction, code: Code) -> Act:
    match = re.fullmatch(r"m64n(\d+)k(\d+)", instruction.opcode[4])
    d_type, a_type, b_type = instruction.opcode[5:8]
    if (
        match is None
        or d_type != "f32"
        or a_type != b_type
        or a_type not in mma.ELEMENT
        or len(instruction.opcode) > 8
    ):
        raise PtxError(f"unknown instruction {instruction.text!r}")
    columns, depth = int(match[1]), int(match[2])
    if columns % 8 or columns > 256 or depth * mma.ELEMENT[a_type] != 32:
        raise PtxError(f"unknown instruction {instruction.text!r}")
    target, left, right, keep, *flags = instruction.operands
    sum_registers = [x for x in items_of(target) if isinstance(x, Reg)]
    if len(sum_registers) != columns // 2:
        raise PtxError(f"{instruction.text!r} has {len(sum_registers)} accumulators")
    left_registers = [x for x in left.items if isinstance(x, Reg)] if isinstance(left, Vec) else []
    left_descriptor = None if isinstance(left, Vec) else reader(left, 64, code)
    right_descriptor, keeps = reader(right, 64, code), reader(keep, 1, code)
    numbers = [int(x.value) if isinstance(x, Imm) else 0 for x in flags]
    scales, transposes = (numbers[0], numbers[1]), [bool(x) for x in numbers[2:]]
    if left_descriptor is None:
        transposes = [False, *transposes]
    transposed = (transposes[0], transposes[1]) if len(transposes) == 2 else (False, False)

    def act(block: Block, warp: Warp) -> Any:
        warp.whole(warp.lanes(instruction.guard), instruction.text)
        if not warp.fenced:
            raise PtxError("no wgmma.fence before the first wgmma")
        state = warp.registers
        keep_sums = keeps(state)
        descriptor = right_descriptor(state)
        _uniform(keep_sums, instruction)
        _uniform(descriptor, instruction)
        a: list[Array] | int
        if left_descriptor is None:
            a = [state[reg.index] for reg in left_registers]
        else:
            value = left_descriptor(state)
            _uniform(value, instruction)
            a = int(value[0])
        sums = [state[reg.index] for reg in sum_registers] if keep_sums[0] else None
        fenced = (
            [*(a if isinstance(a, list) else []), *(sums or [])] if block.launch.mode.register_fences else []
        )
        for value in fenced:
            # Constants may come late: the compiler itself moves them across the fence.
            known = type(value) is mma.Pending or id(value) in warp.fenced or not value.flags.writeable
            if not known:
                raise PtxError("no wgmma.fence between writing a register and its use in wgmma")
        product = Product(
            instruction.text.split("{")[0].strip(), a_type, columns, depth, a, left_registers, int(descriptor[0]),
            transposed, scales, sums, sum_registers, 16 * (warp.number % 4), block.watch.issue(warp, "product"),
        )  # fmt: skip
        for number, reg in enumerate(sum_registers):
            state[reg.index] = mma.Pending(product, number)
        warp.products.append(product)
        if (
            block.eager()
            and all(x.result is not None for g in warp.product_groups for x in g)
            and all(x.result is not None for x in warp.products[:-1])
        ):
            product.perform(block)

    return act


def _uniform(values: Array, instruction: Instruction) -> None:
    if (values != values[0]).any():
        raise PtxError(f"the lanes of a warp disagree about an operand of {instruction.text!r}")


def _product_fence(instruction: Instruction, code: Code) -> Act:
    def act(block: Block, warp: Warp) -> Any:
        warp.whole(warp.lanes(instruction.guard), instruction.text)
        warp.fenced = {id(value): value for value in warp.registers}

    return act


def _product_commit(instruction: Instruction, code: Code) -> Act:
    def act(block: Block, warp: Warp) -> Any:
        warp.whole(warp.lanes(instruction.guard), instruction.text)
        warp.product_groups.append(warp.products)
        warp.products = []

    return act


def _product_wait(instruction: Instruction, code: Code) -> Act:
    (allowed,) = instruction.operands
    assert isinstance(allowed, Imm)
    keep = int(allowed.value)

    def act(block: Block, warp: Warp) -> Any:
        warp.whole(warp.lanes(instruction.guard), instruction.text)
        finished: set[int] = set()
        while len(warp.product_groups) > keep:
            for product in warp.product_groups.pop(0):
                product.perform(block)
                product.check_registers(warp.registers)
                block.watch.finish(warp, product.issued)
                finished.add(id(product))
        if not finished:
            return
        state = warp.registers
        for index, value in enumerate(state):
            if type(value) is mma.Pending and id(value.product) in finished:
                result = value.product.result[value.index]
                state[index] = result
                warp.fenced[id(result)] = result

    return act


DECODERS: dict[str, Callable[[Instruction, Code], Act]] = {
    "ldmatrix": _load_matrix,
    "stmatrix": _store_matrix,
    "mma.sync": _multiply,
    "wgmma.mma_async": _product,
    "wgmma.fence": _product_fence,
    "wgmma.commit_group": _product_commit,
    "wgmma.wait_group": _product_wait,
}
