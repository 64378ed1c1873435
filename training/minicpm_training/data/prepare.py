"""Text to token shards: documents are read in one process and encoded in one process a core."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicpm_edge.atomic import atomic_folder
from minicpm_edge.chat import encode_chat_with_mask
from minicpm_edge.errors import UserError
from minicpm_edge.progress import Progress
from minicpm_edge.tokenizer import Tokenizer
from minicpm_training.data.report import Report
from minicpm_training.data.sources import Document, expand, is_dataset, read_dataset, read_documents
from minicpm_training.data.token_writer import TokenWriter

CHUNK_BYTES = 2 << 20  # of text in one piece of work
CHUNKS_AHEAD = 3  # for each process; bounds the memory

Encoded = tuple[NDArray[np.uint32], NDArray[np.uint8] | None]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a preparation did: the set's manifest, and how fast."""

    manifest: dict[str, Any]
    report: Report
    seconds: float


def documents_of(sources: Sequence[str], *, field: str, report: Report) -> Iterator[Document]:
    """All documents of the sources, in order: files, folders and patterns, or names of ``datasets``."""
    for source in sources:
        if is_dataset(source):
            yield from read_dataset(source, field=field, report=report)
        else:
            for file in expand([source]):
                yield from read_documents(file, field=field, report=report)


def prepare(
    sources: Sequence[str],
    *,
    tokenizer_folder: Path,
    out: Path,
    field: str = "text",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Prepare a token set from ``sources`` into the folder ``out``, which appears whole or not at all.

    Args:
        workers: processes that encode; default one a core. The result does not depend on it.

    Raises:
        UserError: where ``out`` exists, a source is missing, or nothing in the sources can be used.
    """
    if out.exists():
        raise UserError(f"{out} exists; give another --out, or remove it to prepare it again")
    tokenizer = Tokenizer.load(tokenizer_folder)
    files = [source for source in sources if not is_dataset(source)]
    expand(files)  # a source that is missing is found before work begins
    started, report = time.monotonic(), Report()
    with atomic_folder(out) as folder, closing(_Writing(folder, tokenizer)) as writing:
        documents = documents_of(sources, field=field, report=report)
        for encoded in _encode_all(_chunks(documents), tokenizer, tokenizer_folder, workers or _cores()):
            for ids, mask in encoded:
                writing.writer.add(ids, mask)
            if progress:
                rate = report.text_bytes / 1e6 / max(time.monotonic() - started, 1e-3)
                progress.update(
                    f"{report.documents:,} documents  {report.text_bytes / 1e6:,.1f} MB of text  "
                    f"{writing.writer.num_tokens:,} tokens  {rate:.1f} MB/s"
                )
        if not writing.writer.num_tokens:
            found = "; ".join(report.lines()) or "they are empty"
            raise UserError(f"nothing in {', '.join(sources)} can be used: {found}")
        manifest = writing.writer.close(
            tokenizer_sha256=tokenizer.sha256, num_bytes=report.text_bytes, report=report.to_dict()
        )
    return Prepared(manifest=manifest, report=report, seconds=time.monotonic() - started)


class _Writing:
    """The writer, closed on every way out, so that an abandoned folder can be removed."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.writer = TokenWriter(folder, vocab_size=tokenizer.vocab_size)

    def close(self) -> None:
        self.writer.abandon()


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += document.num_bytes
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode_all(
    chunks: Iterator[list[Document]], tokenizer: Tokenizer, folder: Path, workers: int
) -> Iterator[list[Encoded]]:
    """Encoded chunks in the order of ``chunks``, whichever process was first."""
    first = next(chunks, None)
    second = next(chunks, None)
    if first is None:
        return
    if second is None or workers == 1:  # too little to be worth a process
        yield encode_documents(tokenizer, first)
        if second is not None:
            yield encode_documents(tokenizer, second)
        yield from (encode_documents(tokenizer, chunk) for chunk in chunks)
        return
    # Spawned, not forked: the tokenizer has threads, and Windows and macOS know nothing else.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=spawn, initializer=_start_worker, initargs=(str(folder),)
    ) as pool:
        waiting: deque[Future[list[Encoded]]] = deque(pool.submit(_work, chunk) for chunk in (first, second))
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_work, chunk))
                if len(waiting) >= CHUNKS_AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_worker_tokenizer: Tokenizer


def _start_worker(folder: str) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a process
    _worker_tokenizer = Tokenizer.load(folder)


def _work(chunk: list[Document]) -> list[Encoded]:
    return encode_documents(_worker_tokenizer, chunk)


def encode_documents(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[Encoded]:
    """Ids of each document between begin and end token, and for chats which of them are to be learnt."""
    texts = iter(tokenizer.encode_batch([document.text for document in documents if not document.messages]))
    encoded: list[Encoded] = []
    for document in documents:
        if document.messages:
            ids, learned = encode_chat_with_mask(tokenizer, document.messages)
            encoded.append(
                (np.array([*ids, tokenizer.eos_id], np.uint32), np.array([*learned, True], np.uint8))
            )
        else:
            encoded.append((np.array([tokenizer.bos_id, *next(texts), tokenizer.eos_id], np.uint32), None))
    return encoded


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
