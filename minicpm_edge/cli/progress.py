"""A live progress line: rewritten in place on a terminal, a plain line now and then elsewhere.

>>> with Progress() as progress:
...     progress.update("step 10/100  loss 3.21")
"""

from __future__ import annotations

import shutil
import sys
import time
import unicodedata
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

TERMINAL_SECONDS = 0.1
PLAIN_SECONDS = 10.0
CLEAR_LINE = "\r\x1b[K"


class Progress:
    """Writes the newest status to ``stream`` (default: standard error, so that ``--json`` output stays clean).

    On a terminal :meth:`update` rewrites one line at most ten times a second. Elsewhere (a pipe, a log file) it
    writes a whole line at once and then one every ``plain_seconds``. :meth:`finish` writes the last status,
    whatever the clock says, and ends the line.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        plain_seconds: float = PLAIN_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._interval = TERMINAL_SECONDS if self._live else plain_seconds
        self._clock = clock
        self._next_write = float("-inf")
        self._pending: str | None = None
        self._line_open = False

    def update(self, text: str) -> None:
        """Show ``text`` as the status now, or keep it until the next write is due."""
        self._pending = text
        now = self._clock()
        if now >= self._next_write:
            self._next_write = now + self._interval
            self._write(text)

    def message(self, text: str) -> None:
        """Write a line that stays (a warning, a report of one evaluation) above the live line."""
        self._stream.write((CLEAR_LINE if self._line_open else "") + text + "\n")
        self._line_open = False
        self._next_write = float("-inf") if self._live else self._next_write
        self._stream.flush()

    def finish(self, text: str | None = None) -> None:
        """Write the last status (``text``, or the one not written yet) and end the line."""
        last = self._pending if text is None else text
        if last is not None:
            self._write(last)
        if self._line_open:
            self._stream.write("\n")
            self._stream.flush()
        self._line_open = False
        self._next_write = float("-inf")

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()

    def _write(self, text: str) -> None:
        text = " ".join(text.splitlines())
        if self._live:
            self._stream.write(CLEAR_LINE + fit(text, shutil.get_terminal_size().columns - 1))
            self._line_open = True
        else:
            self._stream.write(text + "\n")
        self._stream.flush()
        self._pending = None


def fit(text: str, columns: int) -> str:
    """The longest beginning of ``text`` that fits into ``columns`` terminal cells (wide characters take two)."""
    used = 0
    for position, character in enumerate(text):
        used += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if used > columns:
            return text[:position]
    return text


def duration(seconds: float) -> str:
    """``75`` → ``1m15s``: a time left or taken, for progress lines."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
