"""Writes the shards of a tokenized dataset (the format is in :mod:`.tokenized_dataset`), a document at a time."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

SHARD_TOKENS = 1 << 27
SHARD_DOCUMENTS = 1 << 22
ONES = b"\1" * (1 << 20)


class SetWriter:
    """Appends documents to ``folder``; a context manager. A document lies whole in one shard."""

    def __init__(self, folder: Path, dtype: np.dtype[Any], *, shard_tokens: int = SHARD_TOKENS) -> None:
        self._folder, self._dtype, self._shard_tokens = folder, dtype, shard_tokens
        self._tokens: BinaryIO | None = None
        self._mask: BinaryIO | None = None
        self._starts: list[int] = []
        self._in_shard = 0
        self._sha256 = hashlib.sha256()
        #: The manifest's entries of the shards written so far.
        self.shards: list[dict[str, int]] = []
        self.has_mask = False

    @property
    def sha256(self) -> str:
        """SHA-256 over all token bytes: the same for the same data, wherever it lies."""
        return self._sha256.hexdigest()

    def add(self, ids: NDArray[Any], lengths: NDArray[np.int64], mask: NDArray[np.bool_] | None) -> None:
        """Append documents: their ids joined, the length of each, and their loss mask (None: all count)."""
        if mask is not None and not self.has_mask:
            self._begin_masks()
        at = 0
        for length in lengths.tolist():
            if self._in_shard and (
                self._in_shard + length > self._shard_tokens or len(self._starts) == SHARD_DOCUMENTS
            ):
                self._end_shard()
            self._write(ids[at : at + length], None if mask is None else mask[at : at + length])
            at += length

    def _write(self, ids: NDArray[Any], mask: NDArray[np.bool_] | None) -> None:
        if self._tokens is None:
            self._tokens = self._open("tokens")
        if self.has_mask and self._mask is None:
            self._mask = self._open("mask")
        data = ids.astype(self._dtype, copy=False).tobytes()
        self._tokens.write(data)
        self._sha256.update(data)
        if self._mask is not None:
            learned = np.ones(len(ids), dtype=np.uint8) if mask is None else mask.astype(np.uint8)
            self._mask.write(learned.tobytes())
        self._starts.append(self._in_shard)
        self._in_shard += len(ids)

    def _begin_masks(self) -> None:
        """The first document with a loss mask: everything before it counts."""
        self.has_mask = True
        for index, entry in enumerate(self.shards):
            with (self._folder / f"mask-{index:05}.bin").open("wb") as stream:
                _write_ones(stream, entry["num_tokens"])
        if self._in_shard:
            self._mask = self._open("mask")
            _write_ones(self._mask, self._in_shard)

    def _open(self, kind: str) -> BinaryIO:
        return (self._folder / f"{kind}-{len(self.shards):05}.bin").open("wb")

    def _end_shard(self) -> None:
        self._close()
        if not self._in_shard:
            return
        starts = np.array(self._starts, dtype=np.int64)
        np.save(self._folder / f"documents-{len(self.shards):05}.npy", starts)
        self.shards.append({"num_tokens": self._in_shard, "num_documents": len(starts)})
        self._starts, self._in_shard = [], 0

    def _close(self) -> None:
        for stream in (self._tokens, self._mask):
            if stream is not None:
                stream.close()
        self._tokens = self._mask = None

    def __enter__(self) -> SetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._end_shard()
        else:
            self._close()


def _write_ones(stream: BinaryIO, count: int) -> None:
    for _ in range(count // len(ONES)):
        stream.write(ONES)
    stream.write(ONES[: count % len(ONES)])
