"""Checks a GGUF file before llama.cpp maps it: a broken download must end in a message, not in a dead process.

Written from the GGUF specification (versions 2 and 3, little endian). Nothing is allocated on a header's word: every
count and size is compared with the bytes that are really there. The weights behind the header are not read.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from minicpm_edge.errors import UserError
from minicpm_edge.formats.gguf_files import model_files, part_number
from minicpm_edge.formats.gguf_rules import check_values
from minicpm_edge.formats.gguf_types import (
    ARRAY,
    BLOCKS,
    NUMBERS,
    STRING,
    UINT32,
    Array,
    GGUFError,
    Metadata,
    Scalar,
    Tensor,
)
from minicpm_edge.lfs import refuse_pointer

MAGIC, VERSIONS = b"GGUF", (2, 3)
HEADER_BYTES, SMALLEST_KEY, SMALLEST_TENSOR = 24, 13, 24
DEFAULT_ALIGNMENT, MAX_ALIGNMENT = 32, 1 << 20
MAX_KEYS, MAX_TENSORS, MAX_DIMENSIONS = 1 << 16, 1 << 16, 4
MAX_KEY_NAME, MAX_TENSOR_NAME, MAX_STRING = 1 << 10, 63, 1 << 24
MAX_ELEMENTS = 1 << 62  # beyond it products overflow llama.cpp's 64-bit arithmetic
KEPT_ELEMENTS = 1 << 10  # settings by layer; longer arrays are not looked at value by value


@dataclass(frozen=True, kw_only=True)
class GGUFHeader:
    """What stands before the weights, and where they begin."""

    version: int
    metadata: Metadata
    tensors: Mapping[str, Tensor]
    data_start: int


def check_gguf(path: Path) -> GGUFHeader:
    """Read and check the header of ``path``; for a model in several files, of each (the first one's is returned).

    Raises:
        UserError: when llama.cpp could not load the file, or would not survive loading it.
    """
    refuse_pointer(path)
    try:
        number, total = part_number(path)
        if number != 1:
            raise GGUFError(f"it is part {number} of {total}; name the first part")
        for part in model_files(path)[1:]:
            read_header(part)
        header = read_header(path)
        check_values(header.metadata)
    except GGUFError as error:
        raise UserError(f"{path} is not a usable GGUF file: {error}; download or export it again") from None
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read: {error.strerror}") from None
    return header


def read_header(path: Path) -> GGUFHeader:
    """Parse one file's header and check that all it claims lies inside the file.

    Raises:
        GGUFError: saying what does not fit.
    """
    if path.stat().st_size < HEADER_BYTES:
        raise GGUFError("it is too short to have a header")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(data)
        version = _read_version(reader)
        num_tensors = reader.count("tensors", MAX_TENSORS, SMALLEST_TENSOR)
        num_keys = reader.count("metadata keys", MAX_KEYS, SMALLEST_KEY)
        metadata = _read_metadata(reader, num_keys)
        alignment = _alignment(metadata)
        tensors = _read_tensors(reader, num_tensors)
        data_start = -(-reader.position // alignment) * alignment
        _check_places(tensors, alignment, reader.size - data_start)
    return GGUFHeader(version=version, metadata=metadata, tensors=tensors, data_start=data_start)


class _Reader:
    """A cursor over the mapped file that cannot leave it."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.size = len(data)
        self.position = 0

    def take(self, length: int, what: str) -> bytes:
        start, left = self.position, self.size - self.position
        if length > left:
            raise GGUFError(
                f"it ends too early: {what} at byte {start} needs {length} bytes, {left} are left"
            )
        self.position = start + length
        return self._data[start : start + length]

    def numbers(self, form: str, count: int, what: str) -> tuple[int | float, ...]:
        data = self.take(count * struct.calcsize(form), what)
        return struct.unpack(f"<{count}{form[1:]}", data)

    def integer(self, form: str, what: str) -> int:
        return int(self.numbers(form, 1, what)[0])

    def count(self, what: str, most: int, smallest: int) -> int:
        """A 64-bit number of things of which each takes at least ``smallest`` bytes."""
        value = self.integer("<Q", f"the number of {what}")
        if value > most or value * smallest > self.size - self.position:
            raise GGUFError(f"it claims {value} {what}, more than it can hold")
        return value

    def string(self, what: str, most: int = MAX_STRING) -> bytes:
        length = self.integer("<Q", what)
        if length > most:
            raise GGUFError(f"{what} is {length} bytes long; at most {most} are allowed")
        return self.take(length, what)

    def text(self, what: str, most: int = MAX_STRING) -> str:
        try:
            return self.string(what, most).decode("utf-8")
        except UnicodeDecodeError:
            raise GGUFError(f"{what} is not UTF-8") from None

    def skip(self, length: int, what: str) -> None:
        if length > self.size - self.position:
            raise GGUFError(f"it ends inside {what}")
        self.position += length


def _read_version(reader: _Reader) -> int:
    if reader.take(len(MAGIC), "the magic") != MAGIC:
        raise GGUFError("it does not begin with GGUF")
    version = reader.integer("<I", "the version")
    if version not in VERSIONS:
        hint = ", it is big-endian" if version and version & 0xFFFF == 0 else ""
        raise GGUFError(f"its version is {version}{hint}; versions 2 and 3 are supported")
    return version


def _read_metadata(reader: _Reader, num_keys: int) -> Metadata:
    metadata: dict[str, Scalar | Array] = {}
    for _ in range(num_keys):
        key = reader.text("a metadata key", MAX_KEY_NAME)
        if not key:
            raise GGUFError("a metadata key is empty")
        if key in metadata:
            raise GGUFError(f"the metadata key {key!r} is there twice")
        kind = reader.integer("<I", f"the type of {key!r}")
        metadata[key] = _read_array(reader, key) if kind == ARRAY else _read_scalar(reader, key, kind)
    return metadata


def _read_scalar(reader: _Reader, key: str, kind: int) -> Scalar:
    if kind == STRING:
        return Scalar(type=kind, value=reader.text(repr(key)))
    if kind not in NUMBERS:
        raise GGUFError(f"{key!r} has the unknown value type {kind}")
    return Scalar(type=kind, value=reader.numbers(NUMBERS[kind][1], 1, repr(key))[0])


def _read_array(reader: _Reader, key: str) -> Array:
    kind = reader.integer("<I", f"the element type of {key!r}")
    if kind == STRING:
        length = reader.count(f"elements in {key!r}", MAX_ELEMENTS, smallest=8)
        texts = frozenset(reader.string(repr(key)) for _ in range(length))
        return Array(type=kind, length=length, texts=texts)
    if kind not in NUMBERS:
        raise GGUFError(f"{key!r} is an array of the unknown type {kind}")
    form = NUMBERS[kind][1]
    size = struct.calcsize(form)
    length = reader.count(f"elements in {key!r}", MAX_ELEMENTS, smallest=size)
    if length > KEPT_ELEMENTS:
        reader.skip(length * size, repr(key))
        return Array(type=kind, length=length)
    return Array(type=kind, length=length, elements=reader.numbers(form, length, repr(key)))


def _alignment(metadata: Metadata) -> int:
    entry = metadata.get("general.alignment")
    if entry is None:
        return DEFAULT_ALIGNMENT
    value = entry.value if isinstance(entry, Scalar) and entry.type == UINT32 else None
    if not isinstance(value, int) or not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
        raise GGUFError(f"general.alignment must be a power of two up to {MAX_ALIGNMENT}")
    return value


def _read_tensors(reader: _Reader, num_tensors: int) -> Mapping[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for _ in range(num_tensors):
        name = reader.text("a tensor's name", MAX_TENSOR_NAME)
        if name in tensors:
            raise GGUFError(f"the tensor {name!r} is there twice")
        num_dimensions = reader.integer("<I", f"the shape of {name!r}")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise GGUFError(
                f"the tensor {name!r} has {num_dimensions} dimensions; 1 to {MAX_DIMENSIONS} are possible"
            )
        shape = tuple(map(int, reader.numbers("<Q", num_dimensions, f"the shape of {name!r}")))
        kind = reader.integer("<I", f"the type of {name!r}")
        offset = reader.integer("<Q", f"the offset of {name!r}")
        tensors[name] = Tensor(shape=shape, type=kind, offset=offset, num_bytes=_num_bytes(name, shape, kind))
    return tensors


def _num_bytes(name: str, shape: tuple[int, ...], kind: int) -> int:
    if kind not in BLOCKS:
        raise GGUFError(f"the tensor {name!r} has the unknown type {kind}")
    if not all(shape) or prod(shape) > MAX_ELEMENTS:
        raise GGUFError(f"the tensor {name!r} has the impossible shape {shape}")
    block, block_bytes = BLOCKS[kind]
    if shape[0] % block:
        raise GGUFError(
            f"the tensor {name!r} has rows of {shape[0]}, which its type cannot cut into blocks of {block}"
        )
    return prod(shape) // block * block_bytes


def _check_places(tensors: Mapping[str, Tensor], alignment: int, data_bytes: int) -> None:
    """Tensors stand one after another, each padded to the alignment, and the file has them all."""
    expected = 0
    for name, tensor in tensors.items():
        if tensor.offset != expected:
            raise GGUFError(
                f"the tensor {name!r} is said to be at {tensor.offset}; the one before ends at {expected}"
            )
        if tensor.offset + tensor.num_bytes > data_bytes:
            missing = tensor.offset + tensor.num_bytes - data_bytes
            raise GGUFError(f"it is cut short: the tensor {name!r} lacks its last {missing} bytes")
        expected += -(-tensor.num_bytes // alignment) * alignment
