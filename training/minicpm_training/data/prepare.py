"""``data prepare``: text files to a tokenized dataset, on all cores, whole or not at all."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicpm_edge.atomic import atomic_folder
from minicpm_edge.cli.progress import Progress, duration
from minicpm_edge.cores import usable_cpus
from minicpm_edge.errors import UserError
from minicpm_edge.text.chat import encode_chat_with_mask
from minicpm_edge.text.tokenizer import Tokenizer
from minicpm_training.data.documents import Document, Skipped, documents
from minicpm_training.data.encoder import Encoder
from minicpm_training.data.sources import (
    CHUNK_BYTES,
    TEXT_SUFFIXES,
    Chunk,
    Source,
    find_sources,
    read_chunks,
)
from minicpm_training.data.tokenized_dataset import FORMAT, MANIFEST, dtype_for
from minicpm_training.data.workers import ordered_map
from minicpm_training.data.writer import SetWriter

EXAMPLES = 10  # places named in the report for each source
MAX_REASONS = 20
SMALL_BYTES = 8 * CHUNK_BYTES  # of text; below it starting processes takes longer than the work
PLAIN_SUFFIXES = (".jsonl", *TEXT_SUFFIXES)  # the others are compressed, about fourfold


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What a worker makes of one chunk: the documents' ids joined, their lengths, and what was skipped."""

    source: int
    done: float
    ids: NDArray[Any]
    lengths: NDArray[np.int64]
    mask: NDArray[np.bool_] | None
    num_bytes: int
    skipped: tuple[Skipped, ...]


@dataclass(kw_only=True)
class SourceReport:
    """What became of one SRC."""

    source: Source
    num_documents: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    skipped: Counter[str] = dataclass_field(default_factory=Counter)
    examples: list[str] = dataclass_field(default_factory=list)

    def add(self, encoded: Encoded) -> None:
        """Count one chunk."""
        self.num_documents += len(encoded.lengths)
        self.num_tokens += len(encoded.ids)
        self.num_bytes += encoded.num_bytes
        for skipped in encoded.skipped:
            known = skipped.reason in self.skipped or len(self.skipped) < MAX_REASONS
            self.skipped[skipped.reason if known else "other reasons"] += 1
            if len(self.examples) < EXAMPLES:
                self.examples.append(str(skipped))

    def to_dict(self) -> dict[str, Any]:
        """For the manifest and ``--json``."""
        return {
            "source": self.source.name,
            "num_files": len(self.source.files),
            "num_files_ignored": self.source.num_ignored,
            "num_documents": self.num_documents,
            "num_tokens": self.num_tokens,
            "num_bytes": self.num_bytes,
            "skipped": dict(self.skipped),
            "examples": self.examples,
        }


def prepare(
    names: Sequence[str],
    *,
    tokenizer: Path,
    out: Path,
    field: str = "text",
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make the tokenized dataset ``out`` of the sources ``names``; returns its manifest.

    The result does not depend on the number of workers (default: one a core). Until it is whole, nothing stands
    under the name ``out``, or what stood there before.

    Raises UserError for sources that are not there or hold no document at all.
    """
    check_replaceable(out, MANIFEST)
    vocabulary = Tokenizer.load(tokenizer)
    sources = find_sources(names)
    reports = [SourceReport(source=source) for source in sources]
    progress = progress or Progress()
    started = time.monotonic()
    results = ordered_map(
        _encode_chunk,
        read_chunks(sources, field),
        workers=_num_workers(workers, sources),
        start=_start,
        arguments=(tokenizer, field),
    )
    dtype_name = dtype_for(vocabulary.vocab_size)
    with atomic_folder(out) as folder:
        with SetWriter(folder, Encoder(vocabulary).dtype) as writer, progress:
            for encoded in results:
                writer.add(encoded.ids, encoded.lengths, encoded.mask)
                reports[encoded.source].add(encoded)
                progress.update(_status(reports, encoded, time.monotonic() - started))
        if not writer.shards:
            raise UserError(_nothing_found(names, reports))
        manifest = {
            "format": FORMAT,
            "dtype": dtype_name,
            "has_mask": writer.has_mask,
            "num_tokens": sum(report.num_tokens for report in reports),
            "num_documents": sum(report.num_documents for report in reports),
            "num_bytes": sum(report.num_bytes for report in reports),
            "tokenizer_sha256": vocabulary.sha256,
            "tokens_sha256": writer.sha256,
            "shards": writer.shards,
            "field": field,
            "sources": [report.to_dict() for report in reports],
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8", newline="\n")
    return manifest


def check_replaceable(out: Path, mark: str) -> None:
    """UserError unless ``out`` is free, empty, or holds the file ``mark``, which shows that we made it."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file; give a folder with --out")
    if any(out.iterdir()) and not (out / mark).is_file():
        raise UserError(f"the folder {out} holds other files; give a new or empty one with --out")


def _num_workers(asked: int | None, sources: Sequence[Source]) -> int:
    if asked is not None:
        return asked
    files = [file for source in sources for file in source.files if file.exists()]
    size = sum(file.stat().st_size * (1 if file.suffix in PLAIN_SUFFIXES else 4) for file in files)
    small = size < SMALL_BYTES and not any(source.dataset for source in sources)
    return 1 if small else usable_cpus()


_worker: tuple[Encoder, str]  # set once in each process by `_start`


def _start(tokenizer: Path, field: str) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = (
        "false"  # one process a core is all the parallelism there is to have
    )
    _worker = Encoder(Tokenizer.load(tokenizer)), field


def _encode_chunk(chunk: Chunk) -> Encoded:
    encoder, field = _worker
    ids: list[NDArray[Any]] = []
    masks: list[NDArray[np.bool_] | None] = []
    skipped = []
    num_bytes = 0
    for document in documents(chunk, field):
        if isinstance(document, Skipped):
            skipped.append(document)
            continue
        document_ids, mask = _encode_document(encoder, document)
        ids.append(document_ids)
        masks.append(mask)
        num_bytes += len(document.text.encode())
    return Encoded(
        source=chunk.source,
        done=chunk.done,
        ids=np.concatenate(ids) if ids else np.zeros(0, dtype=encoder.dtype),
        lengths=np.array([len(each) for each in ids], dtype=np.int64),
        mask=_join_masks(ids, masks),
        num_bytes=num_bytes,
        skipped=tuple(skipped),
    )


def _encode_document(encoder: Encoder, document: Document) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """``<s> tokens </s>``. In a chat the mask marks what the assistant says, its end-of-turn token included."""
    bos, eos = encoder.tokenizer.bos_id, encoder.tokenizer.eos_id
    if document.messages is None:
        ends = np.array([bos, eos], dtype=encoder.dtype)
        return np.concatenate([ends[:1], encoder.encode(document.text), ends[1:]]), None
    ids, mask = encode_chat_with_mask(
        encoder.tokenizer, document.messages, encode=lambda text: encoder.encode(text).tolist()
    )
    if ids[:1] != [bos]:
        ids, mask = [bos, *ids], [False, *mask]
    return np.array([*ids, eos], dtype=encoder.dtype), np.array([*mask, False])


def _join_masks(
    ids: Sequence[NDArray[Any]], masks: Sequence[NDArray[np.bool_] | None]
) -> NDArray[np.bool_] | None:
    if all(mask is None for mask in masks):
        return None
    pairs = zip(ids, masks, strict=True)
    return np.concatenate(
        [np.ones(len(each), dtype=np.bool_) if mask is None else mask for each, mask in pairs]
    )


def _status(reports: Sequence[SourceReport], encoded: Encoded, seconds: float) -> str:
    num_bytes = sum(report.num_bytes for report in reports)
    num_tokens = sum(report.num_tokens for report in reports)
    skipped = sum(report.skipped.total() for report in reports)
    source = f"source {encoded.source + 1}/{len(reports)}  " if len(reports) > 1 else ""
    return (
        f"{source}{encoded.done:4.0%}  {num_bytes / 1e6:,.1f} MB  {num_tokens / 1e6:,.2f}M tokens  "
        f"{num_bytes / 1e6 / max(seconds, 1e-9):.1f} MB/s  {duration(seconds)}"
        + (f"  {skipped} skipped" if skipped else "")
    )


def _nothing_found(names: Sequence[str], reports: Sequence[SourceReport]) -> str:
    examples = [example for report in reports for example in report.examples]
    skipped = sum(report.skipped.total() for report in reports)
    detail = f"{skipped} skipped, the first: {examples[0]}" if examples else "the files are empty"
    return f"no document in {', '.join(names)}: {detail}"
