"""A run as a function, for studies of the recipe: ``run(recipe) → result``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm_edge.cli.progress import Progress
from minicpm_training.recipe.schema import Recipe
from minicpm_training.run import Run
from minicpm_training.session import RunContext, decay_branch, train_run
from minicpm_training.start import settled


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


def run(recipe: Recipe, folder: Path) -> RunResult:
    """Train a recipe to its end in a folder, or only what is missing there; prints nothing.

    A finished run comes back at once, so that a study that was stopped continues. Signals are the caller's.

    Raises:
        UserError: for data or a folder that do not fit the recipe.
    """
    recipe, the_run = settled(recipe), Run(folder=folder)
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        train_run(recipe, the_run, RunContext(progress=Progress(nowhere)))
    branches = [the_run.trunk]
    if recipe.plan.branch:
        branches.append(decay_branch(the_run, recipe))
    return RunResult(
        run=the_run,
        checkpoint=branches[-1].checkpoint(recipe.total_steps),
        metrics=[
            line for branch in branches for line in branch.metrics() if line["step"] <= recipe.total_steps
        ],
    )
