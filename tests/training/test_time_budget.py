"""A trunk cut by the clock still ends in a whole decay, and can go on."""

import pytest
from minicpm_training.recipe.branching import shortened
from minicpm_training.run import Run
from minicpm_training.session import RunContext
from minicpm_training.time_budget import TimeBudget, train_within

from minicpm_edge.cli.progress import Progress


def test_the_budget_leaves_time_for_the_decay(make_recipe):
    recipe = make_recipe("schedule.stable_tokens=12_800", "schedule.decay_tokens=3_200")  # 100 and 25 steps
    now = 0.0
    budget = TimeBudget(recipe=recipe, seconds=50.0, first_step=0, clock=lambda: now)
    steps = 0
    while not budget.is_spent():
        steps += 1
        now += 1.0
    assert steps == 40  # 40 s of trunk and a quarter of that for the decay


def test_a_cut_recipe_keeps_the_shares(make_recipe):
    recipe = make_recipe("schedule.stable_tokens=12_800", "schedule.decay_tokens=3_200")
    cut = shortened(recipe, 40)
    assert (cut.trunk_steps, cut.total_steps, cut.warmup_steps) == (40, 50, recipe.warmup_steps)


@pytest.mark.slow
def test_training_ends_in_time_with_a_decay(make_recipe, tmp_path):
    recipe = make_recipe("schedule.stable_tokens=128_000_000", "schedule.decay_tokens=12_800_000")
    run = Run(folder=tmp_path / "run")
    with Progress() as progress:
        assert train_within(recipe, run, RunContext(progress=progress), seconds=3.0)
    [decay] = run.decays()
    reached = run.trunk.steps()[-1]
    assert 1 <= reached < recipe.trunk_steps
    assert decay.folder.name == f"step-{reached:08d}"
    assert decay.steps()[-1] == shortened(recipe, reached).total_steps
