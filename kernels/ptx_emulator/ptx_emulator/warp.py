"""One warp: registers, the place it has reached, and which lanes go on from there."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx_emulator.errors import PtxError
from ptx_emulator.numeric import Array
from ptx_emulator.parser import Reg

FULL = np.ones(32, bool)
FULL.flags.writeable = False

WAIT, JUMP, EXIT = "wait", "jump", "exit"


class Warp:
    """32 lanes. While they are together `mask` is None; lanes that went another way are kept in `others`."""

    def __init__(self, number: int, registers: list[Any]) -> None:
        self.number = number
        self.registers = registers
        self.pc = 0
        self.mask: Array | None = None
        self.others: list[tuple[int, Array]] = []
        self.blocked = False
        self.num_registers = 0  # of a thread, where the program counts them
        self.done = False
        self.arrived: Any = None  # the generation of the named barrier that this warp waits at
        self.copies: list[Any] = []  # cp.async issued since the last commit
        self.copy_groups: list[list[Any]] = []
        self.stores: list[Any] = []  # bulk stores issued since the last commit
        self.store_groups: list[list[Any]] = []
        self.products: list[Any] = []  # wgmma issued since the last commit
        self.product_groups: list[list[Any]] = []
        self.fenced: dict[int, Any] = {}  # register contents, by id, that wgmma may use

    def active(self) -> Array:
        return FULL if self.mask is None else self.mask

    def lanes(self, guard: Reg | None) -> Array:
        """The active lanes that a guard lets through."""
        if guard is None:
            return self.active()
        allowed: Array = self.registers[guard.index]
        if guard.negated:
            allowed = ~allowed
        return allowed if self.mask is None else allowed & self.mask

    def write(self, index: int, value: Array, lanes: Array) -> None:
        """Write a register in these lanes."""
        self.registers[index] = value if lanes is FULL else np.where(lanes, value, self.registers[index])

    def whole(self, lanes: Array, text: str) -> None:
        """All 32 lanes must execute this instruction."""
        if not lanes.all():
            raise PtxError(f"{text!r} must be executed by all 32 lanes, but lanes {np.flatnonzero(lanes)} do")

    def branch(self, target: int, taken: Array) -> None:
        """Send the lanes `taken` to `target`; the other active ones go on to the next node."""
        active = self.active()
        taken = taken & active
        if taken.all() if self.mask is None else (taken == active).all():
            self.pc = target
        elif not taken.any():
            self.pc += 1
        else:
            self.others.append((self.pc + 1, active & ~taken))
            self.pc, self.mask = target, taken

    def leave(self, lanes: Array) -> bool:
        """These lanes end; returns whether the warp is done."""
        rest = self.active() & ~lanes
        if rest.any():
            self.mask = rest
            self.pc += 1
            return False
        if self.others:
            self.pc, self.mask = self.others.pop()
            return False
        self.done = True
        return True

    def reconverge(self) -> None:
        """Go on with the lanes that are furthest behind, joined by those at the same place."""
        parts: dict[int, Array] = {self.pc: self.active()}
        for pc, mask in self.others:
            parts[pc] = parts[pc] | mask if pc in parts else mask
        self.pc = min(parts)
        mask = parts.pop(self.pc)
        self.mask = None if mask.all() else mask
        self.others = list(parts.items())

    def rotate(self) -> bool:
        """Go on with other lanes, because the current ones wait."""
        if not self.others:
            return False
        pc, mask = self.others.pop(0)
        self.others.append((self.pc, self.active()))
        self.pc, self.mask = pc, mask
        return True
