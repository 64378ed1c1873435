"""Ctrl-C and SIGTERM end a run after the update at hand, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether the user, or the system, has asked the run to stop."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self) -> bool:
        return self.requested


@contextmanager
def stop_on_signals(*, insist: bool = True) -> Iterator[StopRequest]:
    """The first SIGINT or SIGTERM asks for a stop; a second one raises ``KeyboardInterrupt`` at once.

    Without ``insist`` it does not: of several processes the launcher ends all, and signals may come twice.
    """
    request = StopRequest()

    def handle(signum: int, frame: FrameType | None) -> None:
        if request.requested and insist:
            raise KeyboardInterrupt
        request.requested = True

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield request
        return
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
