"""``decay``: branch a decay off one of a run's trunk checkpoints, or resume it."""

from __future__ import annotations

import argparse

from minicpm_edge.errors import UserError
from minicpm_training.commands.job import TrainJob, start
from minicpm_training.recipe.branching import decay_recipe
from minicpm_training.recipe.files import load_recipe, saved_recipe
from minicpm_training.run import open_run


def decay(arguments: argparse.Namespace) -> int:
    """Branch a decay off a trunk checkpoint, or resume the same one."""
    return start(lambda: decay_job(arguments))


def decay_job(arguments: argparse.Namespace) -> TrainJob:
    """What a ``decay`` command line comes to.

    Raises:
        UserError: for a run without that checkpoint, and for a decay that cannot be.
    """
    run = open_run(arguments.run)
    steps = run.trunk.steps()
    if not steps:
        raise UserError(f"{run.folder} has no checkpoint to branch from: train it first")
    at = steps[-1] if arguments.at is None else arguments.at
    if at not in steps:
        kept = ", ".join(str(step) for step in steps[-8:])
        raise UserError(
            f"{run.folder} keeps no trunk checkpoint of step {at}; there are: {kept} "
            "(checkpoint.keep and checkpoint.keep_every say which are kept)"
        )
    sources = load_recipe(arguments.data).plan.stages[-1].sources if arguments.data is not None else ()
    recipe = decay_recipe(
        saved_recipe(run.trunk.recipe_path), at, arguments.tokens, arguments.settings, sources=sources
    )
    data = ["--data", arguments.data] if arguments.data else []
    settings = [word for setting in arguments.settings for word in ("--set", setting)]
    return TrainJob(
        recipe=recipe,
        run=run,
        decay_from=at,
        nproc=arguments.nproc,
        as_json=arguments.json,
        debug=arguments.debug,
        resume=(
            "decay",
            str(run.folder),
            "--at",
            str(at),
            "--tokens",
            str(arguments.tokens),
            *data,
            *settings,
        ),
    )
