"""Reading text from files: txt, md, jsonl, jsonl.gz, jsonl.zst, parquet, folders, globs, `datasets` names.

The reader only cuts files into chunks of about a megabyte, as fast as the disk; :mod:`.documents` makes documents of
them, on all cores. What cannot be read is passed on as a problem, never dropped in silence.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minicpm_edge.errors import UserError

CHUNK_BYTES = 1 << 20
BLOCK_BYTES = 1 << 16  # of one read: what a damaged compressed file loses before the damage
MAX_LINE_BYTES = 256 << 20  # of one JSON line
MAX_TEXT_BYTES = 32 << 20  # of one text file taken as one document; a longer one is cut at ends of lines
COMPRESSIONS = {".jsonl": None, ".jsonl.gz": "gzip", ".jsonl.zst": "zstd"}
TEXT_SUFFIXES, TABLE_SUFFIX = (".txt", ".md"), ".parquet"
SUFFIXES = (*TEXT_SUFFIXES, *COMPRESSIONS, TABLE_SUFFIX)
CHAT_FIELD = "messages"
DATASET_PREFIX = "datasets:"  # without it a mistyped path would be asked for on the network


@dataclass(frozen=True, kw_only=True)
class Source:
    """One SRC of the command line: its files in a fixed order, or the name of a dataset."""

    name: str
    files: tuple[Path, ...] = ()
    dataset: str | None = None
    num_ignored: int = 0  # files in its folder that are of no kind that can be read


@dataclass(frozen=True, kw_only=True)
class Part:
    """Something to make documents of.

    ``content`` is a text file (``text``), whole JSON lines (``lines``), or rows (``rows``); ``first`` the number of
    its first line or row, from 1. A ``problem`` says what could not be read at that place.
    """

    kind: Literal["text", "lines", "rows", "problem"]
    place: str
    first: int
    content: bytes | Sequence[Mapping[str, Any]] | str


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Parts of one source, by its index, worth about a megabyte. ``done`` is the share of the source read so far."""

    source: int
    parts: tuple[Part, ...]
    done: float


def find_sources(names: Sequence[str]) -> list[Source]:
    """Files behind each SRC; a file that two of them name is read once. UserError for one that names nothing."""
    seen: set[Path] = set()
    sources = []
    for name in names:
        source = _find_source(name)
        new = [file for file in source.files if file.resolve() not in seen]
        seen.update(file.resolve() for file in new)
        if new or source.dataset:
            sources.append(
                Source(name=name, files=tuple(new), dataset=source.dataset, num_ignored=source.num_ignored)
            )
    return sources


def _find_source(name: str) -> Source:
    if name.startswith(DATASET_PREFIX):
        return Source(name=name, dataset=name.removeprefix(DATASET_PREFIX))
    path = Path(name).expanduser()
    if path.is_dir():
        files = list(_visible_files(path))
        known = sorted(file for file in files if _suffix(file))
        if not known:
            raise UserError(f"the folder {name} holds no {', '.join(SUFFIXES)} file")
        return Source(name=name, files=tuple(known), num_ignored=len(files) - len(known))
    if path.exists():
        if not _suffix(path):
            raise UserError(f"{name} is of no kind that can be read: {', '.join(SUFFIXES)}")
        return Source(name=name, files=(path,))
    if glob.has_magic(name):
        found = sorted(Path(file) for file in glob.glob(str(path), recursive=True))  # noqa: PTH207  takes absolute ones
        known = [file for file in found if file.is_file() and _suffix(file)]
        if not known:
            raise UserError(f"{name} matches no {', '.join(SUFFIXES)} file")
        return Source(name=name, files=tuple(known), num_ignored=len(found) - len(known))
    raise UserError(f"{name} does not exist (a dataset by its name is written {DATASET_PREFIX}NAME)")


def _visible_files(root: Path) -> Iterator[Path]:
    """Files under ``root``, without what begins with a dot: ``.git``, ``.venv`` and their like are no corpus."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        yield from (Path(folder) / name for name in names if name[0] != ".")


def _suffix(path: Path) -> str | None:
    lower = path.name.lower()
    return next((suffix for suffix in SUFFIXES if lower.endswith(suffix)), None)


def read_chunks(sources: Sequence[Source], field: str) -> Iterator[Chunk]:
    """Every source in order, in chunks."""
    for index, source in enumerate(sources):
        waiting: list[Part] = []
        size = 0
        for part, done in _read_dataset(source, field) if source.dataset else _read_files(source, field):
            waiting.append(part)
            size += _size(part)
            if size >= CHUNK_BYTES:
                yield Chunk(source=index, parts=tuple(waiting), done=done)
                waiting, size = [], 0
        if waiting:
            yield Chunk(source=index, parts=tuple(waiting), done=1.0)


def _size(part: Part) -> int:
    if isinstance(part.content, str | bytes):
        return len(part.content)
    return sum(len(str(value)) for row in part.content for value in row.values()) + 1


def _read_files(source: Source, field: str) -> Iterator[tuple[Part, float]]:
    total = sum(_file_size(file) for file in source.files) or 1
    before = 0
    for file in source.files:
        size = _file_size(file)
        try:
            for part, done in _read_file(file, field):
                yield part, (before + done * size) / total
        except OSError as error:
            problem = error.strerror or " ".join(str(error).split())
            yield Part(kind="problem", place=str(file), first=0, content=f"cannot be read: {problem}"), 0.0
        before += size


def _file_size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # a dangling link: reading it will say so
        return 0


def _read_file(file: Path, field: str) -> Iterator[tuple[Part, float]]:
    suffix = _suffix(file)
    if suffix in TEXT_SUFFIXES:
        return _read_text(file)
    if suffix == TABLE_SUFFIX:
        return _read_table(file, field)
    return _read_lines(file, COMPRESSIONS[suffix or ""])


def _read_text(file: Path) -> Iterator[tuple[Part, float]]:
    size = file.stat().st_size
    first = 1
    with file.open("rb") as stream:
        while content := stream.read(MAX_TEXT_BYTES):
            if len(content) == MAX_TEXT_BYTES:
                content += stream.readline(MAX_TEXT_BYTES)
            yield Part(kind="text", place=str(file), first=first, content=content), stream.tell() / size
            first += content.count(b"\n")
        if size == 0:
            yield Part(kind="text", place=str(file), first=1, content=b""), 1.0


def _read_lines(file: Path, compression: str | None) -> Iterator[tuple[Part, float]]:
    """Whole lines, a block at a time; a line past the limit is a problem of its own."""
    import pyarrow as pa

    size = file.stat().st_size or 1
    raw = pa.OSFile(str(file))
    stream = pa.CompressedInputStream(raw, compression) if compression else raw
    first, held_bytes, too_long = 1, 0, False
    held: list[bytes] = []
    while True:
        block: bytes = stream.read(CHUNK_BYTES if compression is None else BLOCK_BYTES)
        end = block.rfind(b"\n") + 1 if block else 0
        if end or (not block and held):
            content = b"".join([*held, block[:end]])
            start = content.find(b"\n") + 1 if too_long else 0  # the rest of the line that was dropped
            if start or not too_long:
                part = Part(kind="lines", place=str(file), first=first + bool(start), content=content[start:])
                yield part, raw.tell() / size
            first += content.count(b"\n")
            held, held_bytes, too_long = [], 0, False
        if not block:
            return
        held.append(block[end:])
        held_bytes += len(held[-1])
        if held_bytes > MAX_LINE_BYTES:
            if not too_long:
                problem = f"a line of more than {MAX_LINE_BYTES >> 20} MB"
                yield Part(kind="problem", place=str(file), first=first, content=problem), raw.tell() / size
            held, held_bytes, too_long = [], 0, True


def _read_table(file: Path, field: str) -> Iterator[tuple[Part, float]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file, memory_map=True) as table:
            columns = table.schema_arrow.names
            column = CHAT_FIELD if CHAT_FIELD in columns else field
            if column not in columns:
                problem = f"no column {field!r} among {', '.join(columns)[:200]}"
                yield Part(kind="problem", place=str(file), first=0, content=problem), 1.0
                return
            first, total = 1, table.metadata.num_rows or 1
            for batch in table.iter_batches(batch_size=128, columns=[column]):
                rows = batch.to_pylist()
                yield Part(kind="rows", place=str(file), first=first, content=rows), first / total
                first += len(rows)
    except pa.ArrowException as error:
        problem = "damaged: " + " ".join(str(error).split())[:200]
        yield Part(kind="problem", place=str(file), first=0, content=problem), 1.0


def _read_dataset(source: Source, field: str) -> Iterator[tuple[Part, float]]:
    """Rows of a dataset by its name (``NAME`` or ``NAME:CONFIG``), streamed from its ``train`` split."""
    assert source.dataset is not None
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source.name} needs the package `datasets`: pip install datasets") from None
    name, _, config = source.dataset.partition(":")
    first = 1
    rows: list[Mapping[str, Any]] = []
    try:
        for row in datasets.load_dataset(name, config or None, split="train", streaming=True):
            column = CHAT_FIELD if CHAT_FIELD in row else field
            rows.append({column: row[column]} if column in row else {})
            if len(rows) == 128:
                yield Part(kind="rows", place=source.name, first=first, content=rows), 0.0
                first, rows = first + len(rows), []
    except (OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"{source.name} cannot be read: {problem}") from error
    if rows:
        yield Part(kind="rows", place=source.name, first=first, content=rows), 1.0
