"""Training to a time instead of a token count: the stable stage may end at any step, and the decay follows from there.

That is what WSD allows and a cosine does not: its length must be known from the start.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from minicpm_training.distributed import agree
from minicpm_training.recipe.schema import Recipe
from minicpm_training.run import Run
from minicpm_training.session import Watcher, train_branch, train_run


@dataclass(kw_only=True)
class TimeBudget:
    """Says before each update of the trunk whether what is left of the time is now needed for the decay."""

    recipe: Recipe
    seconds: float
    first_step: int  # of this sitting
    clock: Callable[[], float] = time.monotonic
    _started: float = field(init=False)
    _steps: int = field(default=-1, init=False)  # done in this sitting; the first question comes before any

    def __post_init__(self) -> None:
        self._started = self.clock()

    def is_spent(self) -> bool:
        """To be asked once before each update."""
        self._steps += 1
        if self._steps == 0:
            return False
        elapsed = self.clock() - self._started
        seconds_per_step = elapsed / self._steps  # all that happens between updates included
        return (
            elapsed + decay_steps(self.recipe, self.first_step + self._steps) * seconds_per_step
            >= self.seconds
        )


def decay_steps(recipe: Recipe, trunk_steps: int) -> int:
    """The decay's updates after a trunk of another length: the recipe's share of it, at least one."""
    planned = recipe.total_steps - recipe.trunk_steps
    return max(1, round(planned * trunk_steps / recipe.trunk_steps)) if planned else 0


def cut_recipe(recipe: Recipe, trunk_steps: int) -> Recipe:
    """The recipe with its stable stage ended after ``trunk_steps`` and its decay shortened alike."""
    stable = trunk_steps * recipe.batch_tokens
    return recipe.with_schedule(
        stable_tokens=stable,
        decay_tokens=decay_steps(recipe, trunk_steps) * recipe.batch_tokens,
        warmup_tokens=min(stable, recipe.warmup_steps * recipe.batch_tokens),
    )


def train_within(recipe: Recipe, run: Run, watcher: Watcher, *, seconds: float) -> bool:
    """As :func:`minicpm_training.session.train_run`, with the trunk cut so that all ends within about ``seconds``."""
    steps = run.trunk.steps()
    budget = TimeBudget(recipe=recipe, seconds=seconds, first_step=steps[-1] if steps else 0)
    limited = replace(watcher, should_stop=lambda: watcher.should_stop() or agree(budget.is_spent))
    if not train_branch(recipe, run, run.trunk, None, limited):
        if watcher.should_stop():
            return False
        recipe = cut_recipe(recipe, agree(run.trunk.steps)[-1])
    return train_run(recipe, run, watcher)
