"""A training job: resolved once from a command line, then done here or by worker processes that get it as it is."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minicpm_edge.cli.command import EXIT_ERROR, EXIT_INTERRUPTED
from minicpm_edge.cli.progress import Progress
from minicpm_edge.errors import UserError
from minicpm_training.commands.runs import describe, print_run
from minicpm_training.interrupts import stop_on_signals
from minicpm_training.parallel import process_group
from minicpm_training.recipe.schema import Recipe
from minicpm_training.run import Run

if TYPE_CHECKING:
    from minicpm_training.session import RunContext


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """All that a command line says of a training run.

    ``decay_from`` is the trunk's step that a decay branches from (None: the recipe's trunk, then its decay),
    ``seconds`` the time that all is to take, ``resume`` the command that continues the run once it was stopped.
    """

    recipe: Recipe
    run: Run
    decay_from: int | None = None
    seconds: float | None = None
    nproc: int
    as_json: bool
    debug: bool
    resume: tuple[str, ...]


def start(resolve: Callable[[], TrainJob]) -> int:
    """Resolve a job and do it: in this process, as one rank of a launcher's, or by ``nproc`` workers.

    Returns the exit code. What is wrong with the job is found before workers are started.
    """
    return process_group.with_process_group(lambda: _start(resolve))


def _start(resolve: Callable[[], TrainJob]) -> int:
    job = process_group.broadcast_from_rank0(resolve)
    num_processes = check_num_processes(job.nproc, job.recipe)
    if num_processes == process_group.world_size():
        return _do(job)
    from minicpm_training.parallel.launch import WorkerFailedError, launch

    try:
        return max(launch(_work, job, num_processes, debug=job.debug))
    except WorkerFailedError:
        return EXIT_ERROR


def _work(job: TrainJob) -> int:
    """What each worker does. To the launcher an interrupted one is one that has done its work."""
    from minicpm_edge.cli.main import run_guarded

    code = run_guarded(lambda: process_group.with_process_group(lambda: _do(job)), debug=job.debug)
    if code not in (0, EXIT_INTERRUPTED):
        sys.exit(code)
    return code


def _do(job: TrainJob) -> int:
    from minicpm_training.session import decay_branch, train_branch, train_run
    from minicpm_training.time_budget import train_within

    with _run_context() as context:
        if job.decay_from is not None:
            branch = process_group.broadcast_from_rank0(lambda: decay_branch(job.run, job.recipe))
            tip = job.run.trunk.checkpoint(job.decay_from)
            finished = train_branch(job.recipe, job.run, branch, tip, context)
        elif job.seconds is not None:
            finished = train_within(job.recipe, job.run, context, seconds=job.seconds)
        else:
            finished = train_run(job.recipe, job.run, context)
    if process_group.is_rank0():
        _print_end(job, finished)
    return 0 if finished else EXIT_INTERRUPTED


@contextmanager
def _run_context() -> Iterator[RunContext]:
    from minicpm_training.session import RunContext

    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        stop_on_signals(insist=process_group.world_size() == 1) as asked,
        Progress(None if process_group.is_rank0() else nowhere) as progress,
    ):
        yield RunContext(progress=progress, should_stop=lambda: process_group.any_rank_stops(asked()))


def _print_end(job: TrainJob, finished: bool) -> None:
    if job.as_json:
        print(json.dumps(describe(job.run), indent=2))
        return
    print_run(job.run)
    if finished:
        print(f"curve    {job.run.folder / 'loss.png'}")
        return
    num_processes = process_group.world_size()
    words = [*job.resume, *(["--nproc", str(num_processes)] if num_processes > 1 else [])]
    print(f"stopped with a checkpoint saved; resume: minicpm-edge {shlex.join(words)}")


def check_num_processes(nproc: int, recipe: Recipe) -> int:
    """How many processes are to train: those of ``--nproc``, or of a launcher that is there already.

    Raises:
        UserError: where so many cannot train the recipe on this machine.
    """
    if nproc < 1:
        raise UserError(f"--nproc {nproc}: give at least 1")
    started = process_group.world_size()
    num_processes = nproc if started == 1 else started
    if nproc not in (1, num_processes):
        raise UserError(f"--nproc {nproc}: {num_processes} processes are started already; leave it out")
    if num_processes == 1:
        return 1
    for stage in recipe.plan.stages:
        length, sequences = stage.sequence_length, stage.sequences_per_step
        if sequences % num_processes:
            nearest = max(1, round(sequences / num_processes)) * num_processes * length
            raise UserError(
                f"batch_tokens {stage.batch_tokens} are {sequences} sequences of data.sequence_length {length}, which "
                f"{num_processes} processes cannot share evenly: the nearest batch_tokens that they can is {nearest}"
            )
    if recipe.compile:
        raise UserError("compile is for one process: give --set compile=false, or leave --nproc out")
    if recipe.device not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"device {recipe.device!r} is one device: several processes need 'auto', 'cuda' or 'cpu'"
        )
    _check_gpus(num_processes if started == 1 else int(os.environ["LOCAL_WORLD_SIZE"]), recipe.device)
    return num_processes


def _check_gpus(num_here: int, device: str) -> None:
    """``num_here``: processes on this machine; under torchrun there may be several machines."""
    import torch

    num_gpus = torch.cuda.device_count()
    if device != "cpu" and 0 < num_gpus < num_here:
        raise UserError(
            f"{num_here} processes need a GPU each and there are {num_gpus}: "
            f"give --nproc {num_gpus}, or --set device=cpu"
        )
