"""Ctrl-C as a request: the first signal asks for an orderly end, a second one raises ``KeyboardInterrupt``."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def on_interrupt(
    ask: Callable[[], None], *, signals: tuple[int, ...] = (signal.SIGINT,), insist: bool = True
) -> Iterator[None]:
    """While open, the first of ``signals`` calls ``ask`` and a second one raises ``KeyboardInterrupt``.

    ``ask`` runs inside the signal handler: it sets a flag, or cancels. With ``insist=False`` a second signal is
    ignored. Outside the main thread, which alone may set handlers, this does nothing.
    """
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and insist:
            raise KeyboardInterrupt
        if not asked:
            asked = True
            ask()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handle) for number in signals}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
