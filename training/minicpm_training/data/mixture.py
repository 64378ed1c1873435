"""Which sequence of which set stands at each position of a run: exact shares, a fresh order every epoch, no state.

Positions count sequences over all stages. Within a stage, blocks of them give each source its quota to the sequence and
spread it evenly: within a block every prefix keeps the block's shares to less than one sequence. A source's sequences
are then taken in a seeded order, a new one each epoch; a later stage goes on in it where the earlier ones stopped. A
stage of another sequence length cuts the sets anew, and begins an order of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from minicpm_edge.errors import UserError

BLOCK_SIZE = 1 << 14
MIN_SHARE = 1 / 20_000  # below it a whole run may never come to a source


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A stretch of the run with one mixture: its length in sequences and (source, weight) by share of tokens."""

    num_sequences: int
    sequence_length: int
    weights: tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class SampleIndex:
    """Sequence ``index`` of the set ``source``, cut into sequences of ``sequence_length`` tokens."""

    source: str
    sequence_length: int
    index: int


class MixtureSampler:
    """The pure function position → :class:`SampleIndex` of a seed, the stages and the sizes of the sets.

    ``num_sequences`` has an entry for each (source, sequence length) of the stages.

    Raises:
        UserError: for a set without one whole sequence, and for a share too small to be met.
    """

    def __init__(
        self, *, seed: int, stages: Sequence[Mixture], num_sequences: Mapping[tuple[str, int], int]
    ) -> None:
        self._seed, self._stages, self._sizes = seed, tuple(stages), dict(num_sequences)
        for stage in self._stages:
            for source, _ in stage.weights:
                if self._sizes[source, stage.sequence_length] < 1:
                    raise UserError(
                        f"{source} is shorter than one sequence; lower data.sequence_length or add text"
                    )
            for (source, _), share in zip(stage.weights, _shares(stage.weights), strict=True):
                if not share >= MIN_SHARE:
                    raise UserError(
                        f"the weight of {source} is a share of {share:.2g}; the least is {MIN_SHARE:.2g}"
                    )
        self._starts = np.concatenate(
            [[0], np.cumsum([stage.num_sequences for stage in self._stages])]
        ).tolist()
        self._used_before = self._count_before_each_stage()

    def samples(self, start: int, count: int) -> list[SampleIndex]:
        """The sequences at positions [start, start + count)."""
        return [self._sample(position) for position in range(start, start + count)]

    def _sample(self, position: int) -> SampleIndex:
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        if not 0 <= number < len(self._stages):
            raise IndexError(f"position {position} is past the last stage, which ends at {self._starts[-1]}")
        stage = self._stages[number]
        shares = _shares(stage.weights)
        block, offset = divmod(position - self._starts[number], BLOCK_SIZE)
        choice, rank_in_block = _block(shares, block)
        chosen = int(choice[offset])
        source = stage.weights[chosen][0]
        key = source, stage.sequence_length
        rank = (
            self._used_before[number].get(key, 0)
            + _quota_before(shares, block)[chosen]
            + int(rank_in_block[offset])
        )
        epoch, place = divmod(rank, self._sizes[key])
        order = _order(self._seed, source_key(source), epoch, self._sizes[key])
        return SampleIndex(source=source, sequence_length=stage.sequence_length, index=int(order[place]))

    def _count_before_each_stage(self) -> list[dict[tuple[str, int], int]]:
        """For each stage, how many sequences of each source and length the stages before it took."""
        used: dict[tuple[str, int], int] = {}
        counts = []
        for stage in self._stages:
            counts.append(dict(used))
            for (source, _), taken in zip(stage.weights, self._taken(stage), strict=True):
                key = source, stage.sequence_length
                used[key] = used.get(key, 0) + taken
        return counts

    def _taken(self, stage: Mixture) -> list[int]:
        shares = _shares(stage.weights)
        block, rest = divmod(stage.num_sequences, BLOCK_SIZE)
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
    """Sequences of each source in the blocks before ``block``: cumulative shares rounded, so that the sum is exact."""
    edges = np.floor(np.cumsum(shares) * (block * BLOCK_SIZE) + 0.5).astype(np.int64)
    edges[-1] = block * BLOCK_SIZE
    return tuple(np.diff(edges, prepend=0).tolist())


@lru_cache(maxsize=64)
def _block(shares: tuple[float, ...], block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(source index, rank among its source's sequences of the block) for each sequence of a block."""
    quotas = [
        after - before
        for before, after in zip(_quota_before(shares, block), _quota_before(shares, block + 1), strict=True)
    ]
    choice, rank = np.empty(BLOCK_SIZE, dtype=np.int64), np.empty(BLOCK_SIZE, dtype=np.int64)
    # Fair scheduling (Baruah et al. 1996, "Proportionate progress"): the k-th of a source's q may come from
    # position k·B/q on and must come before (k + 1)·B/q; the earliest deadline first always manages that.
    taken = [0] * len(quotas)
    for position in range(BLOCK_SIZE):
        _, index = min(
            (-(-(k + 1) * BLOCK_SIZE // quota), index)
            for index, (k, quota) in enumerate(zip(taken, quotas, strict=True))
            if k < quota and k * BLOCK_SIZE // quota <= position
        )
        choice[position], rank[position] = index, taken[index]
        taken[index] += 1
    return choice, rank


@lru_cache(maxsize=32)
def _order(seed: int, key: str, epoch: int, num_sequences: int) -> NDArray[np.int64]:
    """The seeded order of a set's sequences in one epoch."""
    digest = hashlib.sha256(f"{seed}/{key}/{epoch}".encode()).digest()
    # Raw bits, not Generator.permutation: only they are promised to stay the same in later versions of NumPy.
    keys = np.random.PCG64(int.from_bytes(digest[:16], "little")).random_raw(num_sequences)
    return np.argsort(keys, kind="stable")
