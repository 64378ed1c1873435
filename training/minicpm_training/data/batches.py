"""Batches as a pure function of (seed, stages, position): resuming needs one integer.

Legend: B batch rows, T time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from minicpm_training.data.mixture import RowPlan
from minicpm_training.data.token_set import TokenSet

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of packed documents.

    ``cu_seqlens`` (int32) bounds the documents over the B·T tokens; every row starts a new one, even in the middle
    of a document. A target is -100 after a document's last token and where a chat's mask says so.
    """

    input_ids_BT: Tensor
    targets_BT: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    num_targets: int
    origins: tuple[str, ...]  # "set:row" for each row, to name a batch that fails

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        moved = {
            name: getattr(self, name).to(device) for name in ("input_ids_BT", "targets_BT", "cu_seqlens")
        }
        return replace(self, **moved)

    def describe(self) -> str:
        """The rows, in words, for an error message."""
        return ", ".join(self.origins)


def rows_to_batch(tokens: TokenSet, rows: Sequence[int], sequence_length: int) -> Batch:
    """Rows of one set, by number, as a batch."""
    return batch_of([(tokens, row) for row in rows], sequence_length)


def batch_of(rows: Sequence[tuple[TokenSet, int]], sequence_length: int) -> Batch:
    """Rows of any sets: row r of a set is its tokens [r·T, (r + 1)·T), each with the token after it as target."""
    inputs = np.empty((len(rows), sequence_length), dtype=np.int64)
    targets = np.empty_like(inputs)
    bounds = []
    for index, (tokens, row) in enumerate(rows):
        start = row * sequence_length
        ids = tokens.read(start, sequence_length + 1)
        inputs[index], targets[index] = ids[:-1], ids[1:]
        starts = tokens.starts_within(start, sequence_length + 1)
        targets[index, starts[starts > 0] - 1] = IGNORED
        mask = tokens.read_mask(start, sequence_length + 1)
        if mask is not None:
            targets[index, ~mask[1:]] = IGNORED
        inside = starts[(starts > 0) & (starts < sequence_length)]
        bounds.append(np.concatenate([[0], inside]) + index * sequence_length)
    cu_seqlens = np.concatenate([*bounds, [inputs.size]]).astype(np.int32)
    return Batch(
        input_ids_BT=torch.from_numpy(inputs),
        targets_BT=torch.from_numpy(targets),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=int(np.diff(cu_seqlens).max()),
        num_targets=int((targets != IGNORED).sum()),
        origins=tuple(f"{tokens.folder.name}:{row}" for tokens, row in rows),
    )


@dataclass(frozen=True, kw_only=True)
class BatchStream:
    """The batches of a run: sets by path, and the plan that says which row stands at which position."""

    sets: dict[str, TokenSet]
    plan: RowPlan
    sequence_length: int

    def rows(self, start: int, count: int) -> list[tuple[TokenSet, int]]:
        """(set, row) at positions [start, start + count), counted over all stages."""
        return [(self.sets[place.source], place.row) for place in self.plan.places(start, count)]

    def batch(self, start: int, count: int) -> Batch:
        """The batch of the rows at positions [start, start + count)."""
        return batch_of(self.rows(start, count), self.sequence_length)
