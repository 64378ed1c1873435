"""``tunnel``: the wind tunnel's studies, planned, trained (all or one trial) and reported."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from minicpm_edge.cli.progress import Progress
from minicpm_edge.cli.table import format_table
from minicpm_edge.errors import UserError
from minicpm_training.recipe.files import load_recipe, with_settings
from minicpm_training.recipe.schema import Recipe

if TYPE_CHECKING:
    from minicpm_training.studies.trials import Trial, TrialResult


class Study(Protocol):
    """What a study is: batches of trials, each of which may wait for the one before, and a report of all results."""

    def phases(self) -> Sequence[Sequence[Trial]]: ...

    def after_phase(self, number: int, results: Sequence[TrialResult], folder: Path) -> None: ...

    def report(self, results: Sequence[TrialResult], folder: Path) -> Path: ...


def tunnel(arguments: argparse.Namespace) -> int:
    """Plan or train a study, or one trial of it.

    Raises:
        UserError: for a recipe or a value that makes no trial, and for trials that cannot be trained.
    """
    study = _study(arguments, _lean(load_recipe(arguments.recipe, arguments.settings)))
    folder = arguments.out or Path("runs") / f"tunnel-{arguments.study}"
    trials = [trial for phase in study.phases() for trial in phase]
    if arguments.plan_only:
        _print_plan(trials, folder, as_json=arguments.json)
    elif arguments.trial is not None:
        _one_trial(trials, arguments.trial, folder)
    else:
        _all_trials(study, folder, workers=arguments.workers)
    return 0


def _lean(recipe: Recipe) -> Recipe:
    """The recipe with nothing kept or measured along the way that a study does not need."""
    lean = {"checkpoint.keep": 1, "checkpoint.keep_every": 0, "evaluation.every": 0, "sample.prompts": []}
    return with_settings(recipe, {**lean, "log.every": 1})


def _study(arguments: argparse.Namespace, recipe: Recipe) -> Study:
    shared: dict[str, Any] = {"recipe": recipe, "widths": arguments.widths, "num_seeds": arguments.seeds}
    if arguments.seeds < 1:
        raise UserError(f"--seeds {arguments.seeds}: give at least 1")
    if arguments.study == "lr":
        from minicpm_training.studies.learning_rate import LearningRateStudy

        return LearningRateStudy(
            **shared, depths=arguments.depths, rates=arguments.rates, rules=arguments.rules
        )
    if arguments.study == "batch":
        from minicpm_training.studies.batch_size import BatchSizeStudy

        return BatchSizeStudy(**shared, batch_tokens=arguments.batch_tokens)
    from minicpm_training.studies.scaling import ScalingStudy

    return ScalingStudy(
        **shared, held_out_width=arguments.held_out, lengths=arguments.lengths, compute=arguments.compute
    )


def _print_plan(trials: Sequence[Trial], folder: Path, *, as_json: bool) -> None:
    """Every trial with its number for ``--trial``, its cost, and whether it is done."""
    from minicpm_edge.model.transformer import count_parameters
    from minicpm_training.hardware import flops_per_token
    from minicpm_training.studies.trials import read_result

    entries = []
    for number, trial in enumerate(trials):
        recipe, config = trial.recipe, trial.recipe.model.config()
        per_token = flops_per_token(
            config, count_parameters(config, active=True), recipe.data.sequence_length
        )
        tokens = recipe.plan.num_tokens(recipe.total_steps)
        entries.append(
            {
                "trial": number,
                **trial.values,
                "tokens": tokens,
                "flops": per_token * tokens,
                "done": read_result(trial, folder) is not None,
                "key": trial.key,
            }
        )
    if as_json:
        print(json.dumps(entries, indent=2))
        return
    rows = [[str(name) for name in entries[0]]]
    for entry in entries:
        cells = {**entry, "flops": f"{entry['flops']:.3g}", "tokens": f"{entry['tokens']:,}"}
        rows.append(
            [("yes" if cell else "no") if isinstance(cell, bool) else str(cell) for cell in cells.values()]
        )
    print(format_table(rows))
    print(f"{len(entries)} trials, {sum(float(str(entry['flops'])) for entry in entries):.3g} FLOPs in all")


def _one_trial(trials: Sequence[Trial], number: int, folder: Path) -> None:
    from minicpm_training.studies.trials import run_trials

    if not 0 <= number < len(trials):
        raise UserError(
            f"--trial {number}: the study has trials 0 to {len(trials) - 1} (--plan-only lists them)"
        )
    with Progress() as progress:
        run_trials([trials[number]], folder, progress=progress)


def _all_trials(study: Study, folder: Path, *, workers: int) -> None:
    from minicpm_training.studies.trials import run_trials

    if workers < 1:
        raise UserError(f"--workers {workers}: give at least 1")
    results: list[TrialResult] = []
    with Progress() as progress:
        for number, phase in enumerate(study.phases()):
            results += run_trials(phase, folder, workers=workers, progress=progress)
            study.after_phase(number, results, folder)
    page = study.report(results, folder)
    print(page.read_text(encoding="utf-8"))
    print(f"report   {page}")
