"""The reader's end of a request: an iterator for threads, an asynchronous one for event loops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Self

from minicpm_edge.engines.base import Chunk, Ended, Event, GenerationRequest, Sink

Submit = Callable[[Sink], GenerationRequest]
"""Makes a request with this sink and submits it."""

# On Windows, Ctrl-C does not interrupt a wait without end.
WAIT_SECONDS = 0.1


class _Reader:
    """What both kinds share: a request, where its events arrive, and how to call it off."""

    def __init__(self, submit: Submit, sink: Sink, check: Callable[[], None]) -> None:
        self._ended = False
        self._sink = sink
        self._check = check
        self._request = submit(sink)

    @property
    def cancelled(self) -> bool:
        """Whether the generation was called off."""
        return self._request.cancelled

    def cancel(self) -> None:
        """Call the generation off, from any thread; whoever waits for its next chunk gets the end of the iteration."""
        if not self._ended:
            self._request.cancel()
            self._sink(Ended())

    def __del__(self) -> None:
        if hasattr(self, "_request"):  # not where submit() raised
            self.cancel()

    def _take(self, event: Event) -> Chunk | None:
        self._check()
        match event:
            case Chunk():
                return event
            case Ended(error):
                self._ended = True
                if error is not None:
                    raise error
        return None


class Generation(_Reader, Iterator[Chunk]):
    """The chunks of one generation, as they come. Made by ``LanguageModel.stream``.

    The engine works ahead of a slow reader. Iteration raises what the engine raised. :meth:`cancel` ends it at once,
    from any thread or a signal handler; so do leaving the ``with`` block, an exception in the wait (Ctrl-C), and
    dropping the last reference.
    """

    def __init__(self, submit: Submit, *, check: Callable[[], None]) -> None:
        """``check`` raises where no more chunks may be read, those already generated included."""
        self._events: SimpleQueue[Event] = SimpleQueue()
        super().__init__(submit, self._events.put, check)

    def __next__(self) -> Chunk:
        try:
            while not self._ended and not self.cancelled:
                if chunk := self._take(self._next_event()):
                    return chunk
        except BaseException:
            self.cancel()
            raise
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def _next_event(self) -> Event:
        while True:
            with suppress(Empty):
                return self._events.get(timeout=WAIT_SECONDS)


class AsyncGeneration(_Reader, AsyncIterator[Chunk]):
    """:class:`Generation` for an event loop, which the engine's thread wakes; no thread waits.

    Made inside the loop, by ``LanguageModel.astream``. Iteration raises what the engine raised; cancelling the task
    that waits cancels the generation, and so does leaving the ``async with`` block.
    """

    def __init__(self, submit: Submit, *, check: Callable[[], None]) -> None:
        """``check`` as for :class:`Generation`."""
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        put = self._events.put_nowait

        def sink(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(put, event)

        super().__init__(submit, sink, check)

    async def started(self) -> None:
        """Wait for the generation's turn; call it before the first chunk is asked for, or not at all.

        Raises:
            Exception: what iteration would raise, where the generation ends before its turn.
        """
        await self._next_event()

    async def __anext__(self) -> Chunk:
        while not self._ended and not self.cancelled:
            if chunk := await self._next_event():
                return chunk
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    async def _next_event(self) -> Chunk | None:
        try:
            return self._take(await self._events.get())
        except BaseException:
            self.cancel()
            raise
