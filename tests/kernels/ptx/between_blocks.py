"""Races between blocks: they have no order, so what one writes no other may touch, unless both do it atomically.

Writing the value that is there already is not held against a program.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .errors import PtxError
from .numeric import Array

CELL = 1  # bytes that are watched as one
_ATOMIC = -1


class GlobalWatch:
    """Which block wrote and which read each cell of a launch's tensors."""

    def __init__(self, start: int, end: int) -> None:
        self.origin = start // CELL * CELL
        cells = -(-(end - self.origin) // CELL) + 8
        self.writer = np.zeros(cells, np.int32)
        self.reader = np.zeros(cells, np.int32)

    def _cells(self, addresses: Array, size: int) -> Array:
        first = (addresses.astype(np.int64) - self.origin) // CELL
        return first if size <= CELL else (first[:, None] + np.arange(size // CELL)[None, :]).ravel()

    def _race(self, cells: Array, bad: Array, what: str, block: int, other: Array, name: str) -> PtxError:
        index = int(np.argmax(bad))
        who = int(other[index])
        before = "atomic operations of blocks" if who == _ATOMIC else f"block number {who - 1}"
        offset = int(cells[index]) * CELL + self.origin
        return PtxError(
            f"race between blocks on {name} at {offset:#x}: {what} by block number {block - 1} and {before}"
        )

    def read(self, addresses: Array, size: int, block: int, name: str) -> None:
        cells = self._cells(addresses, size)
        writer = self.writer[cells]
        bad = (writer != 0) & (writer != block)
        if bad.any():
            raise self._race(cells, bad, "read of what was written", block, writer, name)
        self.reader[cells] = block

    def write(self, addresses: Array, size: int, block: int, name: str, same: Callable[[], bool]) -> None:
        cells = self._cells(addresses, size)
        for other, what in (
            (self.writer[cells], "write of what was written"),
            (self.reader[cells], "write of what was read"),
        ):
            bad = (other != 0) & (other != block)
            if bad.any():
                if same():
                    return
                raise self._race(cells, bad, what, block, other, name)
        self.writer[cells] = block

    def update(self, addresses: Array, size: int, block: int, name: str) -> None:
        """Atomic operations, in any order with those of others."""
        cells = self._cells(addresses, size)
        writer = self.writer[cells]
        bad = (writer != 0) & (writer != block) & (writer != _ATOMIC)
        if bad.any():
            raise self._race(cells, bad, "atomic update of what was written", block, writer, name)
        self.writer[cells] = _ATOMIC
