"""TMA: descriptors with the rules that cuTensorMapEncodeTiled enforces, and the copies that use them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ptx_emulator.errors import PtxError
from ptx_emulator.memory.spaces import GlobalMemory, SharedMemory
from ptx_emulator.numeric import Array, bf16_to_f4, f4_to_bf16

SWIZZLE_SPANS = {0: None, 1: 32, 2: 64, 3: 128}
# CUtensorMapDataType
_INTEGERS = range(6)
_FLOATS = {6: "f2", 7: "f4", 8: "f8", 9: "bf16", 10: "f4", 11: "f4", 12: "f4"}


def swizzled(addresses: Array, mode: int) -> Array:
    """Where a byte lies under a swizzle (1: 32 bytes, 2: 64, 3: 128): 16-byte pieces permuted by bits 7 to 9."""
    if mode == 0:
        return addresses
    permuted: Array = addresses ^ (((addresses >> 7) & ((1 << mode) - 1)) << 4)
    return permuted


@dataclass(frozen=True)
class TensorMap:
    """A CUtensorMap. Dimensions go from the innermost out, strides are in bytes (the first is the element's size)."""

    address: int
    element: int
    type: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int
    nan_fill: bool

    @staticmethod
    def encode(
        address: int,
        swizzle: int,
        element: int,
        type_: int,
        box: Sequence[int],
        shape: Sequence[int],
        strides: Sequence[int],
        padding: int,
    ) -> TensorMap:
        """Build one from Triton's arguments (outermost first, strides in elements), or refuse as the driver would."""
        rank = len(box)
        tensor_map = TensorMap(
            address,
            element,
            type_,
            tuple(reversed([int(x) for x in shape])),
            (element, *(element * int(x) for x in reversed(list(strides)[:-1]))),
            tuple(reversed([int(x) for x in box])),
            swizzle,
            padding == 1,
        )
        problems = []
        if not 1 <= rank <= 5 or rank != len(shape) or rank != len(strides):
            problems.append(f"rank {rank}")
        if address % 16:
            problems.append(f"address {address:#x} is not a multiple of 16")
        if any(not 1 <= x <= 1 << 32 for x in tensor_map.shape):
            problems.append(f"shape {tensor_map.shape} outside 1 to 2^32")
        if any(x % 16 or not 0 <= x < 1 << 40 for x in tensor_map.strides[1:]):
            problems.append(f"byte strides {tensor_map.strides[1:]} are not multiples of 16 below 2^40")
        if any(not 1 <= x <= 256 for x in tensor_map.box):
            problems.append(f"box {tensor_map.box} outside 1 to 256")
        inner = tensor_map.box[0] * element
        if inner % 16:
            problems.append(f"inner box of {inner} bytes is not a multiple of 16")
        span = SWIZZLE_SPANS[swizzle]
        if span is not None and inner > span:
            problems.append(f"inner box of {inner} bytes is wider than the swizzle's {span}")
        if problems:
            raise PtxError("cuTensorMapEncodeTiled refuses: " + "; ".join(problems))
        return tensor_map

    @property
    def bytes(self) -> int:
        """What one box moves."""
        return int(np.prod(self.box)) * self.element

    def _box(self, coordinates: Sequence[int], shared_address: int) -> tuple[Array, Array, Array]:
        """Global addresses, whether each element lies inside the tensor, and shared addresses."""
        if len(coordinates) != len(self.box):
            raise PtxError(f"{len(coordinates)} coordinates for a tensor map of rank {len(self.box)}")
        if shared_address % 128:
            raise PtxError(
                f"a bulk tensor copy's shared address {shared_address:#x} is not a multiple of 128"
            )
        offsets = np.zeros((), np.int64)
        inside = np.ones((), bool)
        for coordinate, size, stride, width in zip(
            coordinates, self.shape, self.strides, self.box, strict=True
        ):
            position = coordinate + np.arange(width)
            offsets = (position * stride)[(...,) + (None,) * offsets.ndim] + offsets
            inside = ((position >= 0) & (position < size))[(...,) + (None,) * inside.ndim] & inside
        linear = shared_address + np.arange(offsets.size) * self.element
        return self.address + offsets.ravel(), inside.ravel(), swizzled(linear, self.swizzle)

    def load(
        self, coordinates: Sequence[int], shared_address: int, shared: SharedMemory, memory: GlobalMemory
    ) -> None:
        """Copy a box to shared memory; outside the tensor are zeros (or NaN)."""
        addresses, inside, targets = self._box(coordinates, shared_address)
        fill = 0
        if self.nan_fill:
            fill = {2: 0x7FFF, 4: 0x7FFFFFFF}[self.element]
        values = np.full((1, len(addresses)), fill, shared.bytes.views[self.element].dtype)
        if inside.any():
            values[:, inside] = memory.load(addresses[inside], self.element, 1)
        shared.store(targets, self.element, values, "bulk tensor load")

    def store(self, coordinates: Sequence[int], shared_address: int, shared: SharedMemory, memory: GlobalMemory,
              operation: str | None = None) -> None:  # fmt: skip
        """Copy (or reduce) a box from shared memory; what lies outside the tensor is dropped."""
        addresses, inside, sources = self._box(coordinates, shared_address)
        values = shared.load(sources, self.element, 1, "bulk tensor store")[:, inside]
        if not inside.any():
            return
        if operation is not None:
            before = memory.load(addresses[inside], self.element, 1, atomic=True)
            values = self._reduce(before, values, operation)
        memory.store(addresses[inside], self.element, values, atomic=operation is not None)

    def _reduce(self, old: Array, new: Array, operation: str) -> Array:
        function = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
                    "or": np.bitwise_or, "xor": np.bitwise_xor}[operation]  # fmt: skip
        if self.type in _INTEGERS:
            if self.type in (3, 5) and operation in ("min", "max"):
                signed = {4: np.int32, 8: np.int64}[self.element]
                return np.asarray(function(old.view(signed), new.view(signed))).view(old.dtype)
            return np.asarray(function(old, new))
        name = _FLOATS[self.type]
        if name == "bf16":
            return f4_to_bf16(function(bf16_to_f4(old), bf16_to_f4(new)))
        return np.asarray(function(old.view(name), new.view(name))).view(old.dtype)
