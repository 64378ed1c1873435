"""Which row of which set stands at each position of a run: exact shares, a fresh order every epoch, no state.

Positions count rows over all stages. Within a stage, blocks of rows give each source its quota to the row and spread
it evenly: within a block every prefix keeps the block's shares to less than one row. A source's rows are then taken
in a seeded order, a new one each epoch; a later stage goes on in it where the earlier ones stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from minicpm_edge.errors import UserError

BLOCK_ROWS = 1 << 14
MIN_SHARE = 1 / 20_000  # below it a whole run may never come to a source's row


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of the run with one mixture: its length in rows and (source, weight) by share of tokens."""

    num_rows: int
    weights: tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class Place:
    """One row: number ``row`` of the set ``source``."""

    source: str
    row: int


class RowPlan:
    """The pure function position → (source, row) of a seed, the stages and the sizes of the sets in rows."""

    def __init__(self, *, seed: int, stages: Sequence[Stage], num_rows: Mapping[str, int]) -> None:
        self._seed, self._stages, self._num_rows = seed, tuple(stages), dict(num_rows)
        for stage in self._stages:
            for source, _ in stage.weights:
                if self._num_rows[source] < 1:
                    raise UserError(
                        f"{source} is shorter than one row; lower data.sequence_length or add text"
                    )
            for (source, _), share in zip(stage.weights, _shares(stage.weights), strict=True):
                if not share >= MIN_SHARE:
                    raise UserError(
                        f"the weight of {source} is a share of {share:.2g}; the least is {MIN_SHARE:.2g}"
                    )
        self._starts = np.concatenate([[0], np.cumsum([stage.num_rows for stage in self._stages])]).tolist()
        self._used_before = self._count_before_each_stage()

    def places(self, start: int, count: int) -> list[Place]:
        """The rows at positions [start, start + count)."""
        return [self._place(position) for position in range(start, start + count)]

    def _place(self, position: int) -> Place:
        stage = int(np.searchsorted(self._starts, position, side="right")) - 1
        if not 0 <= stage < len(self._stages):
            raise IndexError(f"position {position} is past the last stage, which ends at {self._starts[-1]}")
        weights = self._stages[stage].weights
        shares = _shares(weights)
        block, offset = divmod(position - self._starts[stage], BLOCK_ROWS)
        choice, rank_in_block = _block(shares, block)
        index = int(choice[offset])
        source = weights[index][0]
        rank = (
            self._used_before[stage].get(source, 0)
            + _quota_before(shares, block)[index]
            + int(rank_in_block[offset])
        )
        epoch, place = divmod(rank, self._num_rows[source])
        order = _order(self._seed, source_key(source), epoch, self._num_rows[source])
        return Place(source=source, row=int(order[place]))

    def _count_before_each_stage(self) -> list[dict[str, int]]:
        """For each stage, how many rows of each source the stages before it took."""
        used: dict[str, int] = {}
        counts = []
        for stage in self._stages:
            counts.append(dict(used))
            for (source, _), taken in zip(stage.weights, self._taken(stage), strict=True):
                used[source] = used.get(source, 0) + taken
        return counts

    def _taken(self, stage: Stage) -> list[int]:
        shares = _shares(stage.weights)
        block, rest = divmod(stage.num_rows, BLOCK_ROWS)
        choice, _ = _block(shares, block)
        partial = np.bincount(choice[:rest], minlength=len(shares))
        return [
            before + int(extra) for before, extra in zip(_quota_before(shares, block), partial, strict=True)
        ]


def source_key(source: str) -> str:
    """What seeds a source's order: the name of its folder, so that moving the data does not change a run."""
    return source.rstrip("/").rsplit("/", 1)[-1]


def _shares(weights: Sequence[tuple[str, float]]) -> tuple[float, ...]:
    total = sum(weight for _, weight in weights)
    return tuple(weight / total for _, weight in weights)


def _quota_before(shares: tuple[float, ...], block: int) -> tuple[int, ...]:
    """Rows of each source in the blocks before ``block``: cumulative shares rounded, so that the sum is exact."""
    edges = np.floor(np.cumsum(shares) * (block * BLOCK_ROWS) + 0.5).astype(np.int64)
    edges[-1] = block * BLOCK_ROWS
    return tuple(np.diff(edges, prepend=0).tolist())


@lru_cache(maxsize=64)
def _block(shares: tuple[float, ...], block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(source index, rank of the row among its source's rows of the block) for each row of a block."""
    quotas = [
        after - before
        for before, after in zip(_quota_before(shares, block), _quota_before(shares, block + 1), strict=True)
    ]
    choice, rank = np.empty(BLOCK_ROWS, dtype=np.int64), np.empty(BLOCK_ROWS, dtype=np.int64)
    # Fair scheduling (Baruah et al. 1996, "Proportionate progress"): the k-th of a source's q rows may come from
    # position k·B/q on and must come before (k + 1)·B/q; the earliest deadline first always manages that.
    taken = [0] * len(quotas)
    for position in range(BLOCK_ROWS):
        _, index = min(
            (-(-(k + 1) * BLOCK_ROWS // quota), index)
            for index, (k, quota) in enumerate(zip(taken, quotas, strict=True))
            if k < quota and k * BLOCK_ROWS // quota <= position
        )
        choice[position], rank[position] = index, taken[index]
        taken[index] += 1
    return choice, rank


@lru_cache(maxsize=32)
def _order(seed: int, key: str, epoch: int, num_rows: int) -> NDArray[np.int64]:
    """The seeded order of a set's rows in one epoch."""
    digest = hashlib.sha256(f"{seed}/{key}/{epoch}".encode()).digest()
    # Raw bits, not Generator.permutation: only they are promised to stay the same in later versions of NumPy.
    keys = np.random.PCG64(int.from_bytes(digest[:16], "little")).random_raw(num_rows)
    return np.argsort(keys, kind="stable")


def realised(places: Iterator[Place]) -> dict[str, int]:
    """Rows of each source among ``places``."""
    counts: dict[str, int] = {}
    for place in places:
        counts[place.source] = counts.get(place.source, 0) + 1
    return counts
