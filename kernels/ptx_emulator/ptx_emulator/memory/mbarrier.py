"""Barriers: mbarrier objects in shared memory, and the block's sixteen named barriers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ptx_emulator.errors import PtxError

_LARGEST_TX = (1 << 20) - 1


@dataclass
class Mbarrier:
    """A phase ends when all arrivals are in and all expected bytes have come."""

    offset: int
    count: int
    pending: int
    tx: int = 0
    phase: int = 0
    gathered: Any = None  # what those that arrived knew (shared_races.py)
    ended: list[Any] = field(default_factory=lambda: [None, None])  # ... when a phase of either parity ended

    def arrive(self, count: int) -> bool:
        """Returns whether a phase ended."""
        self.pending -= count
        if self.pending < 0:
            raise PtxError(
                f"mbarrier at offset {self.offset}: more arrivals than the {self.count} it was made for"
            )
        return self._ended()

    def expect(self, size: int) -> None:
        self.tx += size
        self._check()

    def complete(self, size: int) -> bool:
        """Bytes have come; returns whether a phase ended."""
        self.tx -= size
        self._check()
        return self._ended()

    def _check(self) -> None:
        if abs(self.tx) > _LARGEST_TX:
            raise PtxError(f"mbarrier at offset {self.offset}: transaction count {self.tx} outside its range")

    def _ended(self) -> bool:
        if self.pending or self.tx:
            return False
        self.pending = self.count
        self.ended[self.phase % 2] = None if self.gathered is None else self.gathered.copy()
        self.phase += 1
        return True

    def has_ended(self, parity: int) -> bool:
        """Whether the phase of this parity is over."""
        return self.phase % 2 != parity

    def __str__(self) -> str:
        return f"phase {self.phase}, {self.pending} of {self.count} arrivals and {self.tx} bytes missing"


@dataclass
class Generation:
    """One use of a named barrier."""

    threads: int
    arrived: list[int] = field(default_factory=list)  # warps
    open: bool = True
    clock: Any = None
