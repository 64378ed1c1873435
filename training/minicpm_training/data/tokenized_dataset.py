"""A tokenized dataset: token ids of many documents in memory-mapped shards, and where each document starts.

::

    manifest.json            counts, tokenizer's SHA-256, report of what was read and skipped
    tokens-00000.bin         uint16 (vocabulary up to 65,536) or uint32, little endian
    documents-00000.npy      int64, index of each document's first token within its shard
    mask-00000.bin           uint8, only in sets of chats: the loss mask: 1 where the token is a target
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicpm_edge.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


def dtype_for(vocab_size: int) -> str:
    """The name of the smallest dtype that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True, kw_only=True)
class TokenizedDataset:
    """An opened set. Tokens are numbered over all shards; nothing is read before it is asked for."""

    folder: Path
    manifest: Mapping[str, Any]
    shards: tuple[NDArray[Any], ...]
    masks: tuple[NDArray[np.uint8], ...]  # empty where every token counts
    shard_starts: NDArray[np.int64]  # (shards + 1,)
    document_starts: NDArray[np.int64]  # (documents,), sorted

    @classmethod
    def open(cls, folder: Path | str) -> TokenizedDataset:
        """Open a prepared set; raises :class:`UserError` where it is none, or is damaged."""
        folder = Path(folder)
        manifest = _read_manifest(folder)
        dtype = DTYPES[manifest["dtype"]]
        shards, masks, documents = [], [], []
        starts = np.concatenate([[0], np.cumsum([shard["num_tokens"] for shard in manifest["shards"]])])
        for index, entry in enumerate(manifest["shards"]):
            num_tokens = entry["num_tokens"]
            shards.append(_map(folder / f"tokens-{index:05}.bin", dtype, num_tokens))
            if manifest["has_mask"]:
                masks.append(_map(folder / f"mask-{index:05}.bin", np.dtype(np.uint8), num_tokens))
            documents.append(
                _load_documents(folder / f"documents-{index:05}.npy", num_tokens) + starts[index]
            )
        return cls(
            folder=folder,
            manifest=manifest,
            shards=tuple(shards),
            masks=tuple(masks),
            shard_starts=starts.astype(np.int64),
            document_starts=np.concatenate(documents).astype(np.int64),
        )

    @property
    def num_tokens(self) -> int:
        return int(self.shard_starts[-1])

    @property
    def num_documents(self) -> int:
        return len(self.document_starts)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the documents' text, for bits per byte."""
        return int(self.manifest["num_bytes"])

    @property
    def tokenizer_sha256(self) -> str:
        return str(self.manifest["tokenizer_sha256"])

    def num_sequences(self, sequence_length: int) -> int:
        """How many sequences of ``sequence_length`` inputs, each followed by its last target, the set holds."""
        return max(0, self.num_tokens - 1) // sequence_length

    def parts(self) -> Iterator[NDArray[Any]]:
        """The token ids, shard by shard."""
        yield from self.shards

    def read(self, start: int, length: int) -> NDArray[np.int64]:
        """Tokens [start, start + length) as int64, across shards."""
        return self._read(self.shards, start, length).astype(np.int64)

    def read_mask(self, start: int, length: int) -> NDArray[np.bool_] | None:
        """The loss mask of those tokens; None where all count."""
        return self._read(self.masks, start, length).astype(np.bool_) if self.masks else None

    def _read(self, shards: tuple[NDArray[Any], ...], start: int, length: int) -> NDArray[Any]:
        first = int(np.searchsorted(self.shard_starts, start, side="right")) - 1
        pieces: list[NDArray[Any]] = []
        while length > 0:
            offset = start - int(self.shard_starts[first])
            piece = shards[first][offset : offset + length]
            pieces.append(piece)
            start, length, first = start + len(piece), length - len(piece), first + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def starts_within(self, start: int, length: int) -> NDArray[np.int64]:
        """Offsets from ``start`` of the documents that begin in [start, start + length)."""
        low, high = np.searchsorted(self.document_starts, [start, start + length])
        return self.document_starts[low:high] - start


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise UserError(
                f"{folder} is a tokenized dataset of format {manifest['format']}; prepare it again"
            )
        _ = (
            DTYPES[manifest["dtype"]],
            manifest["has_mask"],
            manifest["num_bytes"],
            manifest["tokenizer_sha256"],
        )
        if not manifest["shards"] or not all(shard["num_tokens"] > 0 for shard in manifest["shards"]):
            raise UserError(f"{folder} is an empty tokenized dataset; prepare it again")
    except FileNotFoundError:
        raise UserError(
            f"{folder} is no prepared set (no {MANIFEST}); make one: minicpm-edge data prepare"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a tokenized dataset's manifest ({error!r}); prepare the set again"
        ) from None
    return dict(manifest)


def _map(path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    size = path.stat().st_size if path.is_file() else -1
    if size != count * dtype.itemsize:
        state = "missing" if size < 0 else f"{size} bytes long, not {count * dtype.itemsize}"
        raise UserError(f"{path} is {state}; prepare the set again")
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,))


def _load_documents(path: Path, num_tokens: int) -> NDArray[np.int64]:
    try:
        starts = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged ({error}); prepare the set again") from None
    sound = starts.ndim == 1 and len(starts) and starts.dtype == np.int64 and starts[0] == 0
    if not sound or starts[-1] >= num_tokens or (np.diff(starts) <= 0).any():
        raise UserError(f"{path} does not fit its tokens; prepare the set again")
    return np.asarray(starts)
