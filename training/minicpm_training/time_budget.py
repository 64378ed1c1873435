"""Training to a time instead of a token count: the stable stage may end at any step, and the decay follows from there.

That is what WSD allows and a cosine does not: its length must be known from the start.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from minicpm_training.parallel.process_group import broadcast_from_rank0
from minicpm_training.recipe.branching import scaled_steps, shortened
from minicpm_training.recipe.schema import Recipe
from minicpm_training.run import Run
from minicpm_training.session import RunContext, train_branch, train_run


@dataclass(kw_only=True)
class TimeBudget:
    """Says before each step of the trunk whether what is left of the time is now needed for the decay."""

    recipe: Recipe
    seconds: float
    first_step: int  # of this session
    clock: Callable[[], float] = time.monotonic
    _started: float = field(init=False)
    _steps: int = field(default=-1, init=False)  # done in this session; the first call comes before any

    def __post_init__(self) -> None:
        self._started = self.clock()

    def is_spent(self) -> bool:
        """Call once before each step."""
        self._steps += 1
        if self._steps == 0:
            return False
        elapsed = self.clock() - self._started
        step, plan = self.first_step + self._steps, self.recipe.plan
        # All that happens between steps included.
        seconds_per_token = elapsed / (plan.num_tokens(step) - plan.num_tokens(self.first_step))
        branch_tokens = sum(
            scaled_steps(stage.num_steps, self.recipe, step) * stage.batch_tokens for stage in plan.branch
        )
        return elapsed + branch_tokens * seconds_per_token >= self.seconds


def train_within(recipe: Recipe, run: Run, context: RunContext, *, seconds: float) -> bool:
    """As :func:`minicpm_training.session.train_run`, with the trunk cut so that all ends within about ``seconds``."""
    steps = run.trunk.steps()
    budget = TimeBudget(recipe=recipe, seconds=seconds, first_step=steps[-1] if steps else 0)
    limited = replace(
        context, should_stop=lambda: context.should_stop() or broadcast_from_rank0(budget.is_spent)
    )
    if not train_branch(recipe, run, run.trunk, None, limited):
        if context.should_stop():
            return False
        recipe = shortened(recipe, broadcast_from_rank0(run.trunk.steps)[-1])
    return train_run(recipe, run, context)
