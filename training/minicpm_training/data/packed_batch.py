"""Batches of packed documents, cut from tokenized datasets.

Legend: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from minicpm_training.data.tokenized_dataset import TokenizedDataset

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Sequences of packed documents.

    ``cu_seqlens`` (int32) bounds the documents over the B·T tokens; every sequence starts a new one, even in the
    middle of a document. A target is -100 after a document's last token and where a chat's loss mask says so.
    """

    input_ids_BT: Tensor
    targets_BT: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    num_targets: int
    origins: tuple[str, ...]  # "set:index" of each sequence, to name a batch that fails

    @property
    def num_tokens(self) -> int:
        """B·T."""
        return self.input_ids_BT.numel()

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on a device."""
        moved = {
            name: getattr(self, name).to(device) for name in ("input_ids_BT", "targets_BT", "cu_seqlens")
        }
        return replace(self, **moved)

    def describe(self) -> str:
        """The sequences, in words, for an error message."""
        return ", ".join(self.origins)


def packed_batch(sequences: Sequence[tuple[TokenizedDataset, int]], sequence_length: int) -> PackedBatch:
    """(set, index) of each sequence as a batch: the tokens [index·T, (index + 1)·T), each with the next as target."""
    inputs = np.empty((len(sequences), sequence_length), dtype=np.int64)
    targets = np.empty_like(inputs)
    bounds = []
    for number, (tokens, index) in enumerate(sequences):
        start = index * sequence_length
        ids = tokens.read(start, sequence_length + 1)
        inputs[number], targets[number] = ids[:-1], ids[1:]
        starts = tokens.starts_within(start, sequence_length + 1)
        targets[number, starts[starts > 0] - 1] = IGNORED
        mask = tokens.read_mask(start, sequence_length + 1)
        if mask is not None:
            targets[number, ~mask[1:]] = IGNORED
        inside = starts[(starts > 0) & (starts < sequence_length)]
        bounds.append(np.concatenate([[0], inside]) + number * sequence_length)
    cu_seqlens = np.concatenate([*bounds, [inputs.size]]).astype(np.int32)
    return PackedBatch(
        input_ids_BT=torch.from_numpy(inputs),
        targets_BT=torch.from_numpy(targets),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=int(np.diff(cu_seqlens).max()),
        num_targets=int((targets != IGNORED).sum()),
        origins=tuple(f"{tokens.folder.name}:{index}" for tokens, index in sequences),
    )
