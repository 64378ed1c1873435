"""One model, many clients: a first-come queue in front of the engine's thread.

The engine blocks, so it works in a thread of its own and the event loop stays free to answer. Whoever stops listening
stops the work: closing the iterator that :meth:`Generations.events` returns cancels the generation, wherever it is
(waiting, reading the prompt, or writing), and the next one begins only once the engine has let go.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from minicpm_edge.engines.base import Cancelled
from minicpm_serve.api.errors import OVERLOADED, ApiError

Event = TypeVar("Event")
Work = Callable[[Cancelled], Iterable[Event]]
"""Runs in the engine's thread, yields events, and ends early once its argument returns True."""

MOST_SECONDS_TO_RETRY = 60


class Generations:
    """Turns at the engine, in order of arrival. Made and used inside one event loop.

    A batching engine takes this class's place without its callers noticing: they only see events.
    """

    def __init__(self, *, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self.num_waiting = 0
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._stopping = threading.Event()
        self._usual_seconds = 1.0

    async def events(self, work: Work[Event]) -> AsyncGenerator[Event]:
        """What ``work`` yields, as it comes, once its turn has come.

        Raises:
            ApiError: 503 with Retry-After when too many wait already, or when the server is shutting down.
            Exception: whatever ``work`` raises.
        """
        await self._take_turn()
        began = time.monotonic()
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        gone = threading.Event()

        def cancelled() -> bool:
            return gone.is_set() or self._stopping.is_set()

        def pump() -> None:
            try:
                for event in work(cancelled):
                    loop.call_soon_threadsafe(events.put_nowait, event)
                    if cancelled():
                        break
            finally:
                loop.call_soon_threadsafe(events.put_nowait, None)

        done = loop.run_in_executor(self._thread, pump)
        try:
            while (event := await events.get()) is not None:
                yield event
            await asyncio.wait([done])
            done.result()
            self._check_not_stopping()
        finally:
            gone.set()
            try:
                await asyncio.wait([done])
            finally:
                self._turn.release()
                self._usual_seconds += 0.2 * (time.monotonic() - began - self._usual_seconds)

    def stop(self) -> None:
        """Shutting down: end what runs, refuse what waits. Callable from a signal handler."""
        self._stopping.set()

    def close(self) -> None:
        """Wait for the engine's thread to end."""
        self._stopping.set()
        self._thread.shutdown(wait=True)

    async def _take_turn(self) -> None:
        if self._turn.locked() and self.num_waiting >= self._max_waiting:
            raise self._overloaded()
        self.num_waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self.num_waiting -= 1
        if self._stopping.is_set():
            self._turn.release()
            self._check_not_stopping()

    def _check_not_stopping(self) -> None:
        if self._stopping.is_set():
            raise ApiError(503, "the server is shutting down", kind=OVERLOADED, code="shutting_down")

    def _overloaded(self) -> ApiError:
        seconds = min(MOST_SECONDS_TO_RETRY, math.ceil(self._usual_seconds * (self.num_waiting + 1)))
        return ApiError(
            503,
            f"{self.num_waiting + 1} requests are ahead of this one, as many as this server takes; try again later",
            kind=OVERLOADED,
            code="overloaded",
            headers={"Retry-After": str(seconds)},
        )
