"""The numpy sampler against filters written out naively, and against the probabilities it should draw with."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpm_edge.engines.sampling import Sampler, keep
from minicpm_edge.engines.sampling_params import SamplingParams

LOGITS = st.lists(st.integers(-40, 40).map(lambda value: value / 4), min_size=1, max_size=30)


def naive_keep(logits: list[float], top_k: int, top_p: float, min_p: float) -> list[int]:
    """One filter after the other over a list of (id, logit), as llama.cpp applies them."""
    left = sorted(enumerate(logits), key=lambda item: (-item[1], item[0]))
    if top_k > 0:
        left = left[:top_k]
    total = math.fsum(math.exp(logit - left[0][1]) for _, logit in left)
    probabilities = [math.exp(logit - left[0][1]) / total for _, logit in left]
    if top_p < 1:
        mass, kept = 0.0, []
        for item, probability in zip(left, probabilities, strict=True):
            kept.append(item)
            mass += probability
            if mass >= top_p:
                break
        left = kept
    if min_p > 0:
        left = [item for item in left if math.exp(item[1] - left[0][1]) >= min_p]
    return [token for token, _ in left]


# Thresholds that no sum of the logits' exponentials meets by accident of rounding.
@given(LOGITS, st.integers(0, 12), st.sampled_from([0.0317, 0.3331, 0.5123, 0.9017, 1.0]))
def test_top_k_and_top_p(logits, top_k, top_p):
    kept = keep(np.array(logits), top_k=top_k, top_p=top_p, min_p=0)
    assert kept.tolist() == naive_keep(logits, top_k, top_p, 0)


@given(
    LOGITS,
    st.integers(0, 12),
    st.sampled_from([0.3331, 0.9017, 1.0]),
    st.sampled_from([0, 0.0503, 0.5123, 1]),
)
def test_all_filters(logits, top_k, top_p, min_p):
    kept = keep(np.array(logits), top_k=top_k, top_p=top_p, min_p=min_p)
    assert kept.tolist() == naive_keep(logits, top_k, top_p, min_p)


@given(LOGITS, st.integers(0, 2**64 - 1))
def test_a_draw_is_one_of_the_kept(logits, seed):
    params = SamplingParams(seed=seed, top_k=5, top_p=0.9017, min_p=0.0503, temperature=3)
    drawn = Sampler(params)(np.array(logits, np.float32))
    assert drawn in naive_keep(logits, 5, 0.9017, 0.0503)


@given(LOGITS)
def test_greedy_is_the_first_of_the_likeliest(logits):
    drawn = Sampler(SamplingParams(temperature=0, top_k=3, min_p=0.5))(np.array(logits, np.float32))
    assert drawn == logits.index(max(logits))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_probabilities(temperature):
    logits = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -9.0])
    expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    sampler = Sampler(SamplingParams(seed=1, temperature=temperature, top_k=0, top_p=1, min_p=0))
    count = 20_000
    drawn = Counter(sampler(logits) for _ in range(count))
    for token, probability in enumerate(expected):
        spread = math.sqrt(probability * (1 - probability) / count)
        assert abs(drawn[token] / count - probability) <= 4 * spread + 1e-4


def test_a_seed_decides_every_draw():
    logits = np.random.default_rng(0).normal(size=(20, 50))

    def draws(seed):
        sampler = Sampler(SamplingParams(seed=seed, temperature=1.5, min_p=0))
        return [sampler(row) for row in logits]

    assert draws(7) == draws(7) != draws(8)
    assert draws(-1) == draws(2**64 - 1)


@pytest.mark.parametrize("temperature", [0, 1])
def test_numbers_that_are_none(temperature):
    sampler = Sampler(SamplingParams(seed=1, temperature=temperature))
    assert sampler(np.array([np.nan, -np.inf, 3.0, np.nan], np.float32)) == 2
    assert sampler(np.array([0.0, np.inf, 3.0], np.float32)) == 1
    assert sampler(np.full(4, np.nan, np.float32)) in range(4)
    assert sampler(np.full(4, -np.inf, np.float32)) in range(4)
    assert sampler(np.array([1.0], np.float16)) == 0


def test_a_tiny_temperature_is_greedy():
    logits = np.array([1.0, 1.1, 0.9])
    assert {Sampler(SamplingParams(temperature=1e-6, seed=seed, min_p=0))(logits) for seed in range(20)} == {
        1
    }
