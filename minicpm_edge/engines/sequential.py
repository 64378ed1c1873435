"""An engine for models that compute one sequence at a time: a first-come queue and the one thread that computes.

Every call into the runtime is made by that thread, the prompt's as well as the answer's. OpenMP gives each calling
thread a team of workers of its own, and two teams on one set of cores slow each other down.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing
from queue import SimpleQueue

from minicpm_edge.engines.base import Ended, GenerationRequest, ModelRunner, Started, Vocabulary
from minicpm_edge.engines.chunks import ChunkBuilder
from minicpm_edge.errors import UserError

CLOSED = "the model is closed; load it again"


class SequentialEngine:
    """A :class:`~minicpm_edge.engines.base.ModelRunner` as an :class:`~minicpm_edge.engines.base.Engine`."""

    num_slots = 1

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._owner = _Owner(runner)
        thread = threading.Thread(target=self._owner.run, name=f"{runner.backend} engine", daemon=True)
        thread.start()
        # Run once: by close(), when the engine is garbage, or at exit. The thread knows its owner object only.
        self._stop = weakref.finalize(self, _stop, self._owner, thread)

    @property
    def backend(self) -> str:
        """See :class:`~minicpm_edge.engines.base.Model`, as for the next three."""
        return self._runner.backend

    @property
    def context_length(self) -> int:
        return self._runner.context_length

    @property
    def vocabulary(self) -> Vocabulary:
        return self._runner.vocabulary

    @property
    def stop_token_ids(self) -> frozenset[int]:
        return self._runner.stop_token_ids

    def submit(self, request: GenerationRequest) -> None:
        """See :meth:`minicpm_edge.engines.base.Engine.submit`."""
        self._owner.put(lambda owner: owner.generate(request))

    def embed(self, prompt_ids: Sequence[int]) -> Future[list[float]]:
        """See :meth:`minicpm_edge.engines.base.Engine.embed`."""
        future: Future[list[float]] = Future()
        self._owner.put(lambda owner: owner.embed(prompt_ids, future))
        return future

    def close(self) -> None:
        """See :meth:`minicpm_edge.engines.base.Engine.close`. Waits for the engine's thread to end."""
        self._stop()


class _Owner:
    """What the engine's thread runs."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._inbox: SimpleQueue[Callable[[_Owner], None] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False

    def put(self, job: Callable[[_Owner], None]) -> None:
        with self._lock:
            if self._closed:
                raise UserError(CLOSED)
            self._inbox.put(job)

    def stop(self) -> None:
        """Nothing is taken on any more; what runs or waits ends in an error, and then the thread."""
        with self._lock:
            self._closed = True
            self._inbox.put(None)

    def run(self) -> None:
        while job := self._inbox.get():
            job(self)
            del job  # a request and its reader are free as soon as they are done with
        self._runner.close()

    def generate(self, request: GenerationRequest) -> None:
        finished, error = False, None
        try:
            if not self._cancelled(request):
                request.deliver(Started())
                finished = self._deliver_chunks(request)
        except Exception as raised:  # noqa: BLE001  it is the reader's, in whose thread it is raised again
            error = raised
        if self._closed and not finished and error is None:
            error = UserError(CLOSED)
        request.deliver(Ended(error))

    def embed(self, prompt_ids: Sequence[int], future: Future[list[float]]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            if self._closed:
                raise UserError(CLOSED)
            future.set_result(self._runner.embed(prompt_ids))
        except Exception as raised:  # noqa: BLE001  as above
            future.set_exception(raised)

    def _deliver_chunks(self, request: GenerationRequest) -> bool:
        """Whether the text came to its end."""
        builder = ChunkBuilder(self._runner, request)
        tokens = self._runner.tokens(request.prompt_ids, request.params, lambda: self._cancelled(request))
        with closing(tokens):
            for token in tokens:
                if chunk := builder.push(token):
                    request.deliver(chunk)
                    if chunk.finish_reason:
                        return True
        return False

    def _cancelled(self, request: GenerationRequest) -> bool:
        return request.cancelled or self._closed


def _stop(owner: _Owner, thread: threading.Thread) -> None:
    owner.stop()
    # A reader's garbage may be collected, and its engine with it, in the engine's own thread.
    if thread is not threading.current_thread():
        thread.join()
