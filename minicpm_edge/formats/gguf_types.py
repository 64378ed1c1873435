"""What a GGUF header is made of: value types, tensor types and what is parsed from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

STRING, ARRAY = 8, 9
# Value types of one number: name, struct format.
NUMBERS = {
    0: ("uint8", "<B"),
    1: ("int8", "<b"),
    2: ("uint16", "<H"),
    3: ("int16", "<h"),
    4: ("uint32", "<I"),
    5: ("int32", "<i"),
    6: ("float32", "<f"),
    7: ("bool", "<?"),
    10: ("uint64", "<Q"),
    11: ("int64", "<q"),
    12: ("float64", "<d"),
}
UINT32, INT32, FLOAT32 = 4, 5, 6
# Tensor types (ggml_type): values in a block, bytes of a block.
BLOCKS = {
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    10: (256, 84),  # Q2_K
    11: (256, 110),  # Q3_K
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
    16: (256, 66),  # IQ2_XXS
    17: (256, 74),  # IQ2_XS
    18: (256, 98),  # IQ3_XXS
    19: (256, 50),  # IQ1_S
    20: (32, 18),  # IQ4_NL
    21: (256, 110),  # IQ3_S
    22: (256, 82),  # IQ2_S
    23: (256, 136),  # IQ4_XS
    24: (1, 1),  # I8
    25: (1, 2),  # I16
    26: (1, 4),  # I32
    27: (1, 8),  # I64
    28: (1, 8),  # F64
    29: (256, 56),  # IQ1_M
    30: (1, 2),  # BF16
    34: (256, 54),  # TQ1_0
    35: (256, 66),  # TQ2_0
    39: (32, 17),  # MXFP4
    40: (64, 36),  # NVFP4
    41: (128, 18),  # Q1_0
}


class GGUFError(Exception):
    """What is wrong with a file, without its name."""


@dataclass(frozen=True, kw_only=True)
class Scalar:
    """A single metadata value and its GGUF type."""

    type: int
    value: int | float | str


@dataclass(frozen=True, kw_only=True)
class Array:
    """An array in the metadata: element type, length, and what is kept of it: ``elements`` of a short array of numbers,
    the different ``texts`` of an array of strings."""

    type: int
    length: int
    elements: tuple[int | float, ...] = ()
    texts: frozenset[bytes] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor: dimensions as GGUF lists them (the contiguous one first), ggml type, place in the data section."""

    shape: tuple[int, ...]
    type: int
    offset: int
    num_bytes: int


Value = Scalar | Array
Metadata = Mapping[str, Value]
