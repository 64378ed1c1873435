"""Ctrl-C and SIGTERM end a run after the step at hand, with a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from minicpm_edge.interrupts import on_interrupt


class StopRequest:
    """Whether the user, or the system, has asked the run to stop."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self) -> bool:
        return self.requested

    def request(self) -> None:
        """Ask the run to stop."""
        self.requested = True


@contextmanager
def stop_on_signals(*, insist: bool = True) -> Iterator[StopRequest]:
    """The first SIGINT or SIGTERM asks for a stop; a second one raises ``KeyboardInterrupt`` at once.

    With ``insist=False`` a second signal is ignored: of several processes the launcher ends all, and signals may come
    twice.
    """
    asked = StopRequest()
    with on_interrupt(asked.request, signals=(signal.SIGINT, signal.SIGTERM), insist=insist):
        yield asked
