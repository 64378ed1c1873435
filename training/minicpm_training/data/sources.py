"""Documents out of files: txt, md, jsonl (plain, .gz, .zst) and parquet, folders and patterns of them, mixed.

A text file is one document. A row is a document by its ``field``, or a chat where it has ``messages``. Whatever
cannot be read is counted in the report with its file and line, and skipped.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from minicpm_edge.chat import check_messages
from minicpm_edge.errors import UserError
from minicpm_training.data.report import Report

PIECE_BYTES = 1 << 20
# A longer text file is cut at line ends into documents of about this size, so that memory stays bounded.
MAX_TEXT_BYTES = 32 << 20

Message = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document: its text, or the messages of a chat (then ``text`` is empty)."""

    text: str = ""
    messages: tuple[Message, ...] = ()

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text, or of the messages' contents."""
        if not self.messages:
            return len(self.text.encode("utf-8", "replace"))
        return sum(len(str(message["content"]).encode("utf-8", "replace")) for message in self.messages)


def expand(sources: Sequence[str]) -> list[Path]:
    """The files that the arguments name: a file, every readable file under a folder, or a pattern's matches.

    Raises :class:`UserError` for a source that names nothing, or a file of a kind that is not read.
    """
    files: list[Path] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.is_file() and _reader(file))
            if not found:
                raise UserError(f"{source}: no file under it that is read; read are {', '.join(READERS)}")
        elif path.is_file():
            if not _reader(path):
                raise UserError(f"{source}: not a kind of file that is read; read are {', '.join(READERS)}")
            found = [path]
        else:
            found = sorted(file for file in _matches(path) if file.is_file() and _reader(file))
            if not found:
                raise UserError(f"{source}: no such file or folder")
        files += found
    return list(dict.fromkeys(files))  # a file named twice is read once


def is_dataset(source: str) -> bool:
    """Whether ``source`` can only be the name of a data set: no such path or pattern, and ``datasets`` is installed."""
    path = Path(source)
    if path.exists() or _reader(path) or any(sign in source for sign in "*?["):
        return False
    return importlib.util.find_spec("datasets") is not None


def read_documents(file: Path, *, field: str, report: Report) -> Iterator[Document]:
    """The documents of one file, in order; ``report`` counts them, and what had to be left out."""
    reader = _reader(file)
    assert reader is not None, f"{file} was not expanded"
    try:
        for document in reader(file, field, report):
            report.documents += 1
            report.chats += bool(document.messages)
            report.text_bytes += document.num_bytes
            report.files[str(file)] += 1
            yield document
    except (OSError, EOFError, zlib.error) as error:
        report.skip(f"the file ends early or cannot be read: {_short(error)}", str(file))


def _matches(path: Path) -> Iterator[Path]:
    """The files a pattern such as ``data/*.jsonl`` means, in shells that do not expand it."""
    parts = path.parts
    wild = next((i for i, part in enumerate(parts) if any(sign in part for sign in "*?[")), None)
    if wild is None:
        return iter(())
    return Path(*parts[:wild]).glob("/".join(parts[wild:]))


def _read_text(file: Path, field: str, report: Report) -> Iterator[Document]:
    with file.open("rb") as stream:
        number = 0
        while raw := stream.read(MAX_TEXT_BYTES):
            raw += stream.readline() if len(raw) == MAX_TEXT_BYTES else b""
            number += 1
            place = str(file) if number == 1 else f"{file}, part {number}"
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                report.skip("not UTF-8 text", place)
                continue
            if text.strip():
                yield Document(text=text)
            else:
                report.skip("empty text", place)
        if number == 0:
            report.skip("empty text", str(file))


def _read_jsonl(file: Path, field: str, report: Report, *, compression: str = "") -> Iterator[Document]:
    with file.open("rb") as stream:
        for number, line in enumerate(_lines(_pieces(stream, compression)), start=1):
            if not line.strip():
                continue
            place = f"{file}:{number}"
            try:
                row = json.loads(line)
            except UnicodeDecodeError:
                report.skip("not UTF-8 text", place)
            except (ValueError, RecursionError):
                report.skip("not JSON", place)
            else:
                yield from _row(row, field, place, report)


def _read_parquet(file: Path, field: str, report: Report) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        columns = [name for name in (field, "messages") if name in table.schema_arrow.names]
        if not columns:
            report.skip(f"no column {field!r}", str(file))
            return
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield from _row(row, field, f"{file}:{number}", report)
    except pyarrow.ArrowException as error:
        report.skip(f"not readable as parquet: {_short(error)}", str(file))


def read_dataset(name: str, *, field: str, report: Report) -> Iterator[Document]:
    """The training split of a ``datasets`` name, streamed."""
    import datasets

    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
        for number, row in enumerate(rows, start=1):
            for document in _row(row, field, f"{name}:{number}", report):
                report.documents += 1
                report.chats += bool(document.messages)
                report.text_bytes += document.num_bytes
                report.files[name] += 1
                yield document
    except (OSError, ValueError) as error:
        raise UserError(f"the data set {name!r} cannot be loaded: {_short(error)}") from None


def _row(row: Any, field: str, place: str, report: Report) -> Iterator[Document]:
    if not isinstance(row, Mapping):
        report.skip("not a JSON object", place)
    elif row.get(field) is None and row.get("messages") is not None:
        yield from _chat(row["messages"], place, report)
    elif field not in row:
        report.skip(f"no field {field!r}", place)
    elif not isinstance(text := row[field], str):
        report.skip(f"the field {field!r} is not text", place)
    elif not text.strip():
        report.skip("empty text", place)
    else:
        yield Document(text=text)


def _chat(messages: Any, place: str, report: Report) -> Iterator[Document]:
    try:
        checked = check_messages(messages)
    except UserError as error:
        report.skip(f"malformed chat: {error}", place)
        return
    if not any(message["role"] == "assistant" for message in checked):
        report.skip("a chat in which the assistant says nothing", place)
        return
    yield Document(messages=tuple(checked))


def _lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Whole lines out of pieces cut anywhere."""
    rest = b""
    for piece in pieces:
        first, *more = piece.split(b"\n")
        if not more:
            rest += first
            continue
        yield rest + first
        yield from more[:-1]
        rest = more[-1]
    if rest:
        yield rest


def _pieces(stream: BinaryIO, compression: str) -> Iterator[bytes]:
    if compression == "zst":
        yield from _zstandard_pieces(stream)
        return
    source: Any = gzip.GzipFile(fileobj=stream) if compression == "gz" else stream
    while piece := source.read(PIECE_BYTES):
        yield piece


def _zstandard_pieces(stream: BinaryIO) -> Iterator[bytes]:
    """Decompressed pieces of all frames; raises ``EOFError`` where the last frame is cut short, unlike the library."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor()
    frame = decompressor.decompressobj()
    fed = False
    while raw := stream.read(PIECE_BYTES):
        while raw:
            if frame.eof:
                frame = decompressor.decompressobj()
            try:
                piece = frame.decompress(raw)
            except zstandard.ZstdError as error:
                raise EOFError(f"damaged zstandard data ({error})") from None
            fed = True
            if piece:
                yield piece
            raw = frame.unused_data if frame.eof else b""
    if fed and not frame.eof:
        raise EOFError("the last zstandard frame is cut short")


def _short(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


READERS = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": partial(_read_jsonl, compression="gz"),
    ".jsonl.zst": partial(_read_jsonl, compression="zst"),
    ".parquet": _read_parquet,
}


def _reader(file: Path) -> Any:
    name = file.name.lower()
    return next((reader for suffix, reader in READERS.items() if name.endswith(suffix)), None)
