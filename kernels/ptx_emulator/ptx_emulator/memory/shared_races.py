"""Races, found by the order that synchronisation gives to accesses, not by the luck of one schedule.

Inside a block, every access to shared memory is compared with earlier ones by vector clocks. An agent is a warp (its
lanes count as ordered), or a warp's wgmma, bulk stores or cp.async, or the TMA loads that report to one mbarrier.
Synchronisation is bar.sync, mbarrier arrive and wait, and the waits for asynchronous groups. A second clock tells which
ordinary writes a fence.proxy.async has made visible to asynchronous reads (wgmma, TMA stores).
Writing the value that is there already is not held against a program.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx_emulator.errors import PtxError
from ptx_emulator.memory.spaces import SHARED_BASE
from ptx_emulator.numeric import Array

if TYPE_CHECKING:
    from ptx_emulator.emulator import Block
    from ptx_emulator.memory.mbarrier import Generation, Mbarrier
    from ptx_emulator.warp import Warp

_KINDS = {"product": 1, "store": 2, "copy": 3}
_MAX_BARRIERS = 256


@dataclass
class Clock:
    """What an agent knows: the last moment of every agent that happened before, and the same for fenced writes."""

    seen: Array
    fenced: Array

    def copy(self) -> Clock:
        return Clock(self.seen.copy(), self.fenced.copy())

    def join(self, other: Clock) -> None:
        np.maximum(self.seen, other.seen, out=self.seen)
        np.maximum(self.fenced, other.fenced, out=self.fenced)


@dataclass
class Issued:
    """An asynchronous operation: what happened before it, and the moment that stands for its end."""

    clock: Clock
    component: int
    time: int
    note: int


class Watch:
    """The clocks and the shared memory's history of one block."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.num_warps = len(block.warps)
        size = 4 * self.num_warps + _MAX_BARRIERS
        self.clocks = [
            Clock(np.zeros(size, np.int32), np.zeros(size, np.int32)) for _ in range(self.num_warps)
        ]
        for number, clock in enumerate(self.clocks):
            clock.seen[number] = 1
        self.issued = np.zeros(size, np.int32)
        cells = block.shared.size
        self.writer = np.zeros(cells, np.int16)
        self.written = np.zeros(cells, np.int32)
        self.write_note = np.zeros(cells, np.int32)
        self.by_barrier = np.zeros(cells, np.bool_)  # written by mbarrier.init or inval
        self.reads: dict[
            int, tuple[Array, Array]
        ] = {}  # of each agent: the moment of its last read, and its note
        self.latest_read: dict[int, int] = {}
        self.barriers: dict[int, tuple[int, int]] = {}  # component and base time of a barrier at an address
        self.notes: list[str] = [""]
        self.note_of: dict[tuple[int, int], int] = {}

    # Notes: what an access was, for the report

    def _note(self, warp: Warp) -> int:
        key = (warp.number, warp.pc)
        if key not in self.note_of:
            self.note_of[key] = len(self.notes)
            instruction = self.block.launch.code.nodes[warp.pc].instructions[0]
            self.notes.append(f"{instruction.text[:120]!r} of warp {warp.number} ({instruction.place})")
        return self.note_of[key]

    # Accesses

    def _cells(self, addresses: Array, size: int) -> Array:
        first = addresses.astype(np.int64) - SHARED_BASE
        return (first[:, None] + np.arange(size)[None, :]).ravel()

    def _race(self, kind: str, cell: int, earlier: int, later: int) -> PtxError:
        return PtxError(
            f"race on shared memory at offset {cell} ({kind}):\n"
            f"  earlier: {self.notes[earlier]}\n  later: {self.notes[later]}\n  nothing orders them"
        )

    def _check_written(self, cells: Array, clock: Clock, note: int, kind: str) -> None:
        """Earlier writes must have happened before."""
        late = clock.seen[self.writer[cells]] < self.written[cells]
        if late.any():
            cell = int(cells[np.argmax(late)])
            raise self._race(kind, cell, int(self.write_note[cell]), note)

    def _check_fenced(self, cells: Array, clock: Clock, note: int) -> None:
        """Earlier ordinary writes must be fenced before an asynchronous operation reads or overwrites their bytes.

        Let through, as the compiler itself leaves them without a fence: the life of mbarriers and, unless the mode
        asks, writes by cp.async (Triton's pipelines feed wgmma with them).
        """
        writer = self.writer[cells]
        ordinary = (writer < self.num_warps) & ~self.by_barrier[cells]
        if self.block.launch.mode.copy_fences:
            ordinary |= (writer >= 3 * self.num_warps) & (writer < 4 * self.num_warps)
        late = ordinary & (clock.fenced[writer] < self.written[cells])
        if late.any():
            cell = int(cells[np.argmax(late)])
            raise PtxError(
                f"no fence.proxy.async between a write and an asynchronous access of shared memory at offset "
                f"{cell}:\n  write: {self.notes[int(self.write_note[cell])]}\n  access: {self.notes[note]}"
            )

    def _check_read(self, cells: Array, clock: Clock, note: int) -> None:
        """Earlier reads must have happened before a write."""
        for component, latest in self.latest_read.items():
            if clock.seen[component] < latest:
                times, notes = self.reads[component]
                late = times[cells] > clock.seen[component]
                if late.any():
                    cell = int(cells[np.argmax(late)])
                    raise self._race("write after read", cell, int(notes[cell]), note)

    def _check_reads_fenced(self, cells: Array, clock: Clock, note: int) -> None:
        """Earlier ordinary reads must be fenced before an asynchronous operation overwrites their bytes."""
        for component, (times, notes) in self.reads.items():
            late = times[cells] > clock.fenced[component]
            if component < self.num_warps and late.any():
                cell = int(cells[np.argmax(late)])
                raise PtxError(
                    f"no fence.proxy.async between a read and an asynchronous write of shared memory at offset "
                    f"{cell}:\n  read: {self.notes[int(notes[cell])]}\n  write: {self.notes[note]}"
                )

    def _record_read(self, cells: Array, component: int, time: int, note: int) -> None:
        if component not in self.reads:
            self.reads[component] = (np.zeros_like(self.written), np.zeros_like(self.written))
        times, notes = self.reads[component]
        times[cells] = time
        notes[cells] = note
        self.latest_read[component] = time

    def _record_write(self, cells: Array, component: int, time: int, note: int) -> None:
        self.writer[cells] = component
        self.written[cells] = time
        self.write_note[cells] = note
        self.by_barrier[cells] = False

    def read_shared(self, warp: Warp, addresses: Array, size: int) -> None:
        cells, clock, note = self._cells(addresses, size), self.clocks[warp.number], self._note(warp)
        self._check_written(cells, clock, note, "read after write")
        self._record_read(cells, warp.number, int(clock.seen[warp.number]), note)

    def write_shared(
        self, warp: Warp, addresses: Array, size: int, same: Callable[[], bool] = lambda: False
    ) -> None:
        """`same` tells whether the values are those already there."""
        cells, clock, note = self._cells(addresses, size), self.clocks[warp.number], self._note(warp)
        try:
            self._check_written(cells, clock, note, "write after write")
            self._check_read(cells, clock, note)
        except PtxError:
            if same():
                return
            raise
        self._record_write(cells, warp.number, int(clock.seen[warp.number]), note)

    # Asynchronous operations

    def issue(self, warp: Warp, kind: str) -> Issued:
        """A warp starts an operation; what it does next is not before that operation."""
        clock, note = self.clocks[warp.number], self._note(warp)
        component = 0 if kind == "load" else _KINDS[kind] * self.num_warps + warp.number
        if component:
            self.issued[component] += 1
        issued = Issued(clock.copy(), component, int(self.issued[component]), note)
        clock.seen[warp.number] += 1
        return issued

    def finish(self, warp: Warp, issued: Issued) -> None:
        """A warp has waited for the end of an operation."""
        clock = self.clocks[warp.number]
        clock.seen[issued.component] = max(int(clock.seen[issued.component]), issued.time)

    def async_read(self, issued: Issued, addresses: Array, size: int) -> None:
        cells = self._cells(addresses, size)
        self._check_written(cells, issued.clock, issued.note, "asynchronous read after write")
        self._check_fenced(cells, issued.clock, issued.note)
        self._record_read(cells, issued.component, issued.time, issued.note)

    def copy_write(self, issued: Issued, addresses: Array, size: int) -> None:
        """cp.async writes."""
        cells = self._cells(addresses, size)
        self._check_written(cells, issued.clock, issued.note, "write after write")
        self._check_read(cells, issued.clock, issued.note)
        self._record_write(cells, issued.component, issued.time, issued.note)

    def load_write(self, issued: Issued, address: int, size: int, barrier: int) -> None:
        """A TMA load writes and reports to a barrier."""
        cells = self._cells(np.array([address]), size)
        self._check_written(cells, issued.clock, issued.note, "bulk load after write")
        self._check_fenced(cells, issued.clock, issued.note)
        self._check_read(cells, issued.clock, issued.note)
        if self.block.launch.mode.read_fences:
            self._check_reads_fenced(cells, issued.clock, issued.note)
        component, base = self.barriers[barrier]
        state: Mbarrier = self.block.shared.barriers[barrier]
        self._record_write(cells, component, base + state.phase + 1, issued.note)
        state.gathered = self._joined(state.gathered, issued.clock)
        state.gathered.seen[component] = base + state.phase + 1

    # Synchronisation

    @staticmethod
    def _joined(into: Clock | None, clock: Clock) -> Clock:
        if into is None:
            return clock.copy()
        into.join(clock)
        return into

    def _write_barrier(self, warp: Warp, address: int) -> None:
        self.write_shared(warp, np.array([address]), 8)
        self.by_barrier[self._cells(np.array([address]), 8)] = True

    def init(self, warp: Warp, address: int) -> None:
        self._write_barrier(warp, address)
        if address not in self.barriers:
            if len(self.barriers) == _MAX_BARRIERS:
                raise PtxError(f"more than {_MAX_BARRIERS} mbarriers")
            self.barriers[address] = (4 * self.num_warps + len(self.barriers), 0)

    def inval(self, warp: Warp, address: int, barrier: Mbarrier) -> None:
        self._write_barrier(warp, address)
        component, base = self.barriers[address]
        self.barriers[address] = (component, base + barrier.phase + 1)

    def touch(self, warp: Warp, address: int) -> None:
        """Any use of a barrier must come after its initialisation and before its end."""
        self.read_shared(warp, np.array([address]), 8)

    def arrive(self, warp: Warp, barrier: Mbarrier) -> None:
        clock = self.clocks[warp.number]
        barrier.gathered = self._joined(barrier.gathered, clock)
        clock.seen[warp.number] += 1

    def wait(self, warp: Warp, barrier: Mbarrier, parity: int) -> None:
        """A wait has seen the end of a phase of this parity."""
        ended = barrier.ended[parity]
        if ended is not None:
            self.clocks[warp.number].join(ended)

    def arrive_named(self, warp: Warp, generation: Generation) -> None:
        clock = self.clocks[warp.number]
        generation.clock = self._joined(generation.clock, clock)
        clock.seen[warp.number] += 1

    def pass_named(self, warp: Warp, generation: Generation) -> None:
        self.clocks[warp.number].join(generation.clock)

    def proxy_fence(self, warp: Warp) -> None:
        clock = self.clocks[warp.number]
        np.maximum(clock.fenced, clock.seen, out=clock.fenced)
        clock.seen[warp.number] += 1


class BlindWatch(Watch):
    """Sees nothing: for speed, where only results are wanted."""

    def __init__(self, block: Block) -> None:
        self.nothing = Issued(Clock(np.zeros(0), np.zeros(0)), 0, 0, 0)

    def issue(self, warp: Warp, kind: str) -> Issued:
        return self.nothing

    def _ignore(self, *_: Any, **__: Any) -> None:
        return None

    read_shared = write_shared = finish = async_read = copy_write = load_write = init = inval = _ignore
    touch = arrive = wait = arrive_named = pass_named = proxy_fence = _ignore
