"""How far one model's predictions are from another's: KL divergence, top-1 agreement, perplexity, logit difference.

Legend: T positions of one window, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROWS_AT_A_TIME = 64  # in float64 a block of 64 rows of the largest vocabulary is 63 MB


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What the windows say; KL in nats, reference first: sum p·(log p - log q)."""

    num_positions: int
    mean_kl: float
    p99_kl: float
    max_kl: float
    top1_agreement: float
    reference_perplexity: float
    export_perplexity: float
    max_logit_difference: float
    logit_std: float
    """Spread of the reference's logits over the vocabulary: the unit in which a difference of logits is small."""


class Comparison:
    """Adds up windows of (reference logits, exported logits); holds one number a position, not the logits.

    All sums are in float64 and all logarithms are taken of normalised scores, so a confident model (probabilities
    that underflow) costs no accuracy.
    """

    def __init__(self) -> None:
        self._kl: list[NDArray[np.float64]] = []
        self._num_agreeing = 0
        self._reference_nll = self._export_nll = 0.0
        self._num_targets = 0
        self._max_logit_difference = self._variance = 0.0

    def add(
        self,
        reference_TV: NDArray[np.float32],
        export_TV: NDArray[np.float32],
        targets_T: NDArray[np.int64],
    ) -> None:
        """One window. ``targets_T`` holds the token that really followed each position, -1 where none did.

        Raises ``ValueError`` where the two do not have the same shape.
        """
        if reference_TV.shape != export_TV.shape or len(targets_T) != len(reference_TV):
            raise ValueError(f"logits of shape {export_TV.shape}; the reference's are {reference_TV.shape}")
        for start in range(0, len(reference_TV), ROWS_AT_A_TIME):
            rows = slice(start, start + ROWS_AT_A_TIME)
            self._add_block(reference_TV[rows], export_TV[rows], targets_T[rows])

    def _add_block(
        self, p_TV: NDArray[np.float32], q_TV: NDArray[np.float32], targets_T: NDArray[np.int64]
    ) -> None:
        log_p_TV, log_q_TV = log_softmax(p_TV), log_softmax(q_TV)
        self._kl.append((np.exp(log_p_TV) * (log_p_TV - log_q_TV)).sum(axis=1))
        self._num_agreeing += int((p_TV.argmax(axis=1) == q_TV.argmax(axis=1)).sum())
        difference = float(np.abs(p_TV.astype(np.float64) - q_TV).max())
        # `max` would drop a NaN, and a runtime that computes NaN must not pass for one that agrees.
        self._max_logit_difference = float(np.maximum(self._max_logit_difference, difference))
        self._variance += float(p_TV.var(axis=1, dtype=np.float64).sum())
        rows = np.flatnonzero(targets_T >= 0)
        self._reference_nll -= float(log_p_TV[rows, targets_T[rows]].sum())
        self._export_nll -= float(log_q_TV[rows, targets_T[rows]].sum())
        self._num_targets += len(rows)

    def measures(self) -> Measures:
        """The figures over everything added so far; ``ValueError`` when nothing was."""
        if not self._num_targets:
            raise ValueError("no window was added")
        kl = np.concatenate(self._kl)
        return Measures(
            num_positions=len(kl),
            mean_kl=float(kl.mean()),
            p99_kl=float(np.quantile(kl, 0.99)),
            max_kl=float(kl.max()),
            top1_agreement=self._num_agreeing / len(kl),
            reference_perplexity=_perplexity(self._reference_nll, self._num_targets),
            export_perplexity=_perplexity(self._export_nll, self._num_targets),
            max_logit_difference=self._max_logit_difference,
            logit_std=math.sqrt(self._variance / len(kl)),
        )


def log_softmax(logits_TV: NDArray[np.float32]) -> NDArray[np.float64]:
    """log softmax along V in float64, shifted by the maximum so that nothing overflows."""
    shifted_TV = logits_TV.astype(np.float64)
    shifted_TV -= shifted_TV.max(axis=1, keepdims=True)
    return np.asarray(shifted_TV - np.log(np.exp(shifted_TV).sum(axis=1, keepdims=True)))


def _perplexity(total_nll: float, num_targets: int) -> float:
    mean = total_nll / num_targets
    return math.exp(mean) if mean < 700 else math.inf
