"""The trials of a study: a recipe each, trained once, side by side, and found again by what they are."""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minicpm_edge.atomic import write_text
from minicpm_edge.cli.progress import Progress
from minicpm_edge.cores import usable_cpus
from minicpm_edge.errors import UserError
from minicpm_edge.json_file import read_json
from minicpm_training.interrupts import stop_on_signals
from minicpm_training.recipe.compatibility import recipe_key
from minicpm_training.recipe.schema import Recipe
from minicpm_training.recipe.sections import Effect
from minicpm_training.run import Run

# A trial's measure is its validation; without one, the mean training loss over this share of its last steps.
TAIL = 0.1
# Keys that change no weight, but the score.
MEASURE = ("data.valid", "evaluation.tokens")

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a study. ``values`` are the columns that tell it from the others, in their order."""

    values: Mapping[str, float | int | str]
    recipe: Recipe

    @property
    def key(self) -> str:
        """What its result is kept by: all of the recipe that touches a number of it."""
        return recipe_key(self.recipe, ignore={Effect.HARMLESS}, keep=MEASURE)

    def folder(self, study: Path) -> Path:
        """Where it trains. Trials of one trunk share it: a decay branched off at several lengths costs one trunk."""
        ignore = {Effect.HARMLESS}
        if self.recipe.plan.can_branch:
            ignore.add(Effect.LENGTH)
        return study / "runs" / recipe_key(self.recipe, ignore=ignore, keep=MEASURE)

    def result_file(self, study: Path) -> Path:
        return study / "results" / f"{self.key}.json"


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """What a trial came to: ``loss`` in nats a token, ``bits_per_byte`` of the first validation set (None without one).

    Both are infinite where the loss was no longer finite.
    """

    loss: float
    bits_per_byte: float | None
    tokens: int
    seconds: float  # of its steps, its trunk's included

    @property
    def score(self) -> float:
        """What studies compare, lower is better: bits per byte, else the loss."""
        return self.loss if self.bits_per_byte is None else self.bits_per_byte

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.loss)


def read_result(trial: Trial, study: Path) -> TrialResult | None:
    """A trial's result in the study's folder, or None."""
    file = trial.result_file(study)
    if not file.is_file():
        return None
    entry = read_json(file)
    try:
        numbers = {
            key: None if entry[key] is None else float(entry[key]) for key in ("loss", "bits_per_byte")
        }
        loss = numbers["loss"]
        if loss is None:
            raise ValueError("no loss")
        return TrialResult(
            loss=loss,
            bits_per_byte=numbers["bits_per_byte"],
            tokens=int(entry["tokens"]),
            seconds=float(entry["seconds"]),
        )
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{file} is not a trial's result: remove it to run the trial again") from None


def run_trial(trial: Trial, study: Path, *, should_stop: Callable[[], bool] = lambda: False) -> TrialResult:
    """Train a trial to its end, or read its result.

    Raises:
        StoppedError: where ``should_stop`` ended it early; what is done is kept.
        UserError: for data that do not fit its recipe.
    """
    from minicpm_training.studies.run import run
    from minicpm_training.trainer import NonFiniteLossError

    if (known := read_result(trial, study)) is not None:
        return known
    recipe = trial.recipe
    try:
        done = run(recipe, trial.folder(study), should_stop=should_stop)
    except NonFiniteLossError:
        has_valid = bool(recipe.data.valid)
        result = TrialResult(
            loss=math.inf, bits_per_byte=math.inf if has_valid else None, tokens=0, seconds=0.0
        )
    else:
        steps = [line for line in done.metrics if "loss" in line]
        tail = steps[-max(1, round(len(steps) * TAIL)) :]
        previous, seconds = 0, 0.0
        for line in steps:
            seconds += (line["tokens"] - previous) / line["tokens_per_second"]
            previous = line["tokens"]
        result = TrialResult(
            loss=sum(line["loss"] for line in tail) / len(tail),
            bits_per_byte=next(iter(done.bits_per_byte.values()), None),
            tokens=recipe.plan.num_tokens(recipe.total_steps),
            seconds=round(seconds, 3),
        )
    file = trial.result_file(study)
    file.parent.mkdir(parents=True, exist_ok=True)
    # JSON has no infinity; Python's float reads the word.
    entry = {
        "values": dict(trial.values),
        "loss": _number(result.loss),
        "bits_per_byte": _number(result.bits_per_byte),
        "tokens": result.tokens,
        "seconds": result.seconds,
    }
    write_text(file, json.dumps(entry, indent=2) + "\n")
    return result


def training_curve(trial: Trial, study: Path, *, share: float) -> tuple[Array, Array]:
    """(tokens, training loss) of a trial's trunk, the loss a mean over a ``share`` of the run."""
    lines = [line for line in Run(folder=trial.folder(study)).trunk.metrics() if "loss" in line]
    tokens, losses = (np.array([line[key] for line in lines], dtype=np.float64) for key in ("tokens", "loss"))
    window = max(1, round(len(losses) * share))
    return tokens[window - 1 :], np.convolve(losses, np.full(window, 1 / window), mode="valid")


def _number(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def run_trials(
    trials: Sequence[Trial], study: Path, *, workers: int = 1, progress: Progress | None = None
) -> list[TrialResult]:
    """Train all trials, ``workers`` at a time with an equal share of the cores, and return their results in order.

    Ctrl-C and SIGTERM stop every trial with a checkpoint; the same call continues. Trials of one trunk train one
    after another, the shortest first.

    Raises:
        KeyboardInterrupt: where it was stopped.
        UserError: for trials that cannot be trained.
    """
    groups: dict[Path, list[Trial]] = {}
    for trial in sorted(trials, key=lambda trial: (trial.recipe.trunk_steps, trial.recipe.total_steps)):
        groups.setdefault(trial.folder(study), []).append(trial)
    with stop_on_signals() as asked:
        if workers == 1:
            _run_here(list(groups.values()), study, asked, progress, num_trials=len(trials))
        else:
            _run_side_by_side(list(groups.values()), study, workers, asked, progress, num_trials=len(trials))
        if asked():
            raise KeyboardInterrupt
    results = [read_result(trial, study) for trial in trials]
    if None in results:
        raise UserError(f"a trial of {study} ended without a result: run the study again")
    return [result for result in results if result is not None]


def _run_here(
    groups: Sequence[Sequence[Trial]],
    study: Path,
    asked: Callable[[], bool],
    progress: Progress | None,
    *,
    num_trials: int,
) -> None:
    from minicpm_training.studies.run import StoppedError

    for done, trial in enumerate((trial for group in groups for trial in group), 1):
        if asked():
            return
        try:
            result = run_trial(trial, study, should_stop=asked)
        except StoppedError:
            return
        _report(progress, trial, result, done, num_trials)


def _run_side_by_side(
    groups: list[Sequence[Trial]],
    study: Path,
    workers: int,
    asked: Callable[[], bool],
    progress: Progress | None,
    *,
    num_trials: int,
) -> None:
    threads = max(1, usable_cpus() // workers)
    context = multiprocessing.get_context("spawn")
    waiting = list(groups)
    running: dict[BaseProcess, Sequence[Trial]] = {}
    done = 0
    while (waiting and not asked()) or running:
        while waiting and len(running) < workers and not asked():
            group = waiting.pop(0)
            process: BaseProcess = context.Process(target=_work, args=(list(group), study, threads))
            process.start()
            running[process] = group
        wait([process.sentinel for process in running], timeout=0.5)
        if asked():
            for stopping in running:
                stopping.terminate()
            for stopping in running:
                stopping.join()
        for ended in [process for process in running if not process.is_alive()]:
            for trial in running.pop(ended):
                if (result := read_result(trial, study)) is not None:
                    done += 1
                    _report(progress, trial, result, done, num_trials)
            if ended.exitcode not in (0, None) and not asked():
                for other in running:
                    other.terminate()
                raise UserError("a trial failed (its error is above); what is done is kept")


def _work(group: Sequence[Trial], study: Path, threads: int) -> None:
    """What a worker process does: the trials of one folder."""
    import torch

    from minicpm_edge.cli.main import run_guarded
    from minicpm_training.studies.run import StoppedError

    def train_all() -> int:
        torch.set_num_threads(threads)
        with stop_on_signals(insist=False) as asked:
            for trial in group:
                try:
                    run_trial(trial, study, should_stop=asked)
                except StoppedError:
                    break
        return 0

    sys.exit(run_guarded(train_all, debug=False))


def _report(progress: Progress | None, trial: Trial, result: TrialResult, done: int, num_trials: int) -> None:
    if progress is not None:
        values = "  ".join(f"{name} {value}" for name, value in trial.values.items())
        score = "diverged" if result.diverged else f"{result.score:.4f}"
        progress.message(f"trial {done}/{num_trials}  {values}  {score}")
