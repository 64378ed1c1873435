"""A GGUF is mapped into memory: whoever overwrites it in place changes the running model, or kills it by SIGBUS.

A file that is replaced (written beside the old one and renamed) harms nobody: the old one stays until it is closed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from minicpm_edge.cli.command import EXIT_ERROR


class MappedFile:
    """Notices that the file under ``path`` was written to since this was made. A changed time counts as writing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Held open: its descriptor stays with this file when another takes its name.
        self._file = path.open("rb")
        self._before = self._state()

    def problem(self) -> str | None:
        """What to tell the user, or None while the file is as it was."""
        return None if self._state() == self._before else self._advice("was overwritten")

    @contextmanager
    def guarded(self) -> Iterator[MappedFile]:
        """While open, a read beyond the file's new end ends the process with an error that names the file.

        The runtime reads in other threads, outside Python. Such a thread meets the signal again and again until the
        main thread has run the handler, so this is no help for what the main thread itself reads.
        """
        number = getattr(signal, "SIGBUS", None)
        with self._file:
            if number is None or threading.current_thread() is not threading.main_thread():
                yield self
                return
            previous = signal.signal(number, self._end)
            try:
                yield self
            finally:
                signal.signal(number, previous)

    def _end(self, number: int, frame: FrameType | None) -> None:
        print(f"error: {self._advice('can no longer be read')}", file=sys.stderr, flush=True)
        # Nothing can be tidied up: the thread that computes will never return.
        os._exit(EXIT_ERROR)

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def _advice(self, what: str) -> str:
        return f"{self._path} {what} while it was in use; write a new file beside it and rename that, then start again"
