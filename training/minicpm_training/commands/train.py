"""``train``: start a run, or resume one."""

from __future__ import annotations

import argparse
import json
import tomllib
from typing import Any

from minicpm_edge.errors import UserError
from minicpm_training.commands.job import TrainJob, check_num_processes, start
from minicpm_training.recipe.compatibility import refuse_another_run
from minicpm_training.recipe.files import load_recipe, saved_recipe, to_toml
from minicpm_training.recipe.schema import Recipe
from minicpm_training.run import Run, new_run_folder, open_run


def train(arguments: argparse.Namespace) -> int:
    """Start a run, or with ``--resume`` continue one."""
    return _dry_run(arguments) if arguments.dry_run else start(lambda: train_job(arguments))


def train_job(arguments: argparse.Namespace) -> TrainJob:
    """What a ``train`` command line comes to.

    Raises:
        UserError: for a recipe or a run that is none, and for options that do not go together.
    """
    recipe, run = _resumed(arguments) if arguments.resume is not None else _started(arguments)
    if arguments.minutes is not None:
        if not arguments.minutes > 0:
            raise UserError(f"--minutes {arguments.minutes:g}: give more than 0")
        if not recipe.plan.can_branch:
            raise UserError(
                "--minutes is for schedule.kind 'wsd': a cosine's length must be known from the start"
            )
    return TrainJob(
        recipe=recipe,
        run=run,
        seconds=None if arguments.minutes is None else arguments.minutes * 60,
        nproc=arguments.nproc,
        as_json=arguments.json,
        debug=arguments.debug,
        resume=("train", "--resume", str(run.folder)),
    )


def _dry_run(arguments: argparse.Namespace) -> int:
    from minicpm_training.dry_run import plan, render

    if arguments.resume is not None:
        recipe, _ = _resumed(arguments)
    else:
        recipe = load_recipe(arguments.recipe, arguments.settings)
    summary = plan(recipe, num_processes=check_num_processes(arguments.nproc, recipe))
    print(json.dumps(summary, indent=2) if arguments.json else render(summary))
    return 0


def _started(arguments: argparse.Namespace) -> tuple[Recipe, Run]:
    recipe = _settled(load_recipe(arguments.recipe, arguments.settings))
    folder = arguments.out or new_run_folder(recipe.name or recipe.model.preset)
    if (folder / "recipe.toml").exists():
        raise UserError(
            f"{folder} already holds a run: --resume {folder} continues it, or give another --out"
        )
    return recipe, Run(folder=folder)


def _resumed(arguments: argparse.Namespace) -> tuple[Recipe, Run]:
    named = arguments.resume or (str(arguments.out) if arguments.out else None)
    run = open_run(named)
    saved = saved_recipe(run.trunk.recipe_path)
    entries: str | dict[str, Any] = arguments.recipe or tomllib.loads(to_toml(saved))
    # A warm-up that the recipe leaves open is the one already run, not 1 % of a new length.
    recipe = load_recipe(entries, arguments.settings, warmup_tokens=saved.schedule.warmup_tokens)
    if arguments.recipe:
        recipe = _settled(recipe)
    if run.trunk.steps():
        refuse_another_run(saved, recipe, f"the run {run.folder}")
    return recipe, run


def _settled(recipe: Recipe) -> Recipe:
    from minicpm_training.start import settled

    return settled(recipe)
