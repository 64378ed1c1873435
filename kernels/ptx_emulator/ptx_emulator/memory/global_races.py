"""Races between blocks: they have no order, so what one writes no other may touch, unless both do it atomically.

Writing the value that is there already is not held against a program.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx_emulator.errors import PtxError
from ptx_emulator.numeric import Array

_MANY = -1  # stands for two blocks or more: one of them is always another one


class GlobalWatch:
    """Which block read, wrote and atomically updated each byte of a launch's tensors; 0 is none."""

    def __init__(self, start: int, end: int) -> None:
        self.origin = start
        self.reader, self.writer, self.updater = (np.zeros(end - start, np.int32) for _ in range(3))

    def _bytes(self, addresses: Array, size: int) -> Array:
        first = addresses.astype(np.int64) - self.origin
        return (first[:, None] + np.arange(size)[None, :]).ravel()

    def _find_race(
        self, where: Array, earlier: list[tuple[Array, str]], what: str, block: int, name: str
    ) -> PtxError | None:
        """The fault, if another block is among the `earlier` ones."""
        for blocks, how in earlier:
            others = blocks[where]
            bad = (others != 0) & (others != block)
            if bad.any():
                index = int(np.argmax(bad))
                who = int(others[index])
                before = "several blocks" if who == _MANY else f"block number {who - 1}"
                address = int(where[index]) + self.origin
                return PtxError(
                    f"race between blocks on {name} at {address:#x}: {what} by block number {block - 1}, "
                    f"{how} by {before}"
                )
        return None

    @staticmethod
    def _add(blocks: Array, where: Array, block: int) -> None:
        before = blocks[where]
        blocks[where] = np.where((before == 0) | (before == block), block, _MANY)

    def read(self, addresses: Array, size: int, block: int, name: str) -> None:
        where = self._bytes(addresses, size)
        earlier = [(self.writer, "written"), (self.updater, "updated atomically")]
        if (race := self._find_race(where, earlier, "read", block, name)) is not None:
            raise race
        self._add(self.reader, where, block)

    def write(self, addresses: Array, size: int, block: int, name: str, same: Callable[[], bool]) -> None:
        """`same` tells whether the values are those already there."""
        where = self._bytes(addresses, size)
        earlier = [(self.writer, "written"), (self.updater, "updated atomically"), (self.reader, "read")]
        if (race := self._find_race(where, earlier, "written", block, name)) is not None:
            if same():
                return
            raise race
        self.writer[where] = block

    def update(self, addresses: Array, size: int, block: int, name: str) -> None:
        """Atomic operations, in any order with those of others."""
        where = self._bytes(addresses, size)
        earlier = [(self.writer, "written"), (self.reader, "read")]
        if (race := self._find_race(where, earlier, "updated atomically", block, name)) is not None:
            raise race
        self._add(self.updater, where, block)
