"""Strict memory: global memory made of the tensors of a launch, and the shared memory of one block.

Every access is checked: inside a tensor (or the allocation), aligned to its size. Shared memory starts as 0xFF bytes,
a NaN in every floating type.
"""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ptx_emulator.errors import PtxError
from ptx_emulator.memory.global_races import GlobalWatch
from ptx_emulator.numeric import UNSIGNED, Array

SHARED_BASE = 1024  # where a block's shared memory begins: the first KiB belongs to the system
SHARED_LIMIT = 232_448
_WATCHED = 1 << 28  # bytes: larger tensors are not watched for races between blocks
SHARED_WINDOW = 1 << 24  # generic addresses below this one are of shared memory


class Bytes:
    """A stretch of memory seen as unsigned integers of any size; `origin` is the address of its first byte."""

    def __init__(self, buffer: Array, origin: int) -> None:
        self.origin = origin
        self.views = {
            size: buffer[: len(buffer) // size * size].view(UNSIGNED[size * 8]) for size in (1, 2, 4, 8)
        }

    def gather(self, addresses: Array, size: int, count: int) -> Array:
        """(count, lanes) elements of `size` bytes, `count` neighbours from each address."""
        first = (addresses.astype(np.int64) - self.origin) // size
        return self.views[size][first[None, :] + np.arange(count)[:, None]]

    def scatter(self, addresses: Array, size: int, values: Array) -> None:
        """Write (count, lanes) elements."""
        first = (addresses.astype(np.int64) - self.origin) // size
        self.views[size][first[None, :] + np.arange(len(values))[:, None]] = values


@dataclass
class Region:
    """The memory that one argument covers."""

    start: int
    end: int
    name: str
    bytes: Bytes
    watch: GlobalWatch | None = None


def region_of(tensor: torch.Tensor, name: str) -> Region:
    """The bytes from a tensor's first element to the end of its last row, as far as its storage goes.

    So a view of a larger tensor is held to its own part, and may use what pads its rows.
    """
    if tensor.device.type != "cpu":
        raise PtxError(f"{name} is on {tensor.device}; the emulator takes CPU tensors")
    start = tensor.data_ptr()
    elements = max(
        [size * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)], default=1
    )
    storage = tensor.untyped_storage()
    end = min(start + max(elements, 1) * tensor.element_size(), storage.data_ptr() + storage.nbytes())
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = max(end, start + (last + 1) * tensor.element_size())
    origin = start // 16 * 16
    buffer = (ctypes.c_uint8 * (-(-(end - origin) // 16) * 16)).from_address(origin)
    return Region(start, end, name, Bytes(np.ctypeslib.as_array(buffer), origin))


class GlobalMemory:
    """The tensors of one launch."""

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.regions = sorted(
            (region_of(t, n) for n, t in tensors if t.numel()), key=lambda r: (r.start, -r.end)
        )
        # Arguments may be views of one another: an access must lie in one of them.
        self.starts = [region.start for region in self.regions]
        self.last: Region | None = None
        self.block = 1  # the number of the block that runs, from 1
        self._watch()

    def _watch(self) -> None:
        """Give regions that overlap one history."""
        group: list[Region] = []
        end = 0
        for region in [*self.regions, None]:
            if group and (region is None or region.start >= end):
                start = group[0].start
                watch = GlobalWatch(start, end) if end - start <= _WATCHED else None
                for member in group:
                    member.watch = watch
                group = []
            if region is not None:
                group.append(region)
                end = max(end, region.end) if len(group) > 1 else region.end

    def region(self, low: int, high: int) -> Region | None:
        """The region that holds all bytes from `low` to `high`."""
        if self.last is not None and self.last.start <= low and high <= self.last.end:
            return self.last
        for index in range(bisect.bisect_right(self.starts, low) - 1, -1, -1):
            region = self.regions[index]
            if high <= region.end:
                self.last = region
                return region
        return None

    def check(self, addresses: Array, size: int, what: str) -> Region | None:
        """The one region of all these accesses, or None if they lie in several; an error if in none."""
        check_alignment(addresses, size, what)
        if (found := self.region(int(addresses.min()), int(addresses.max()) + size)) is not None:
            return found
        for lane, address in enumerate(addresses.tolist()):
            if self.region(address, address + size) is None:
                raise PtxError(f"{what} of {size} bytes at {self.describe(address)} (active lane {lane})")
        return None

    def describe(self, address: int) -> str:
        """An address in terms of the nearest arguments."""
        near = [
            f"{region.name}{address - region.start:+d} (of {region.end - region.start} bytes)"
            for region in sorted(
                self.regions, key=lambda r: min(abs(address - r.start), abs(address - r.end))
            )[:2]
        ]
        return f"{address:#x}, outside every argument; near " + ", ".join(near) if near else f"{address:#x}"

    def load(self, addresses: Array, size: int, count: int, atomic: bool = False) -> Array:
        """`atomic`: the first half of an atomic operation."""
        region = self.check(addresses, size * count, "global load")
        if region is not None:
            if region.watch is not None and not atomic:
                region.watch.read(addresses, size * count, self.block, region.name)
            return region.bytes.gather(addresses, size, count)
        return np.concatenate(
            [self.load(addresses[i : i + 1], size, count, atomic) for i in range(len(addresses))], 1
        )

    def store(self, addresses: Array, size: int, values: Array, atomic: bool = False) -> None:
        region = self.check(addresses, size * len(values), "global store")
        if region is None:
            for i in range(len(addresses)):
                self.store(addresses[i : i + 1], size, values[:, i : i + 1], atomic)
            return
        if region.watch is not None and atomic:
            region.watch.update(addresses, size * len(values), self.block, region.name)
        elif region.watch is not None:
            history = region.bytes
            region.watch.write(
                addresses, size * len(values), self.block, region.name,
                lambda: bool((history.gather(addresses, size, len(values)) == values).all()),
            )  # fmt: skip
        region.bytes.scatter(addresses, size, values)


def check_alignment(addresses: Array, size: int, what: str) -> None:
    """An access must begin at a multiple of its size."""
    if size > 1 and (addresses & addresses.dtype.type(size - 1)).any():
        lane = int(np.argmax((addresses & addresses.dtype.type(size - 1)) != 0))
        raise PtxError(
            f"{what} of {size} bytes at {int(addresses[lane]):#x} is misaligned (active lane {lane})"
        )


class SharedMemory:
    """One block's shared memory with its barriers."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.end = SHARED_BASE + size
        self.bytes = Bytes(np.full(-(-size // 16) * 16, 0xFF, np.uint8), SHARED_BASE)
        self.barriers: dict[int, Any] = {}

    def check(self, addresses: Array, size: int, what: str) -> None:
        check_alignment(addresses, size, what)
        low, high = int(addresses.min()), int(addresses.max()) + size
        if low < SHARED_BASE or high > self.end:
            first, last = low - SHARED_BASE, high - size - SHARED_BASE
            raise PtxError(f"{what} of {size} bytes at offset {first} to {last} of {self.size} bytes")
        for barrier in self.barriers:
            if low < barrier + 8 and high > barrier:
                inside = (addresses < barrier + 8) & (addresses + addresses.dtype.type(size) > barrier)
                if inside.any():
                    raise PtxError(f"{what} touches the live barrier at offset {barrier - SHARED_BASE}")

    def load(self, addresses: Array, size: int, count: int, what: str = "shared load") -> Array:
        self.check(addresses, size * count, what)
        return self.bytes.gather(addresses, size, count)

    def store(self, addresses: Array, size: int, values: Array, what: str = "shared store") -> None:
        self.check(addresses, size * len(values), what)
        self.bytes.scatter(addresses, size, values)
