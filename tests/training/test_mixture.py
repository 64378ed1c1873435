"""Shares to the sequence, a fresh order every epoch, later stages that go on where the earlier ones stopped."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from minicpm_training.data.mixture import BLOCK_SIZE, Mixture, MixtureSampler

from minicpm_edge.errors import UserError

SIX = (("a", 0.37), ("b", 0.29), ("c", 0.17), ("d", 0.11), ("e", 0.05), ("f", 0.01))


def stage(num_sequences, weights, sequence_length=8):
    return Mixture(num_sequences=num_sequences, sequence_length=sequence_length, weights=weights)


def sampler(*stages, sizes=None, seed=0):
    keys = {(name, stage.sequence_length) for stage in stages for name, _ in stage.weights}
    num_sequences = {key: 1000 if sizes is None else sizes[key[0]] for key in keys}
    return MixtureSampler(seed=seed, stages=stages, num_sequences=num_sequences)


@pytest.mark.parametrize("sequence_length", [256, 1024, 4096])
@pytest.mark.parametrize("seed", range(20))
def test_the_mix_over_a_million_tokens_is_within_half_a_percent(sequence_length, seed):
    generator = random.Random(seed)
    weights = SIX if seed == 0 else tuple((name, generator.random() ** 2 + 1e-3) for name, _ in SIX)
    num_sequences = 1_000_000 // sequence_length
    counts = Counter(sample.source for sample in sampler(stage(10**9, weights)).samples(0, num_sequences))
    total = sum(weight for _, weight in weights)
    for name, weight in weights:
        assert abs(counts.get(name, 0) / num_sequences - weight / total) < 0.005


@pytest.mark.slow
@settings(max_examples=50, deadline=None, derandomize=True)
@given(weights=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=9), start=st.integers(0, 3 * BLOCK_SIZE))
def test_every_prefix_and_every_window_keeps_the_shares(weights, start):
    names = [str(index) for index in range(len(weights))]
    the_sampler = sampler(stage(10**9, tuple(zip(names, weights, strict=True))))
    chosen = np.array([int(sample.source) for sample in the_sampler.samples(start, 600)])
    taken = np.cumsum(np.eye(len(weights))[chosen], axis=0)
    asked = np.arange(1, 601)[:, None] * (np.array(weights) / sum(weights))
    assert np.abs(taken - asked).max() < (1.1 if start == 0 else 4)


def test_a_sample_does_not_depend_on_how_it_is_asked_for():
    stages = (stage(700, SIX), stage(10_000, SIX[:3]))
    whole = sampler(*stages).samples(0, 2000)
    assert [sampler(*stages).samples(position, 1)[0] for position in range(0, 2000, 97)] == whole[::97]
    assert [sample for start in range(0, 2000, 8) for sample in sampler(*stages).samples(start, 8)] == whole


def test_each_epoch_is_every_sequence_once_in_an_order_of_its_own():
    samples = sampler(stage(10**6, (("a", 1.0),)), sizes={"a": 97}).samples(0, 97 * 5)
    epochs = [[sample.index for sample in samples[start : start + 97]] for start in range(0, 97 * 5, 97)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(97))
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert list(range(97)) not in epochs


def test_the_order_is_the_same_on_every_machine_and_version():
    chosen = sampler(stage(100, (("data/a", 0.7), ("data/b", 0.3))), sizes={"data/a": 10, "data/b": 4})
    expected = "a7 a4 b3 a3 a1 b2 a0 a6 a8 b1 a2 a5"
    assert [f"{sample.source[-1]}{sample.index}" for sample in chosen.samples(0, 12)] == expected.split()


def test_seeds_and_sources_have_orders_of_their_own():
    halves = stage(1000, (("a", 0.5), ("b", 0.5)))
    orders = [
        tuple(sample.index for sample in sampler(halves, seed=seed).samples(0, 500) if sample.source == name)
        for seed in (0, 1)
        for name in "ab"
    ]
    assert len(set(orders)) == 4


def test_moving_the_data_does_not_change_the_run():
    here, there = (
        sampler(stage(100, ((f"{root}/a", 1.0),)), sizes={f"{root}/a": 50}).samples(0, 100)
        for root in ("/old/place", "/new/place")
    )
    assert [sample.index for sample in here] == [sample.index for sample in there]


def test_a_later_stage_goes_on_in_the_order_of_the_earlier_ones():
    stable = stage(1234, (("a", 0.8), ("b", 0.2)))
    decay = stage(3000, (("c", 0.5), ("a", 0.3), ("b", 0.2)))
    samples = sampler(stable, decay, sizes={"a": 5000, "b": 5000, "c": 5000}).samples(0, 1234 + 3000)
    for name in "abc":
        rows = [sample.index for sample in samples if sample.source == name]
        assert len(rows) == len(set(rows))  # within the first epoch none comes twice
        alone = sampler(stage(9999, ((name, 1.0),)), sizes={name: 5000}).samples(0, len(rows))
        assert rows == [sample.index for sample in alone]


def test_a_stage_of_another_sequence_length_has_an_order_of_its_own():
    short, long = stage(60, SIX[:2], sequence_length=8), stage(60, SIX[:2], sequence_length=32)
    both = sampler(short, long, short).samples(0, 180)
    assert [sample.sequence_length for sample in both] == [8] * 60 + [32] * 60 + [8] * 60
    assert [sample.index for sample in both[:60]] == [
        sample.index for sample in both[60:120]
    ]  # from its start
    # And the stage after it goes on where the first one stopped.
    by_source = Counter((sample.source, sample.index) for sample in both[:60] + both[120:])
    assert max(by_source.values()) == 1


def test_a_trunk_goes_on_as_if_it_had_been_longer_from_the_start():
    short, long = (sampler(stage(length, SIX)) for length in (500, 5000))
    assert short.samples(0, 500) == long.samples(0, 500)


def test_wrong_mixtures_are_named():
    with pytest.raises(UserError, match="b is shorter than one sequence"):
        sampler(stage(9, (("a", 1.0), ("b", 1.0))), sizes={"a": 5, "b": 0})
    with pytest.raises(UserError, match="the weight of b is a share of 1e-06"):
        sampler(stage(9, (("a", 1.0), ("b", 1e-6))))
    with pytest.raises(IndexError, match="past the last stage"):
        sampler(stage(9, SIX)).samples(9, 1)
