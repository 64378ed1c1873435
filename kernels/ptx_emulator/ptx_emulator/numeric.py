"""Arithmetic of PTX on numpy arrays of 32 lanes, where numpy has no operator for it.

Registers hold bits: uint16, uint32, uint64 or bool. Functions here take and return the types in their names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64

where = np.where
UNSIGNED = {8: u1, 16: u2, 32: u4, 64: u8}


def bf16_to_f4(bits: Array) -> Array:
    """bfloat16 bits to float32, exactly."""
    return (bits.astype(u4) << u4(16)).view(f4)


def f4_to_bf16(x: Array, relu: bool = False) -> Array:
    """float32 to the bits of the nearest bfloat16, ties to even; NaN to the canonical one."""
    bits = x.view(u4)
    rounded = ((bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)).astype(u2)
    rounded = where(np.isnan(x), u2(0x7FFF), rounded)
    return where(x < 0, u2(0), rounded) if relu else rounded


def f4_to_bf16_rz(x: Array) -> Array:
    """float32 to bfloat16 bits, towards zero."""
    return where(np.isnan(x), u2(0x7FFF), (x.view(u4) >> u4(16)).astype(u2))


def f4_to_tf32(x: Array) -> Array:
    """float32 bits rounded to tf32: ten bits of fraction, ties away from zero (cvt.rna)."""
    bits = x.view(u4)
    return where(np.isfinite(x), (bits + u4(0x1000)) & u4(0xFFFFE000), bits)


def truncate_tf32(bits: Array) -> Array:
    """What a tensor core reads of float32 bits."""
    return bits & u4(0xFFFFE000)


def pack(low: Array, high: Array) -> Array:
    """Two 16-bit halves to 32 bits."""
    return low.astype(u4) | (high.astype(u4) << u4(16))


def on_halves(function: Callable[..., Array], to: Callable[[Array], Array], back: Callable[[Array], Array],
              *operands: Array) -> Array:  # fmt: skip
    """A float32 function on both halves of packed 16-bit floats."""
    return np.ascontiguousarray(back(function(*(to(x.view(u2)) for x in operands)))).view(u4)


def f2_to_f4(bits: Array) -> Array:
    return bits.view(f2).astype(f4)


def f4_to_f2(x: Array) -> Array:
    return x.astype(f2).view(u2)


def flush(x: Array) -> Array:
    """Subnormal float32 to zero of the same sign (.ftz)."""
    return where(np.abs(x) < f4(1.1754944e-38), np.copysign(f4(0), x), x)


def fma_f4(a: Array, b: Array, c: Array) -> Array:
    """Fused multiply-add. The product is exact in float64; the sum may be rounded twice, once in 2^29 cases."""
    return (a.astype(f8) * b.astype(f8) + c.astype(f8)).astype(f4)


def maximum(a: Array, b: Array) -> Array:
    """max: of a number and a NaN, the number."""
    return np.fmax(a, b)


def minimum(a: Array, b: Array) -> Array:
    return np.fmin(a, b)


def shift_left(a: Array, n: Array) -> Array:
    """Shifts by the width or more give zero."""
    bits = a.dtype.itemsize * 8
    return where(n >= bits, a.dtype.type(0), a << np.minimum(n, bits - 1).astype(a.dtype))


def shift_right(a: Array, n: Array) -> Array:
    """Logical for unsigned, arithmetic for signed; by the width or more, all bits are the sign."""
    bits = a.dtype.itemsize * 8
    shifted = a >> np.minimum(n, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else where(n >= bits, a.dtype.type(0), shifted)


def divide(a: Array, b: Array) -> Array:
    """Integer division towards zero; by zero, all bits set."""
    safe = where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        return where(b == 0, ~a.dtype.type(0), a // safe)
    quotient = np.abs(a) // np.abs(safe)
    quotient = where((a < 0) != (b < 0), -quotient, quotient)
    return where(b == 0, a.dtype.type(-1), quotient)


def remainder(a: Array, b: Array) -> Array:
    """Integer remainder with the sign of the dividend."""
    safe = where(b == 0, b.dtype.type(1), b)
    return where(b == 0, a, np.fmod(a, safe))


def multiply_high(a: Array, b: Array) -> Array:
    """The upper half of the product."""
    if a.dtype.itemsize == 4:
        wide = i8 if a.dtype.kind == "i" else u8
        return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)
    product = [(int(x) * int(y)) >> 64 for x, y in zip(a, b, strict=True)]
    return np.array([x & 0xFFFFFFFFFFFFFFFF for x in product], u8).view(a.dtype)


def count_bits(a: Array) -> Array:
    return np.bitwise_count(a).astype(u4)


def leading_zeros(a: Array) -> Array:
    bits = a.dtype.itemsize * 8
    return np.array([bits - int(x).bit_length() for x in a], u4)


def find_top_bit(a: Array) -> Array:
    """bfind.u32: the position of the highest set bit, all ones if none."""
    return np.array([(int(x).bit_length() - 1) & 0xFFFFFFFF for x in a], u4)


def reverse_bits(a: Array) -> Array:
    return np.array([int(f"{int(x):032b}"[::-1], 2) for x in a], u4)


def extract_bits(a: Array, start: Array, length: Array) -> Array:
    """bfe, for the type of `a`."""
    bits = a.dtype.itemsize * 8
    out = []
    for x, s, n in zip(a.tolist(), (start & 0xFF).tolist(), (length & 0xFF).tolist(), strict=True):
        field = ((x & ((1 << bits) - 1)) >> s) & ((1 << n) - 1)
        if a.dtype.kind == "i" and n > 0:
            top = min(s + n - 1, bits - 1)
            if (x >> top) & 1:
                field = ((x & ((1 << bits) - 1)) >> s & ((1 << max(top - s + 1, 0)) - 1)) - (
                    1 << max(top - s + 1, 0)
                )
        out.append(field)
    return np.array(out, i8 if a.dtype.kind == "i" else u8).astype(a.dtype)


def insert_bits(a: Array, b: Array, start: Array, length: Array) -> Array:
    """bfi: the low bits of `a` in place of a field of `b`."""
    bits = a.dtype.itemsize * 8
    out = []
    for x, y, s, n in zip(
        a.tolist(), b.tolist(), (start & 0xFF).tolist(), (length & 0xFF).tolist(), strict=True
    ):
        mask = (((1 << n) - 1) << s) & ((1 << bits) - 1)
        out.append((y & ~mask) | ((x << s) & mask))
    return np.array(out, a.dtype)


def logic3(a: Array, b: Array, c: Array, table: int) -> Array:
    """lop3: any function of three bits."""
    out = np.zeros_like(a)
    for index in range(8):
        if table >> index & 1:
            out |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return out


def funnel(a: Array, b: Array, n: Array, left: bool, clamp: bool) -> Array:
    """shf: a 64-bit shift of b:a, of which the upper (left) or lower word is kept."""
    n = np.minimum(n, 32) if clamp else n & u4(31)
    wide = a.astype(u8) | (b.astype(u8) << u8(32))
    shifted = wide << n.astype(u8) >> u8(32) if left else wide >> n.astype(u8)
    return (shifted & u8(0xFFFFFFFF)).astype(u4)


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """prmt in its default mode."""
    lanes = np.stack([a, b], 1).view(u1)  # (32, 8)
    out = np.zeros((len(a), 4), u1)
    for byte in range(4):
        nibble = (selector >> u4(4 * byte)) & u4(15)
        chosen = lanes[np.arange(len(a)), nibble & u4(7)]
        sign = where(chosen & u1(0x80), u1(0xFF), u1(0))
        out[:, byte] = where(nibble & u4(8), sign, chosen)
    return out.view(u4)[:, 0]


def to_integer(x: Array, dtype: Any, mode: str) -> Array:
    """Float to integer, saturating; NaN to zero."""
    rounded = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](x.astype(f8))
    info = np.iinfo(dtype)
    clipped = np.clip(where(np.isnan(rounded), 0.0, rounded), float(info.min), float(info.max))
    if info.bits < 64:
        return clipped.astype(dtype)
    return np.array([min(max(int(v), info.min), info.max) for v in clipped], dtype)


def split64(x: Array) -> tuple[Array, Array]:
    """The low and the high word."""
    return (x & u8(0xFFFFFFFF)).astype(u4), (x >> u8(32)).astype(u4)


def join64(low: Array, high: Array) -> Array:
    return low.astype(u8) | (high.astype(u8) << u8(32))


def tanh(x: Array) -> Array:
    return np.tanh(x.astype(f8)).astype(f4)


def exp2(x: Array) -> Array:
    return np.exp2(x.astype(f8)).astype(f4)


def log2(x: Array) -> Array:
    return np.log2(x.astype(f8)).astype(f4)


def reciprocal_root(x: Array) -> Array:
    return (1.0 / np.sqrt(x.astype(f8))).astype(f4)
