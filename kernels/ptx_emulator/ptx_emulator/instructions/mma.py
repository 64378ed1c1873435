"""Matrix products: register fragments, shared-memory descriptors of wgmma, and mma.sync."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ptx_emulator.errors import PtxError
from ptx_emulator.memory.tensor_map import swizzled
from ptx_emulator.numeric import Array, bf16_to_f4, f2_to_f4, f4, truncate_tf32, u2, u4

_LANES = np.arange(32)
_ROW, _QUAD = _LANES // 4, _LANES % 4
ELEMENT = {"bf16": 2, "f16": 2, "tf32": 4}


def widen(bits: Array, type_: str) -> Array:
    """The bits of an operand as float32."""
    if type_ == "bf16":
        return bf16_to_f4(bits.view(u2))
    if type_ == "f16":
        return f2_to_f4(bits.view(u2))
    return truncate_tf32(bits.view(u4)).view(f4)


def left_from_registers(registers: list[Array], type_: str) -> Array:
    """A (16, k) from four registers of a warp: rows r and r + 8, then the same with the upper half of k."""
    per = 4 // ELEMENT[type_]
    number, part = np.arange(4)[:, None, None], np.arange(per)
    matrix = np.empty((16, 8 * per), f4)
    rows, columns = _ROW[:, None] + 8 * (number % 2), _QUAD[:, None] * per + part + 4 * per * (number // 2)
    matrix[rows, columns] = widen(np.stack(registers), type_).reshape(4, 32, per)
    return matrix


def right_from_registers(registers: list[Array], type_: str) -> Array:
    """B (k, 8) from two registers of a warp."""
    per = 4 // ELEMENT[type_]
    number, part = np.arange(2)[:, None, None], np.arange(per)
    matrix = np.empty((8 * per, 8), f4)
    rows = _QUAD[:, None] * per + part + 4 * per * number
    matrix[rows, np.broadcast_to(_ROW[:, None], rows.shape)] = widen(np.stack(registers), type_).reshape(
        2, 32, per
    )
    return matrix


@functools.lru_cache
def _accumulator_places(count: int) -> tuple[Array, Array]:
    number = np.arange(count)[:, None]
    return _ROW[None] + 8 * (number // 2 % 2), _QUAD[None] * 2 + number % 2 + 8 * (number // 4)


def accumulators_to_matrix(registers: list[Array]) -> Array:
    """(16, n) from n / 2 registers: pairs of columns, rows r and r + 8 in turn."""
    matrix = np.empty((16, len(registers) * 2), f4)
    matrix[_accumulator_places(len(registers))] = np.stack(registers).view(f4)
    return matrix


def matrix_to_accumulators(matrix: Array) -> list[Array]:
    places = _accumulator_places(matrix.shape[1] // 2)
    return list(np.ascontiguousarray(matrix.astype(f4, copy=False)[places]).view(u4))


def read_descriptor(descriptor: int) -> tuple[int, int, int, int]:
    """Start address, leading and stride offsets in bytes, and the swizzle as in a tensor map."""
    base_offset = descriptor >> 49 & 7
    if base_offset:
        raise PtxError(
            f"wgmma descriptor {descriptor:#x} has base offset {base_offset}, which is not modelled"
        )
    swizzle = {0: 0, 1: 3, 2: 2, 3: 1}[descriptor >> 62]
    return (
        (descriptor & 0x3FFF) << 4,
        (descriptor >> 16 & 0x3FFF) << 4,
        (descriptor >> 32 & 0x3FFF) << 4,
        swizzle,
    )


@functools.lru_cache(maxsize=4096)
def _offsets(start: int, leading: int, stride: int, swizzle: int, rows: int, depth: int, element: int,
             transposed: bool) -> Array:  # fmt: skip
    """Byte offsets of the elements (row, k) of an operand, from the 1024-byte block in which it starts."""
    row, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
    per_piece = 16 // element
    if not transposed:
        k_byte = k * element
        if swizzle == 0:  # 8 rows by 16 bytes lie together
            linear = row % 8 * 16 + row // 8 * stride + k_byte % 16 + k_byte // 16 * leading
        else:
            linear = row % 8 * (16 << swizzle) + row // 8 * stride + k_byte
    else:
        if element != 2:
            raise PtxError("wgmma operands in tf32 must be K-major")
        if swizzle == 0:
            linear = row % per_piece * 2 + row // per_piece * stride + k % 8 * 16 + k // 8 * leading
        else:
            width = per_piece << swizzle
            linear = row % width * 2 + row // width * leading + k % 8 * (16 << swizzle) + k // 8 * stride
    return swizzled(start + linear, swizzle)


def operand_addresses(descriptor: int, rows: range, depth: int, type_: str, transposed: bool) -> Array:
    """Where the elements (row, k) of a wgmma operand lie in shared memory."""
    start, leading, stride, swizzle = read_descriptor(descriptor)
    block = start & ~1023
    offsets = _offsets(start - block, leading, stride, swizzle, rows.stop, depth, ELEMENT[type_], transposed)
    return block + offsets[rows.start :]


class Pending:
    """A register that a wgmma writes: not to be read before the wait that completes it."""

    __slots__ = ("index", "product")
    __array_ufunc__ = None

    def __init__(self, product: Any, index: int) -> None:
        self.product = product
        self.index = index

    def __getattr__(self, name: str) -> Any:
        raise PtxError(
            f"reads an accumulator of {self.product.text!r} before the wgmma.wait_group that completes it"
        )

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.dtype

    def _read(self, *_: Any) -> Any:
        return self.dtype

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __and__ = __or__ = __xor__ = __invert__ = (
        _read
    )
    __getitem__ = __truediv__ = __rtruediv__ = __lt__ = __le__ = __gt__ = __ge__ = __lshift__ = __rshift__ = (
        __neg__
    ) = _read
