"""Writing a prepared set, shard by shard, with bounded memory; the format is that of ``token_set``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from minicpm_training.data.token_set import DTYPES, FORMAT, MANIFEST, dtype_for

SHARD_TOKENS = 1 << 28


class TokenWriter:
    """Appends documents to a set in ``folder`` (existing, empty); :meth:`close` writes the manifest.

    Masks are kept only from the first chat on: until then every token counts, and a set without chats has none.
    """

    def __init__(self, folder: Path, *, vocab_size: int, shard_tokens: int = SHARD_TOKENS) -> None:
        self._folder, self._shard_tokens = folder, shard_tokens
        self._dtype_name = dtype_for(vocab_size)
        self._shards: list[dict[str, int]] = []
        self._starts: list[int] = []
        self._tokens: BinaryIO | None = None
        self._num_tokens = 0  # of the open shard
        self._learned: list[tuple[int, int, NDArray[np.uint8]]] = []  # (shard, start, mask) of the chats

    @property
    def num_tokens(self) -> int:
        """Tokens written so far."""
        return sum(shard["num_tokens"] for shard in self._shards) + self._num_tokens

    def add(self, ids: NDArray[np.uint32], mask: NDArray[np.uint8] | None = None) -> None:
        """Append one document's ids; ``mask`` is 1 where a token is to be learnt (None: everywhere)."""
        if self._tokens is None:
            self._tokens = self._path("tokens", "bin").open("wb")
        self._starts.append(self._num_tokens)
        if mask is not None:
            self._learned.append((len(self._shards), self._num_tokens, mask))
        self._tokens.write(ids.astype(DTYPES[self._dtype_name]).tobytes())
        self._num_tokens += len(ids)
        if self._num_tokens >= self._shard_tokens:
            self._end_shard()

    def close(self, *, tokenizer_sha256: str, num_bytes: int, report: Mapping[str, Any]) -> dict[str, Any]:
        """Finish the set; returns its manifest."""
        self._end_shard()
        if self._learned:
            self._write_masks()
        manifest = {
            "format": FORMAT,
            "dtype": self._dtype_name,
            "has_mask": bool(self._learned),
            "num_tokens": sum(shard["num_tokens"] for shard in self._shards),
            "num_documents": sum(shard["num_documents"] for shard in self._shards),
            "num_bytes": num_bytes,
            "tokenizer_sha256": tokenizer_sha256,
            "shards": self._shards,
            "report": report,
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        (self._folder / MANIFEST).write_text(text, encoding="utf-8", newline="\n")
        return manifest

    def abandon(self) -> None:
        """Let go of the open file, so that the folder can be removed (Windows)."""
        if self._tokens is not None:
            self._tokens.close()

    def _end_shard(self) -> None:
        if self._tokens is None:
            return
        self._tokens.close()
        self._tokens = None
        np.save(self._path("documents", "npy"), np.array(self._starts, dtype=np.int64))
        self._shards.append({"num_tokens": self._num_tokens, "num_documents": len(self._starts)})
        self._starts, self._num_tokens = [], 0

    def _write_masks(self) -> None:
        for index, shard in enumerate(self._shards):
            mask = np.ones(shard["num_tokens"], dtype=np.uint8)
            for where, start, learned in self._learned:
                if where == index:
                    mask[start : start + len(learned)] = learned
            mask.tofile(self._folder / f"mask-{index:05}.bin")

    def _path(self, kind: str, suffix: str) -> Path:
        return self._folder / f"{kind}-{len(self._shards):05}.{suffix}"
