"""Schedules, value by value."""

import math

import pytest
from minicpm_training.schedule import warmup_cosine, warmup_stable_decay


def test_warm_up_rises_in_a_line_and_the_first_step_moves():
    schedule = warmup_stable_decay(warmup_steps=4, stable_steps=10)
    assert [schedule.multiplier(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [schedule.stage(step) for step in (0, 3, 4, 9)] == ["warmup", "warmup", "stable", "stable"]


def test_no_warm_up_starts_at_the_peak():
    assert warmup_stable_decay(warmup_steps=0, stable_steps=3).multiplier(0) == 1.0
    assert warmup_cosine(warmup_steps=0, total_steps=8).multiplier(0) == 1.0


def test_exponential_decay_halves_every_half_life_down_to_the_floor():
    # The 2.4B run of the paper: decay from 261,000 to 279,500, half-life 5,000, ends near 10 % of the peak.
    schedule = warmup_stable_decay(
        warmup_steps=2610, stable_steps=261_000, decay_steps=18_500, half_life=5000, floor=0.1
    )
    assert schedule.multiplier(260_999) == schedule.multiplier(261_000) == 1.0
    assert schedule.multiplier(266_000) == 0.5
    assert schedule.multiplier(271_000) == 0.25
    assert schedule.multiplier(276_000) == 0.125
    assert schedule.multiplier(279_499) == 0.1
    assert schedule.total_steps == 279_500 and schedule.stage(261_000) == "decay"


def test_half_life_left_open_meets_the_floor_at_the_end():
    schedule = warmup_stable_decay(warmup_steps=1, stable_steps=100, decay_steps=30, floor=0.125)
    # 1/8 after 30 steps: halved every 10.
    assert [schedule.multiplier(step) for step in (100, 110, 120)] == [1.0, 0.5, 0.25]
    assert schedule.multiplier(130) == pytest.approx(0.125, rel=1e-12)


@pytest.mark.parametrize(
    ("form", "quarter", "half"),
    [
        ("linear", 0.75, 0.5),
        ("cosine", 0.5 * (1 + math.sqrt(0.5)), 0.5),
        ("1-sqrt", 0.5, 1 - math.sqrt(0.5)),
    ],
)
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_shaped_decays(form, quarter, half, floor):
    schedule = warmup_stable_decay(warmup_steps=0, stable_steps=20, decay_steps=40, form=form, floor=floor)
    expected = {20: 1.0, 30: floor + (1 - floor) * quarter, 40: floor + (1 - floor) * half, 60: floor}
    for step, value in expected.items():
        assert schedule.multiplier(step) == pytest.approx(value, abs=1e-12), step


@pytest.mark.parametrize("form", ["exponential", "linear", "cosine", "1-sqrt"])
def test_a_decay_never_rises_and_stays_within_floor_and_peak(form):
    schedule = warmup_stable_decay(warmup_steps=0, stable_steps=10, decay_steps=90, form=form, floor=0.05)
    values = [schedule.multiplier(step) for step in range(10, 100)]
    assert values == sorted(values, reverse=True)
    assert all(0.05 <= value <= 1.0 for value in values)


def test_cosine_is_the_half_cosine_to_the_floor():
    schedule = warmup_cosine(warmup_steps=10, total_steps=110, floor=0.1)
    assert schedule.multiplier(4) == 0.5
    assert schedule.multiplier(10) == 1.0
    assert schedule.multiplier(35) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5)))
    assert schedule.multiplier(60) == pytest.approx(0.55)
    assert schedule.multiplier(110) == pytest.approx(0.1)
    assert [schedule.stage(step) for step in (9, 10)] == ["warmup", "cosine"]
