"""Work on several cores with results in order, in bounded memory, and nothing left behind.

Processes are spawned, which works alike on Linux, macOS and Windows and knows no fork of a threaded program.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from minicpm_edge.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
MAX_WORKERS = 60  # Windows cannot wait for more processes at once


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    start: Callable[..., None],
    arguments: tuple[object, ...],
) -> Iterator[Result]:
    """``function`` of each item, in order; at most two items a worker are under way.

    ``start(*arguments)`` runs once in each process before. With one worker everything happens in this process.
    """
    if workers <= 1:
        start(*arguments)
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(
        min(workers, MAX_WORKERS),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(start, arguments),
    )
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died, most likely for want of memory: use fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(start: Callable[..., None], arguments: tuple[object, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start(*arguments)


def _end_with_parent() -> None:
    """A pool's worker would wait for ever for a main process that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
