"""Broken GGUF files end in one message, and what passes the check does not bring llama.cpp down."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from minicpm_edge.errors import UserError
from minicpm_edge.formats.gguf_header import check_gguf, read_header
from minicpm_edge.formats.gguf_types import BLOCKS, FLOAT32, INT32, STRING, UINT32, Array, GGUFError, Scalar

BOOL, UINT64 = 7, 10


class Builder:
    """A GGUF taken apart: change its parts, then write them as they are, sensible or not."""

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        data = path.read_bytes()
        self.magic, self.version = b"GGUF", header.version
        self.keys: dict[str, bytes] = {}
        position = 24
        for key in header.metadata:
            start = position + 8 + len(key.encode())
            position = start + self._value_size(data, start)
            self.keys[key] = data[start:position]
        self.tensors = {
            name: [tensor.shape, tensor.type, tensor.offset] for name, tensor in header.tensors.items()
        }
        self.num_tensors, self.num_keys = len(self.tensors), len(self.keys)
        self.weights = data[header.data_start :]
        self.tail: list[tuple[bytes, bytes]] = []  # keys written a second time

    @staticmethod
    def _value_size(data: bytes, start: int) -> int:
        sizes = {4: 4, 5: 4, 6: 4, 7: 1}
        kind, first = struct.unpack_from("<IQ", data + bytes(16), start)
        if kind == STRING:
            return 12 + first
        if kind != 9:
            return 4 + sizes[kind]
        kind, length = struct.unpack_from("<IQ", data, start + 4)
        end = start + 16
        for _ in range(length):
            end += 8 + struct.unpack_from("<Q", data, end)[0] if kind == STRING else sizes[kind]
        return end - start

    def write(self, path: Path) -> Path:
        head = self.magic + struct.pack("<IQQ", self.version, self.num_tensors, self.num_keys)
        for key, value in [*((key.encode(), value) for key, value in self.keys.items()), *self.tail]:
            head += text(key) + value
        for name, (shape, kind, offset) in self.tensors.items():
            head += text(name.encode()) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        path.write_bytes(head + bytes(-len(head) % 32) + self.weights)
        return path


def text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def u32(value: int) -> bytes:
    return struct.pack("<II", UINT32, value)


def f32(value: float) -> bytes:
    return struct.pack("<If", FLOAT32, value)


def string(value: str) -> bytes:
    return struct.pack("<I", STRING) + text(value.encode())


def array(kind: int, *values: bytes, length: int | None = None) -> bytes:
    return struct.pack("<IIQ", 9, kind, len(values) if length is None else length) + b"".join(values)


@pytest.fixture
def change(tiny_gguf: Path, tmp_path: Path) -> Callable[[Callable[[Builder], object]], str]:
    """``change(edit)`` edits a good file and returns what the check says of it."""

    def apply(edit: Callable[[Builder], object]) -> str:
        builder = Builder(tiny_gguf)
        edit(builder)
        path = builder.write(tmp_path / "changed.gguf")
        with pytest.raises(UserError) as caught:
            check_gguf(path)
        message = str(caught.value)
        assert message.startswith(f"{path} is not a usable GGUF file: ") and "\n" not in message
        return message

    return apply


def test_a_good_file_is_read_whole(tiny_gguf, tmp_path):
    header = check_gguf(tiny_gguf)
    assert header.metadata["general.architecture"] == Scalar(type=STRING, value="llama")
    assert header.metadata["llama.block_count"] == Scalar(type=UINT32, value=2)
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert (
        isinstance(tokens, Array)
        and tokens.length == len(tokens.texts) == header.tensors["output.weight"].shape[1]
    )
    last = list(header.tensors.values())[-1]
    assert header.data_start + last.offset + last.num_bytes == tiny_gguf.stat().st_size
    assert Builder(tiny_gguf).write(tmp_path / "same.gguf").read_bytes() == tiny_gguf.read_bytes()


def test_it_agrees_with_the_gguf_package(tiny_gguf):
    gguf = pytest.importorskip("gguf")
    ours, theirs = check_gguf(tiny_gguf), gguf.GGUFReader(tiny_gguf)
    assert {tensor.name: tensor.data_offset for tensor in theirs.tensors} == {
        name: ours.data_start + tensor.offset for name, tensor in ours.tensors.items()
    }
    assert {tensor.name: tensor.n_bytes for tensor in theirs.tensors} == {
        name: tensor.num_bytes for name, tensor in ours.tensors.items()
    }
    assert {key for key in theirs.fields if not key.startswith("GGUF.")} == set(ours.metadata)
    sizes = {int(kind): size for kind, size in gguf.constants.GGML_QUANT_SIZES.items()}
    assert {kind: sizes[kind] for kind in BLOCKS if kind in sizes} == {
        kind: size for kind, size in BLOCKS.items() if kind in sizes
    }


@pytest.mark.parametrize(
    ("message", "edit"),
    [
        ("does not begin with GGUF", lambda file: setattr(file, "magic", b"GGML")),
        ("version is 1", lambda file: setattr(file, "version", 1)),
        ("big-endian", lambda file: setattr(file, "version", 3 << 24)),
        ("tensors, more than it can hold", lambda file: setattr(file, "num_tensors", 2**63)),
        ("metadata keys, more than it can hold", lambda file: setattr(file, "num_keys", 2**40)),
        ("is there twice", lambda file: (file.tail.append((b"llama.block_count", u32(2))), count_keys(file))),
        ("key is empty", lambda file: add(file, "", u32(1))),
        ("unknown value type 13", lambda file: add(file, "x", struct.pack("<IQ", 13, 0))),
        ("array of the unknown type 9", lambda file: add(file, "x", array(9, length=0))),
        ("more than it can hold", lambda file: add(file, "x", array(UINT64, length=2**61))),
        ("more than it can hold", lambda file: add(file, "x", array(STRING, length=2**61))),
        ("at most 16777216", lambda file: add(file, "x", struct.pack("<IQ", STRING, 2**62))),
        ("ends too early", lambda file: add(file, "x", array(STRING, struct.pack("<Q", 2**23)))),
        ("is not UTF-8", lambda file: add(file, "x", struct.pack("<I", STRING) + text(b"\xff\xfe"))),
        ("power of two", lambda file: add(file, "general.alignment", u32(48))),
        ("power of two", lambda file: add(file, "general.alignment", u32(0))),
        ("power of two", lambda file: add(file, "general.alignment", string("32"))),
        ("0 dimensions", lambda file: tensor(file, shape=())),
        ("5 dimensions", lambda file: tensor(file, shape=(1, 1, 1, 1, 1))),
        ("impossible shape", lambda file: tensor(file, shape=(2**33, 2**33))),
        ("impossible shape", lambda file: tensor(file, shape=(0, 4))),
        ("unknown type 4", lambda file: tensor(file, kind=4)),
        ("cut into blocks of 256", lambda file: tensor(file, kind=12)),
        ("the one before ends at", lambda file: tensor(file, offset=64)),
        ("the one before ends at", lambda file: tensor(file, offset=2**64 - 32)),
        ("cut short", lambda file: setattr(file, "weights", file.weights[:-1])),
    ],
)
def test_structures_that_do_not_fit(change, message, edit):
    assert message in change(edit)


@pytest.mark.parametrize(
    ("message", "key", "value"),
    [
        ("general.architecture is missing", "general.architecture", None),
        ("general.architecture is missing", "general.architecture", u32(1)),
        ("block_count must be from 1 to 512", "llama.block_count", u32(0)),
        ("block_count must be from 1 to 512", "llama.block_count", u32(513)),
        ("block_count must be a number", "llama.block_count", string("2")),
        ("embedding_length must be from 1", "llama.embedding_length", u32(0)),
        ("embedding_length must be from 1", "llama.embedding_length", f32(32)),
        ("embedding_length_out is not", "llama.embedding_length_out", u32(33)),
        ("context_length must be from 1", "llama.context_length", u32(2**32 - 1)),
        ("head_count must be from 1", "llama.attention.head_count", u32(0)),
        ("for each of the 2 layers", "llama.attention.head_count", array(INT32, *[struct.pack("<i", 2)] * 3)),
        ("heads cannot share", "llama.attention.head_count_kv", u32(3)),
        ("do not fit heads of 16", "llama.rope.dimension_count", u32(18)),
        ("do not fit heads of 8", "llama.attention.key_length", u32(8)),
        ("none is used", "llama.expert_count", u32(8)),
        ("expert_used_count must be from 0 to 0", "llama.expert_used_count", u32(2)),
        ("expert_group_count must be", "llama.expert_group_count", u32(3)),
        ("nextn_predict_layers must be", "llama.nextn_predict_layers", u32(100)),
        ("must be a finite number", "llama.attention.layer_norm_rms_epsilon", f32(float("nan"))),
        ("must be a finite number", "llama.attention.layer_norm_rms_epsilon", f32(-1)),
        ("must be a finite number", "llama.rope.freq_base", f32(0)),
        ("rope.scaling.type must be one of", "llama.rope.scaling.type", string("spiral")),
        ("has no tokenizer", "tokenizer.ggml.tokens", None),
        ("must be a list of texts", "tokenizer.ggml.tokens", u32(1)),
        ("are the same", "tokenizer.ggml.tokens", array(STRING, text(b"a"), text(b"a"))),
        ("token_type must be", "tokenizer.ggml.token_type", array(INT32, struct.pack("<i", 1))),
        ("scores must be", "tokenizer.ggml.scores", array(BOOL, b"\1")),
        ("model is 'rwkv'", "tokenizer.ggml.model", string("rwkv")),
        ("model is None", "tokenizer.ggml.model", None),
        ("lacks tokens for single bytes", "tokenizer.ggml.model", string("llama")),
    ],
)
def test_values_that_llama_cpp_would_abort_on(change, message, key, value):
    def edit(file: Builder) -> None:
        file.keys.pop(key, None) if value is None else file.keys.update({key: value})
        count_keys(file)

    assert message in change(edit)


def count_keys(file: Builder) -> None:
    file.num_keys = len(file.keys) + len(file.tail)


def add(file: Builder, key: str, value: bytes) -> None:
    file.keys[key] = value
    count_keys(file)


def tensor(file: Builder, *, shape=None, kind=None, offset=None) -> None:
    """Change the second tensor."""
    entry = list(file.tensors.values())[1]
    for place, value in enumerate((shape, kind, offset)):
        if value is not None:
            entry[place] = value


@pytest.mark.parametrize("size", [0, 1, 4, 23, 24, 25, 100, 1000, 5000])
def test_short_files(tiny_gguf, tmp_path, size):
    path = tmp_path / "short.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:size])
    with pytest.raises(UserError, match="not a usable GGUF"):
        check_gguf(path)


def test_every_truncation_is_noticed(tiny_gguf, tmp_path):
    data, path = tiny_gguf.read_bytes(), tmp_path / "short.gguf"
    generator = random.Random(0)
    for size in sorted(generator.randrange(len(data)) for _ in range(200)):
        path.write_bytes(data[:size])
        with pytest.raises(GGUFError):
            read_header(path)


def test_parts_are_all_checked(tiny_gguf, tmp_path):
    first, second = (tmp_path / f"big-{part:05d}-of-00002.gguf" for part in (1, 2))
    first.write_bytes(tiny_gguf.read_bytes())
    with pytest.raises(UserError, match=r"big-00002-of-00002\.gguf cannot be read"):
        check_gguf(first)
    second.write_bytes(b"GGUF")
    with pytest.raises(UserError, match="too short"):
        check_gguf(first)
    with pytest.raises(UserError, match="part 2 of 2; name the first"):
        check_gguf(second)
    second.write_bytes(tiny_gguf.read_bytes())
    check_gguf(first)


CHILD = """
import sys
from minicpm_edge import load
from minicpm_edge.errors import UserError
for path in sys.argv[1:]:
    print(path, flush=True)
    try:
        with load(path, threads=1) as model:
            model.generate("hello <s> world", max_tokens=2, seed=1)
            model.generate("hello", max_tokens=2, temperature=0)
            model.embed("hello")
            model.detokenize(range(100))
    except UserError:
        pass
print("survived")
"""


def test_damage_never_ends_the_process(tiny_gguf, tmp_path):
    """Random damage to the header: refused by the check, refused by llama.cpp, or harmless. Never a crash."""
    pytest.importorskip("llama_cpp")
    data, generator = tiny_gguf.read_bytes(), random.Random(5)
    header = read_header(tiny_gguf)
    extremes = [
        bytes(4),
        b"\xff" * 4,
        b"\xff\xff\xff\x7f",
        struct.pack("<f", float("nan")),
        struct.pack("<I", 513),
    ]
    paths = []
    for number in range(400):
        damaged = bytearray(data)
        for _ in range(generator.choice([1, 1, 2])):
            place = generator.randrange(header.data_start - 8)
            kind = generator.random()
            if kind < 0.4:
                damaged[place] ^= 1 << generator.randrange(8)
            elif kind < 0.7:
                damaged[place] = generator.randrange(256)
            elif kind < 0.9:
                damaged[place : place + 4] = generator.choice(extremes)
            elif kind < 0.95:
                del damaged[place : place + generator.randrange(1, 9)]
            else:
                del damaged[generator.randrange(len(damaged)) :]
                break
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(damaged)
        try:
            check_gguf(path)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            paths.append(str(path))
    assert 40 < len(paths) < 300
    done = subprocess.run([sys.executable, "-c", CHILD, *paths], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1:]} {done.stderr[-2000:]}"
    assert done.stdout.endswith("survived\n")
