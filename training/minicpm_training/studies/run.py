"""A run as a function, for studies of the recipe: ``run(recipe) → result``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm_edge.cli.progress import Progress
from minicpm_training.recipe.schema import Recipe
from minicpm_training.run import Run
from minicpm_training.session import RunContext, decay_branch, train_run
from minicpm_training.start import settled
from minicpm_training.state import read_state


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run has come to: ``checkpoint`` is its last; ``metrics`` the lines of trunk and decay in their order."""

    run: Run
    checkpoint: Path
    metrics: Sequence[Mapping[str, Any]]

    @property
    def loss(self) -> float:
        """Training loss of the last step, in the objective's unit (nats a token)."""
        return float(next(line["loss"] for line in reversed(self.metrics) if "loss" in line))

    @property
    def bits_per_byte(self) -> Mapping[str, float]:
        """The last measure on each validation set of the recipe, by name; empty without one."""
        return next((line["valid"] for line in reversed(self.metrics) if "valid" in line), {})


class StoppedError(Exception):
    """The run was asked to stop before its end; a checkpoint is saved."""


def run(recipe: Recipe, folder: Path, *, should_stop: Callable[[], bool] = lambda: False) -> RunResult:
    """Train a recipe to its end in a folder, or only what is missing there; prints nothing.

    A finished run comes back at once, so that a study that was stopped continues. Recipes that differ in length alone
    may share a folder, and with it the trunk: the shortest first. Signals are the caller's.

    Raises:
        StoppedError: where ``should_stop`` ended it early.
        UserError: for data or a folder that do not fit the recipe.
    """
    recipe, the_run = settled(recipe), Run(folder=folder)
    if not _is_finished(the_run, recipe):
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            context = RunContext(progress=Progress(nowhere), should_stop=should_stop)
            if not train_run(recipe, the_run, context):
                raise StoppedError
    lines = [line for line in the_run.trunk.metrics() if line["step"] <= recipe.trunk_steps]
    last = the_run.trunk
    if recipe.plan.branch:
        last = decay_branch(the_run, recipe)
        lines += last.metrics()
    return RunResult(run=the_run, checkpoint=last.checkpoint(recipe.total_steps), metrics=lines)


def _is_finished(the_run: Run, recipe: Recipe) -> bool:
    """Whether the last stage is trained, though the trunk may have gone on since."""
    last = decay_branch(the_run, recipe) if recipe.plan.branch else the_run.trunk
    checkpoint = last.checkpoint(recipe.total_steps)
    return checkpoint.is_dir() and (read_state(checkpoint).finished or last == the_run.trunk)
