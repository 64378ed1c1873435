"""Ordinary loads and stores, and atomic operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx_emulator.errors import PtxError
from ptx_emulator.instructions.operands import address_reader, items_of, reader, type_of
from ptx_emulator.memory.spaces import SHARED_WINDOW
from ptx_emulator.numeric import UNSIGNED, Array, bf16_to_f4, f4_to_bf16
from ptx_emulator.parser import Instruction, Mem, Reg, Sym
from ptx_emulator.warp import Warp

if TYPE_CHECKING:
    from ptx_emulator.code import Code
    from ptx_emulator.emulator import Block

Act = Callable[["Block", Warp], Any]

_SPACES = {"global": "global", "shared": "shared", "shared::cta": "shared", "param": "param"}
_ORDER = {"volatile", "relaxed", "acq_rel", "acquire", "release", "weak", "cta", "gpu", "sys", "cluster"}
_HINTS = _ORDER | {"nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt"}


def _access(instruction: Instruction) -> tuple[str, int, int, bool]:
    """Space, bytes of an element, elements, and whether they are signed."""
    space, count = "generic", 1
    *modifiers, type_ = instruction.opcode[1:]
    for modifier in modifiers:
        if modifier in _SPACES:
            space = _SPACES[modifier]
        elif modifier in ("v2", "v4", "v8"):
            count = int(modifier[1])
        elif modifier not in _HINTS and not modifier.startswith(("L1::", "L2::")):
            raise PtxError(f"unknown modifier .{modifier} in {instruction.text!r}")
    return space, type_of(type_) // 8, count, type_[0] == "s"


def _load(instruction: Instruction, code: Code) -> Act:
    space, size, count, signed = _access(instruction)
    target, source = instruction.operands[:2]
    assert isinstance(source, Mem)
    targets = items_of(target)
    if space == "param":
        return _load_param(targets, source, size, signed, code)
    read_address = address_reader(source, code)
    guard = instruction.guard

    def act(block: Block, warp: Warp) -> Any:
        lanes = warp.lanes(guard)
        if not lanes.any():
            return
        addresses = read_address(warp.registers)[lanes]
        if space == "shared" or (space == "generic" and int(addresses[0]) < SHARED_WINDOW):
            values = block.shared.load(addresses, size, count)
            block.watch.read_shared(warp, addresses, size * count)
        else:
            values = block.memory.load(addresses, size, count)
        for register, value in zip(targets, values, strict=True):
            if isinstance(register, Reg):
                dtype = UNSIGNED[register.width]
                full = np.zeros(32, dtype)
                full[lanes] = _extend(value, signed, dtype)
                warp.write(register.index, full, lanes)

    return act


def _extend(value: Array, signed: bool, dtype: Any) -> Array:
    if signed and value.dtype != dtype:
        value = value.view(f"i{value.itemsize}").astype(f"i{np.dtype(dtype).itemsize}").view(dtype)
    return value.astype(dtype)


def _load_param(targets: tuple[Any, ...], source: Mem, size: int, signed: bool, code: Code) -> Act:
    assert isinstance(source.base, Sym)
    name = source.base.name

    def act(block: Block, warp: Warp) -> Any:
        data = block.launch.params[name]
        for number, register in enumerate(targets):
            first = source.offset + number * size
            value = int.from_bytes(data[first : first + size], "little", signed=signed)
            dtype = UNSIGNED[register.width]
            warp.registers[register.index] = np.full(32, value & ((1 << register.width) - 1), dtype)

    return act


def _store(instruction: Instruction, code: Code) -> Act:
    space, size, _, _ = _access(instruction)
    target, source = instruction.operands[:2]
    assert isinstance(target, Mem)
    read_address = address_reader(target, code)
    reads = [reader(x, size * 8, code) for x in items_of(source)]
    guard = instruction.guard

    def act(block: Block, warp: Warp) -> Any:
        lanes = warp.lanes(guard)
        if not lanes.any():
            return
        addresses = read_address(warp.registers)[lanes]
        values = np.stack([read(warp.registers)[lanes] for read in reads])
        if space == "shared" or (space == "generic" and int(addresses[0]) < SHARED_WINDOW):
            block.write_shared(warp, addresses, size, values)
        else:
            block.memory.store(addresses, size, values)

    return act


# Atomic operations


def _update(operation: str, type_: str) -> Callable[[Array, Array, Array | None], Array]:
    """(old, operand, second operand of cas) -> new, on arrays of bits."""
    if type_[0] == "f" or type_.startswith("bf"):
        view = {"f32": "f4", "f64": "f8", "f16": "f2", "f16x2": "f2"}.get(type_)
        function = {"add": np.add, "min": np.fmin, "max": np.fmax}[operation]
        if view is None:
            return lambda old, new, _: f4_to_bf16(
                function(bf16_to_f4(old.view("u2")), bf16_to_f4(new.view("u2")))
            ).view(old.dtype)
        return lambda old, new, _: function(old.view(view), new.view(view)).view(old.dtype)
    if operation == "cas":
        return lambda old, new, second: np.where(old == new, second, old)  # type: ignore[arg-type]
    if operation == "exch":
        return lambda old, new, _: new
    if operation == "inc":
        return lambda old, new, _: np.where(old >= new, 0, old + 1).astype(old.dtype)
    if operation == "dec":
        return lambda old, new, _: np.where((old == 0) | (old > new), new, old - 1).astype(old.dtype)
    combine: Any = {"add": np.add, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
                "min": np.minimum, "max": np.maximum}[operation]  # fmt: skip
    kind = "i" if type_[0] == "s" else "u"
    return lambda old, new, _: combine(
        old.view(f"{kind}{old.itemsize}"), new.view(f"{kind}{old.itemsize}")
    ).view(old.dtype)


def _atomic(instruction: Instruction, code: Code) -> Act:
    """atom and red: lanes one after the other."""
    *modifiers, type_ = [x for x in instruction.opcode[1:] if x != "noftz" and x not in _HINTS]
    space, count, operation = "generic", 1, ""
    for modifier in modifiers:
        if modifier in _SPACES:
            space = _SPACES[modifier]
        elif modifier in ("v2", "v4", "v8"):
            count = int(modifier[1])
        elif not modifier.startswith("L2::"):
            operation = modifier
    operands = list(instruction.operands)
    results = items_of(operands.pop(0)) if instruction.root == "atom" else ()
    place = operands.pop(0)
    assert isinstance(place, Mem)
    read_address = address_reader(place, code)
    bits = type_of(type_)
    reads = [reader(x, bits, code) for x in items_of(operands[0])]
    second = reader(operands[1], bits, code) if operation == "cas" else None
    update, size, guard = _update(operation, type_), bits // 8, instruction.guard

    def act(block: Block, warp: Warp) -> Any:
        lanes = warp.lanes(guard)
        if not lanes.any():
            return
        addresses = read_address(warp.registers).copy()
        values = [read(warp.registers) for read in reads]
        others = None if second is None else second(warp.registers)
        old = [np.zeros(32, UNSIGNED[bits]) for _ in reads]
        for lane in np.flatnonzero(lanes):
            address = addresses[lane : lane + 1]
            is_shared = space == "shared" or (space == "generic" and int(address[0]) < SHARED_WINDOW)
            if is_shared:
                before = block.shared.load(address, size, count)
            else:
                before = block.memory.load(address, size, count, atomic=True)
            after = [
                update(
                    before[i], values[i][lane : lane + 1], None if others is None else others[lane : lane + 1]
                )
                for i in range(count)
            ]
            if is_shared:
                block.shared.store(address, size, np.stack(after))
            else:
                block.memory.store(address, size, np.stack(after), atomic=True)
            for i in range(count):
                old[i][lane] = before[i, 0]
        for register, value in zip(results, old, strict=False):
            if isinstance(register, Reg):
                warp.write(register.index, value, lanes)

    return act


DECODERS: dict[str, Callable[[Instruction, Code], Act]] = {
    "ld": _load,
    "ldu": _load,
    "st": _store,
    "atom": _atomic,
    "red": _atomic,
}
