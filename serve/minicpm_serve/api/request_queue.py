"""One model, many clients: how many may wait, who is refused, and how all are let go when the server stops.

The engine computes in a thread of its own and the event loop stays free to answer. Whoever stops listening stops the
work: closing an iterator of :class:`RequestQueue` cancels what it asked for, wherever that is (waiting, reading the
prompt, or writing).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from minicpm_edge.engines.base import Chunk
from minicpm_edge.engines.generation import AsyncGeneration
from minicpm_edge.engines.sampling_params import SamplingParams
from minicpm_edge.language_model import LanguageModel
from minicpm_serve.api.errors import OVERLOADED, ApiError

T = TypeVar("T")
MakePrompt = Callable[[], list[int]]
"""Renders and tokenizes a prompt; a long one takes a while, so it is called in a thread."""

MOST_SECONDS_TO_RETRY = 60


class RequestQueue:
    """Admission in front of the engine's own queue. Made and used inside one event loop."""

    def __init__(self, model: LanguageModel, *, max_waiting: int) -> None:
        self._model = model
        self._max_waiting = max_waiting
        self._num_admitted = 0
        self._tokenizing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
        self._generations: set[AsyncGeneration] = set()
        self._stopping = False
        self._usual_seconds = 1.0

    @property
    def num_waiting(self) -> int:
        """Requests beyond those that the engine works on."""
        return max(0, self._num_admitted - self._model.num_slots)

    async def generate(self, make_prompt: MakePrompt, params: SamplingParams) -> AsyncGenerator[Chunk]:
        """The chunks of one generation. The first is empty, and comes as soon as the engine begins with the request.

        Raises:
            ApiError: 503 with Retry-After when too many wait already, or when the server is shutting down.
            Exception: whatever ``make_prompt`` or the engine raises.
        """
        with self._place():
            ids = await self._in_thread(make_prompt)
            generation = self._model.astream(ids, params)
            self._generations.add(generation)
            try:
                await generation.started()
                self._check_not_stopping()
                began = time.monotonic()
                yield Chunk(text="", finish_reason=None, num_prompt_tokens=len(ids), num_completion_tokens=0)
                with self._timed(began):
                    async for chunk in generation:
                        yield chunk
                self._check_not_stopping()
            finally:
                self._generations.discard(generation)
                generation.cancel()

    async def embed(self, prompts: Sequence[MakePrompt]) -> AsyncGenerator[tuple[list[float], int]]:
        """For each prompt its embedding and its number of tokens. Raises as :meth:`generate` does."""
        with self._place(), self._timed(time.monotonic()):
            for make_prompt in prompts:
                ids = await self._in_thread(make_prompt)
                self._check_not_stopping()
                yield await asyncio.wrap_future(self._model.submit_embedding(ids)), len(ids)

    def stop(self) -> None:
        """Shutting down: end what runs, refuse what comes. Callable from a signal handler or another thread."""
        self._stopping = True
        for generation in list(self._generations):
            generation.cancel()

    def close(self) -> None:
        """:meth:`stop`, and end the thread that tokenizes."""
        self.stop()
        self._tokenizing.shutdown(wait=True)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        result = await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)
        self._check_not_stopping()
        return result

    @contextmanager
    def _place(self) -> Iterator[None]:
        self._check_not_stopping()
        if self._num_admitted >= self._model.num_slots + self._max_waiting:
            raise self._overloaded()
        self._num_admitted += 1
        try:
            yield
        finally:
            self._num_admitted -= 1

    @contextmanager
    def _timed(self, began: float) -> Iterator[None]:
        try:
            yield
        finally:
            self._usual_seconds += 0.2 * (time.monotonic() - began - self._usual_seconds)

    def _check_not_stopping(self) -> None:
        if self._stopping:
            raise ApiError(503, "the server is shutting down", kind=OVERLOADED, code="shutting_down")

    def _overloaded(self) -> ApiError:
        turns = (self.num_waiting + 1) / self._model.num_slots
        seconds = min(MOST_SECONDS_TO_RETRY, math.ceil(self._usual_seconds * turns))
        return ApiError(
            503,
            f"{self._num_admitted} requests are ahead of this one, as many as this server takes; try again later",
            kind=OVERLOADED,
            code="overloaded",
            headers={"Retry-After": str(seconds)},
        )
