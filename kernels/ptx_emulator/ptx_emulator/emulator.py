"""Run a launch: its CTAs one after another, the warps of a CTA interleaved.

What a GPU leaves open is a choice here, made by `Mode`: which warp runs next (in turn, or at random with switches at
any memory access), when asynchronous work happens (at once, as late as possible, or at random), and the order of CTAs.
A correct kernel gives the same result under all of them.

README.md beside this package says what is not modelled.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from ptx_emulator.code import PARAM_BASE, PARAM_PAGE, Code
from ptx_emulator.errors import PtxError
from ptx_emulator.instructions.asynchronous import BulkLoad, BulkStore
from ptx_emulator.memory.mbarrier import Generation, Mbarrier
from ptx_emulator.memory.shared_races import BlindWatch, Watch
from ptx_emulator.memory.spaces import SHARED_BASE, SHARED_LIMIT, GlobalMemory, SharedMemory
from ptx_emulator.memory.tensor_map import TensorMap
from ptx_emulator.numeric import Array, u4
from ptx_emulator.parser import Param
from ptx_emulator.warp import EXIT, JUMP, WAIT, Warp


@dataclass(frozen=True, kw_only=True)
class Mode:
    """How to resolve what a GPU leaves open. Without a seed, warps run in turn, each until it waits."""

    asynchronous: Literal["eager", "lazy", "random"] = "eager"
    seed: int | None = None
    switch: float = 0.05  # chance of going on with another warp after an access, if there is a seed
    races: bool = True  # look for unordered accesses to shared memory
    # What the instruction set asks for and compilers leave out: a fence.proxy.async between cp.async and wgmma, and
    # between ordinary loads and a TMA load into the same place (Triton 3.6); no arithmetic between wgmma.fence and its
    # use (3.7, where ptxas puts it right).
    copy_fences: bool = False
    read_fences: bool = False
    register_fences: bool = True
    max_steps: int = 50_000_000


@dataclass
class Launch:
    """A kernel with its grid and arguments."""

    code: Code
    grid: tuple[int, int, int]
    shared: int
    params: dict[str, bytes]
    tensor_maps: dict[int, TensorMap]
    memory: GlobalMemory
    mode: Mode
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.mode.seed)

    def tensor_map(self, address: int) -> TensorMap:
        if address not in self.tensor_maps:
            raise PtxError(f"no tensor map at {address:#x}: only those passed as arguments are modelled")
        return self.tensor_maps[address]


def launch(
    code: Code,
    grid: Sequence[int],
    shared: int,
    arguments: Sequence[Any],
    tensors: Iterable[tuple[str, torch.Tensor]],
    mode: Mode,
) -> None:
    """Run a kernel. `arguments` are its parameters in order: numbers (pointers too) and tensor maps."""
    size = tuple(int(x) for x in (*grid, 1, 1)[:3])
    if any(x < 1 for x in size) or size[0] > 2**31 - 1 or max(size[1:]) > 65_535:
        raise PtxError(f"grid {size} is outside what a launch may ask for")
    if shared > SHARED_LIMIT:
        raise PtxError(f"{shared} bytes of shared memory, above {SHARED_LIMIT}")
    threads = code.program.threads
    if not 32 <= threads <= 1024 or threads % 32:
        raise PtxError(f"{threads} threads a block")
    names = code.program.params
    if len(arguments) != len(names):
        raise PtxError(f"{len(arguments)} arguments for {len(names)} parameters of {code.program.name}")
    params, tensor_maps = {}, {}
    for number, (param, argument) in enumerate(zip(names, arguments, strict=True)):
        if isinstance(argument, TensorMap):
            tensor_maps[PARAM_BASE + number * PARAM_PAGE] = argument
        params[param.name] = pack(param, argument)
    work = Launch(code, (size[0], size[1], size[2]), shared, params, tensor_maps, GlobalMemory(tensors), mode)
    blocks = [(x, y, z) for z in range(size[2]) for y in range(size[1]) for x in range(size[0])]
    if mode.seed is not None:
        work.rng.shuffle(blocks)
    with np.errstate(all="ignore"):
        for place in blocks:
            Block(work, place).run()


def pack(param: Param, value: Any) -> bytes:
    """A parameter's bytes."""
    if isinstance(value, TensorMap):
        if param.size != 128:
            raise PtxError(f"a tensor map for the parameter {param}")
        return bytes(128)
    if param.type == "f32":
        return struct.pack("<f", float(value))
    if param.type == "f64":
        return struct.pack("<d", float(value))
    if isinstance(value, float):
        raise PtxError(f"a float for the parameter {param}")
    return (int(value) & ((1 << 8 * param.size) - 1)).to_bytes(param.size, "little")


class Block:
    """One block of a launch while it runs."""

    def __init__(self, work: Launch, place: tuple[int, int, int]) -> None:
        self.launch = work
        self.place = place
        self.memory = work.memory
        self.shared = SharedMemory(work.shared)
        self.num_threads = work.code.program.threads
        self.rng = work.rng
        self.loads: list[BulkLoad] = []
        self.stores: list[BulkStore] = []
        self.named: dict[int, Generation] = {}
        self.steps = 0
        self.warps = [Warp(number, self._registers(number)) for number in range(self.num_threads // 32)]
        self.free_registers = 0
        for warp in self.warps:
            warp.num_registers = work.code.program.max_registers
        self.watch = (Watch if work.mode.races else BlindWatch)(self)
        self.memory.block = place[0] + work.grid[0] * (place[1] + work.grid[1] * place[2]) + 1

    def _registers(self, warp: int) -> list[Any]:
        program = self.launch.code.program
        undefined = {
            1: np.zeros(32, bool),
            8: np.full(32, 0xA5, np.uint8),
            16: np.full(32, 0xFFA5, np.uint16),
            32: np.full(32, 0xFFA5A5A5, np.uint32),
            64: np.full(32, 0xFFA5A5A5A5A5A5A5, np.uint64),
        }
        registers: list[Any] = [undefined[reg.width] for reg in program.registers]
        lanes = np.arange(32, dtype=u4)
        values = {
            "%tid.x": lanes + u4(32 * warp), "%laneid": lanes, "%warpid": np.full(32, warp, u4),
            "%ntid.x": np.full(32, self.num_threads, u4), "%clock64": np.zeros(32, np.uint64),
            "%lanemask_lt": (u4(1) << lanes) - u4(1),
        }  # fmt: skip
        zeros = (
            "%tid.y",
            "%tid.z",
            "%smid",
            "%cluster_ctaid.x",
            "%cluster_ctarank",
            "%clock",
            "%globaltimer_lo",
        )
        values |= {name: np.zeros(32, u4) for name in zeros}
        values |= {name: np.ones(32, u4) for name in ("%ntid.y", "%ntid.z", "%cluster_nctarank")}
        for axis, at, size in zip("xyz", self.place, self.launch.grid, strict=True):
            values |= {f"%ctaid.{axis}": np.full(32, at, u4), f"%nctaid.{axis}": np.full(32, size, u4)}
        values["%globaltimer"] = np.zeros(32, np.uint64)
        for name, reg in program.special.items():
            if name not in values:
                raise PtxError(f"unknown special register {name}")
            registers[reg.index] = values[name]
        return registers

    # Time

    def run(self) -> None:
        """Run all warps to their end."""
        mode = self.launch.mode
        turn = 0
        while True:
            ready = [warp for warp in self.warps if not warp.done and not warp.blocked]
            if mode.asynchronous == "random" and self.loads and self.rng.random() < 0.2:
                self._perform_load(self.rng.randrange(len(self.loads)))
                continue
            if mode.asynchronous == "random" and self.stores and self.rng.random() < 0.2:
                self.stores.pop(self.rng.randrange(len(self.stores))).perform(self)
                continue
            if not ready:
                if all(warp.done for warp in self.warps):
                    break
                if self.loads:
                    self._perform_load(0 if mode.seed is None else self.rng.randrange(len(self.loads)))
                    continue
                raise PtxError(f"deadlock in block {self.place}:\n{self._standing()}")
            if mode.seed is None:
                turn += 1
                warp = min(ready, key=lambda w: (w.number - turn) % len(self.warps))
            else:
                warp = self.rng.choice(ready)
            self._run(warp)
        self._end()

    def _run(self, warp: Warp) -> None:
        """Run one warp until it waits, ends or is switched away from."""
        nodes, registers = self.launch.code.nodes, warp.registers
        mode, rng = self.launch.mode, self.rng
        try:
            while True:
                if warp.others:
                    warp.reconverge()
                if warp.pc >= len(nodes):
                    raise PtxError("runs past the end of the program")
                node = nodes[warp.pc]
                if node.compute is not None:
                    if warp.mask is None:
                        node.compute(registers)
                    else:
                        before = [registers[i] for i in node.writes]
                        node.compute(registers)
                        for index, old in zip(node.writes, before, strict=True):
                            registers[index] = np.where(warp.mask, registers[index], old)
                    warp.pc += 1
                    continue
                assert node.act is not None
                status = node.act(self, warp)
                if status is None:
                    warp.pc += 1
                elif status is WAIT:
                    if not warp.rotate():
                        warp.blocked = True
                    return
                elif status is EXIT:
                    self._check_exit(warp)
                    return
                self.steps += 1
                if self.steps > mode.max_steps:
                    raise PtxError(f"more than {mode.max_steps} steps:\n{self._standing()}")
                if mode.seed is not None and status is not JUMP and rng.random() < mode.switch:
                    return
        except PtxError as error:
            raise self._located(error, warp) from None
        except (TypeError, AttributeError, ValueError, IndexError, KeyError) as error:
            raise self._located(PtxError(f"{type(error).__name__}: {error}"), warp) from error

    def progress(self) -> None:
        """Something happened that waiting warps may wait for."""
        for warp in self.warps:
            warp.blocked = False

    # Asynchronous work

    def eager(self) -> bool:
        """Whether work issued now is done now."""
        asynchronous = self.launch.mode.asynchronous
        return asynchronous == "eager" or (asynchronous == "random" and self.rng.random() < 0.3)

    def issue_load(self, load: BulkLoad) -> None:
        if self.eager():
            load.perform(self)
        else:
            self.loads.append(load)

    def issue_store(self, store: BulkStore) -> None:
        if self.eager():
            store.perform(self)
        else:
            self.stores.append(store)

    def _perform_load(self, index: int) -> None:
        load = self.loads.pop(index)
        try:
            load.perform(self)
        except PtxError as error:
            raise PtxError(f"{error}\n  in the late {load.text!r} of block {self.place}") from None
        self.progress()

    # Shared memory

    def write_shared(self, warp: Warp, addresses: Array, size: int, values: Array) -> None:
        """An ordinary write of (count, lanes) elements."""
        self.shared.check(addresses, size * len(values), "shared store")
        self.watch.write_shared(
            warp, addresses, size * len(values),
            lambda: bool((self.shared.bytes.gather(addresses, size, len(values)) == values).all()),
        )  # fmt: skip
        self.shared.bytes.scatter(addresses, size, values)

    # Barriers

    def init_barrier(self, warp: Warp, address: int, count: int) -> None:
        if address % 8 or not SHARED_BASE <= address <= self.shared.end - 8:
            raise PtxError(
                f"mbarrier at offset {address - SHARED_BASE} is misaligned or outside shared memory"
            )
        if address in self.shared.barriers:
            raise PtxError(
                f"mbarrier at offset {address - SHARED_BASE} is initialised twice without mbarrier.inval"
            )
        if not 1 <= count < 1 << 20:
            raise PtxError(f"mbarrier of {count} arrivals")
        self.watch.init(warp, address)
        self.shared.barriers[address] = Mbarrier(address - SHARED_BASE, count, count)

    def invalidate_barrier(self, warp: Warp, address: int) -> None:
        barrier = self.barrier(address)
        if any(load.barrier == address for load in self.loads):
            raise PtxError(
                f"mbarrier at offset {address - SHARED_BASE} is invalidated while a copy reports to it"
            )
        self.watch.inval(warp, address, barrier)
        del self.shared.barriers[address]

    def barrier(self, address: int) -> Mbarrier:
        if address not in self.shared.barriers:
            raise PtxError(f"no live mbarrier at offset {address - SHARED_BASE}")
        found: Mbarrier = self.shared.barriers[address]
        return found

    def complete_transaction(self, address: int, size: int) -> None:
        if self.barrier(address).complete(size):
            self.progress()

    def arrive(self, warp: Warp, number: int, threads: int) -> Generation:
        """A warp arrives at a named barrier."""
        if not 0 <= number < 16 or threads % 32 or threads < 32:
            raise PtxError(f"barrier {number} for {threads} threads")
        generation = self.named.setdefault(number, Generation(threads))
        if generation.threads != threads:
            raise PtxError(
                f"barrier {number} is used for {generation.threads} and for {threads} threads at once"
            )
        if warp.number in generation.arrived:
            raise PtxError(f"warp {warp.number} arrives at barrier {number} twice in one phase")
        generation.arrived.append(warp.number)
        self.watch.arrive_named(warp, generation)
        if 32 * len(generation.arrived) == threads:
            generation.open = False
            del self.named[number]
            self.progress()
        return generation

    # Ends and faults

    def _check_exit(self, warp: Warp) -> None:
        self.progress()
        if warp.stores or any(not s.done for group in warp.store_groups for s in group):
            raise PtxError(f"warp {warp.number} ends with bulk stores that it has not waited for")

    def _end(self) -> None:
        if self.loads:
            raise PtxError(f"block {self.place} ends while {self.loads[0].text!r} is under way")
        for store in self.stores:
            store.perform(self)
        self.stores.clear()

    def _where(self, warp: Warp) -> str:
        nodes = self.launch.code.nodes
        if warp.done or warp.pc >= len(nodes):
            return "ended"
        first = nodes[warp.pc].instructions[0]
        return f"{first.text[:160]!r} of {first.place}"

    def _standing(self) -> str:
        """Where every warp and barrier stands."""
        lines = [f"  warp {warp.number}: {self._where(warp)}" for warp in self.warps]
        if self.launch.code.program.max_registers:
            held = ", ".join(str(warp.num_registers) for warp in self.warps)
            lines.append(f"  registers of a thread, by warp: {held}; free in all: {self.free_registers}")
        lines += [f"  mbarrier at offset {b.offset}: {b}" for b in self.shared.barriers.values()]
        lines += [
            f"  barrier {number}: warps {g.arrived} of {g.threads // 32} arrived"
            for number, g in self.named.items()
        ]
        return "\n".join(lines)

    def _located(self, error: PtxError, warp: Warp) -> PtxError:
        if "\n  at " in str(error):
            return error
        name, mode = self.launch.code.program.name, self.launch.mode
        where = f"\n  at {self._where(warp)}\n  in {name}, block {self.place}, warp {warp.number}, {mode}"
        return PtxError(str(error) + where)
