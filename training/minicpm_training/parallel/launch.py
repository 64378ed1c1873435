"""Starting several processes of this machine under torch's launcher, and ending them together."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from multiprocessing import active_children
from types import FrameType
from typing import TypeVar

from minicpm_edge.errors import UserError
from minicpm_training.parallel.process_group import GRACE_SECONDS

T = TypeVar("T")
R = TypeVar("R")


class WorkerFailedError(Exception):
    """A worker ended with an exit code of its own, and has said why."""


def launch(work: Callable[[T], R], job: T, num_processes: int, *, debug: bool) -> list[R]:
    """Run ``work(job)`` in several processes, each a rank; returns what they return.

    ``work`` is a function of a module, ``job`` can be pickled. A worker that fails leaves by ``sys.exit``. A signal is
    handed on to the workers, which stop by themselves, with a checkpoint; a second one ends them at once. When one of
    them dies the launcher ends the others.

    Raises:
        WorkerFailedError: where a worker left with an exit code.
        UserError: where one was killed.
        KeyboardInterrupt: where they ended by a signal that came here.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool, _quiet_logs(unless=debug):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            run_id=f"minicpm-edge-{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        start = partial(pool.submit, elastic_launch(config, _worker), work, job, os.getpid())
        results, signals = _hand_on_signals(start, num_processes)
        try:
            return list(results.result().values())
        except ChildFailedError as failed:
            if debug:
                raise
            first, failure = failed.get_first_failure()
            if failure.exitcode > 0:
                raise WorkerFailedError from None
            if signals:
                raise KeyboardInterrupt from None
            raise UserError(
                f"process {first} of {num_processes} was killed by {failure.signal_name()}, and the others were ended; "
                "what was saved is good: the run can be resumed from its last checkpoint, if it has one"
            ) from None


@contextmanager
def _quiet_logs(*, unless: bool) -> Iterator[None]:
    """Without torch's own account of what its launcher does: one line of ours says what failed."""
    logging.disable(logging.NOTSET if unless else logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _worker(work: Callable[[T], R], job: T, launcher_pid: int) -> R:
    """What each process runs."""
    # A launcher's death sends SIGINT, which is to end this process except in training; it may be dead already.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.getppid() != launcher_pid:
        sys.exit(1)
    result = work(job)
    if os.getppid() != launcher_pid:
        sys.exit(1)
    atexit.register(os._exit, 0)
    return result


def _hand_on_signals(start: Callable[[], Future[T]], num_processes: int) -> tuple[Future[T], list[int]]:
    """Start the processes and wait for their end; signals go on to them and into the list returned."""
    received: list[int] = []

    def hand_on(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        for process in active_children():
            if len(received) == 1:
                process.terminate()
            else:
                process.kill()

    # A terminal sends Ctrl-C to all processes; those that start now inherit that they leave it to this one.
    previous = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, hand_on),
    }
    try:
        running = start()
        while len(processes := active_children()) < num_processes and not running.done():
            time.sleep(0.01)
        signal.signal(signal.SIGINT, hand_on)
        for process in processes if received else ():
            process.terminate()
        while not running.done():
            wait([running], timeout=0.2)
            if any(process.exitcode for process in processes):
                wait([running], timeout=GRACE_SECONDS / 2)  # torch's launcher asks the others to end
                for process in processes:
                    process.kill()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return running, received
