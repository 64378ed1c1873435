"""Choosing the next token from logits, for the engines that compute them in Python (torch, ONNX).

The filters are llama.cpp's, in its order, so that the same settings mean the same on every engine: top-k; top-p over
the probabilities of what is left; min-p; then temperature and one draw. Legend: V vocabulary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from minicpm_edge.engines.sampling_params import SamplingParams

Float64 = NDArray[np.float64]
Ids = NDArray[np.intp]


class Sampler:
    """The sampler of one generation. With a seed, the same logits in the same order give the same tokens."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._random = np.random.default_rng(None if params.seed is None else params.seed % 2**64)

    def __call__(self, logits_V: NDArray[np.floating]) -> int:
        """The next token's id, from logits ``(vocab_size,)``; among equals the lowest id is the likelier."""
        clean_V: Float64 = np.nan_to_num(
            logits_V.astype(np.float64), nan=-np.inf, posinf=1e30, neginf=-np.inf
        )
        if self._params.temperature == 0 or not np.isfinite(clean_V).any():
            return int(clean_V.argmax())
        ids = keep(clean_V, top_k=self._params.top_k, top_p=self._params.top_p, min_p=self._params.min_p)
        cumulative = np.cumsum(_softmax(clean_V[ids] / self._params.temperature))
        drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(ids[min(int(drawn), len(ids) - 1)])


def keep(logits_V: Float64, *, top_k: int, top_p: float, min_p: float) -> Ids:
    """Ids of the tokens the filters leave, the likeliest first; at least one.

    Every filter keeps a beginning of that order, so min-p can go before top-p, and few tokens are left to sort.
    """
    ids = _likeliest(logits_V, top_k)
    weights: Float64 = np.exp(logits_V[ids] - logits_V[ids].max())
    total = weights.sum()
    ids = ids[weights >= min_p]
    ids = ids[np.argsort(-logits_V[ids], kind="stable")]
    if top_p >= 1:
        return ids
    mass: Float64 = np.cumsum(np.exp(logits_V[ids] - logits_V[ids[0]])) / total
    return ids[: int(np.searchsorted(mass, top_p)) + 1]


def _likeliest(logits_V: Float64, top_k: int) -> Ids:
    """The ``top_k`` likeliest ids (all for 0), in no order; of equals at the edge, the lowest ids."""
    ids = np.flatnonzero(logits_V > -np.inf)
    if not 0 < top_k < len(ids):
        return ids
    logits = logits_V[ids]
    least = np.partition(logits, -top_k)[-top_k]
    above, equal = ids[logits > least], ids[logits == least]
    return np.concatenate([above, equal[: top_k - len(above)]])


def _softmax(logits: Float64) -> Float64:
    weights: Float64 = np.exp(logits - logits.max())
    weights /= weights.sum()
    return weights
