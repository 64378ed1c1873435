"""Shares to the row, a fresh order every epoch, later stages that go on where the earlier ones stopped."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from minicpm_training.data.mixture import BLOCK_ROWS, RowPlan, Stage, realised

from minicpm_edge.errors import UserError

SIX = (("a", 0.37), ("b", 0.29), ("c", 0.17), ("d", 0.11), ("e", 0.05), ("f", 0.01))


def plan(*stages, num_rows=None, seed=0):
    names = {name for stage in stages for name, _ in stage.weights}
    return RowPlan(seed=seed, stages=stages, num_rows=num_rows or dict.fromkeys(names, 1000))


@pytest.mark.parametrize("sequence_length", [256, 1024, 4096])
@pytest.mark.parametrize("seed", range(20))
def test_the_mix_over_a_million_tokens_is_within_half_a_percent(sequence_length, seed):
    generator = random.Random(seed)
    weights = SIX if seed == 0 else tuple((name, generator.random() ** 2 + 1e-3) for name, _ in SIX)
    num_rows = 1_000_000 // sequence_length
    counts = realised(iter(plan(Stage(num_rows=10**9, weights=weights)).places(0, num_rows)))
    total = sum(weight for _, weight in weights)
    for name, weight in weights:
        assert abs(counts.get(name, 0) / num_rows - weight / total) < 0.005


@pytest.mark.slow
@settings(max_examples=50, deadline=None, derandomize=True)
@given(weights=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=9), start=st.integers(0, 3 * BLOCK_ROWS))
def test_every_prefix_and_every_window_keeps_the_shares(weights, start):
    names = [str(index) for index in range(len(weights))]
    the_plan = plan(Stage(num_rows=10**9, weights=tuple(zip(names, weights, strict=True))))
    chosen = np.array([int(place.source) for place in the_plan.places(start, 600)])
    taken = np.cumsum(np.eye(len(weights))[chosen], axis=0)
    asked = np.arange(1, 601)[:, None] * (np.array(weights) / sum(weights))
    assert np.abs(taken - asked).max() < (1.1 if start == 0 else 4)


def test_a_place_does_not_depend_on_how_it_is_asked_for():
    stages = (Stage(num_rows=700, weights=SIX), Stage(num_rows=10_000, weights=SIX[:3]))
    whole = plan(*stages).places(0, 2000)
    assert [plan(*stages).places(position, 1)[0] for position in range(0, 2000, 97)] == whole[::97]
    assert [place for start in range(0, 2000, 8) for place in plan(*stages).places(start, 8)] == whole


def test_each_epoch_is_every_row_once_in_an_order_of_its_own():
    places = plan(Stage(num_rows=10**6, weights=(("a", 1.0),)), num_rows={"a": 97}).places(0, 97 * 5)
    epochs = [[place.row for place in places[start : start + 97]] for start in range(0, 97 * 5, 97)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(97))
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert list(range(97)) not in epochs


def test_the_order_is_the_same_on_every_machine_and_version():
    places = plan(
        Stage(num_rows=100, weights=(("data/a", 0.7), ("data/b", 0.3))), num_rows={"data/a": 10, "data/b": 4}
    )
    expected = "a7 a4 b3 a3 a1 b2 a0 a6 a8 b1 a2 a5"
    assert [f"{place.source[-1]}{place.row}" for place in places.places(0, 12)] == expected.split()


def test_seeds_and_sources_have_orders_of_their_own():
    stage = Stage(num_rows=1000, weights=(("a", 0.5), ("b", 0.5)))
    orders = [
        tuple(place.row for place in plan(stage, seed=seed).places(0, 500) if place.source == name)
        for seed in (0, 1)
        for name in "ab"
    ]
    assert len(set(orders)) == 4


def test_moving_the_data_does_not_change_the_run():
    here, there = (
        plan(Stage(num_rows=100, weights=((f"{root}/a", 1.0),)), num_rows={f"{root}/a": 50}).places(0, 100)
        for root in ("/old/place", "/new/place")
    )
    assert [place.row for place in here] == [place.row for place in there]


def test_a_later_stage_goes_on_in_the_rows_of_the_earlier_ones():
    stable = Stage(num_rows=1234, weights=(("a", 0.8), ("b", 0.2)))
    decay = Stage(num_rows=3000, weights=(("c", 0.5), ("a", 0.3), ("b", 0.2)))
    places = plan(stable, decay, num_rows={"a": 5000, "b": 5000, "c": 5000}).places(0, 1234 + 3000)
    for name in "abc":
        rows = [place.row for place in places if place.source == name]
        assert len(rows) == len(set(rows))  # within the first epoch none comes twice
        alone = plan(Stage(num_rows=9999, weights=((name, 1.0),)), num_rows={name: 5000}).places(0, len(rows))
        assert rows == [place.row for place in alone]


def test_a_trunk_goes_on_as_if_it_had_been_longer_from_the_start():
    short, long = (plan(Stage(num_rows=rows, weights=SIX)) for rows in (500, 5000))
    assert short.places(0, 500) == long.places(0, 500)


def test_wrong_mixtures_are_named():
    with pytest.raises(UserError, match="b is shorter than one row"):
        plan(Stage(num_rows=9, weights=(("a", 1.0), ("b", 1.0))), num_rows={"a": 5, "b": 0})
    with pytest.raises(UserError, match="the weight of b is a share of 1e-06"):
        plan(Stage(num_rows=9, weights=(("a", 1.0), ("b", 1e-6))))
    with pytest.raises(IndexError, match="past the last stage"):
        plan(Stage(num_rows=9, weights=SIX)).places(9, 1)
