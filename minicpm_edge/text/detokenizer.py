"""The incremental detokenizer: from token bytes to text that may be shown.

Whole characters only, and never part of a stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class IncrementalDetokenizer:
    """Decodes UTF-8 as it arrives and holds back whatever may yet become a stop string.

    What comes out does not depend on how the bytes were cut into tokens: the text ends before the stop string that is
    complete first (the longest, if two end at the same character), and bytes that cannot be UTF-8 become U+FFFD as soon
    as that is certain.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = tuple(stop)
        self._longest_hold = max((len(item) for item in self._stop), default=1) - 1
        self._held = ""
        self.stopped = False
        """True once a stop string is complete; nothing comes out after that."""

    def push(self, data: bytes) -> str:
        """Take the next token's bytes; returns the text that is now certain."""
        return self._advance(self._decoder.decode(data))

    def finish(self, *, cut: bool = False) -> str:
        """The text still held back. Half a character is invalid, unless the budget ``cut`` it: then it is dropped."""
        tail = "" if cut else self._decoder.decode(b"", final=True)
        text = self._advance(tail)
        if self.stopped:
            return text
        text, self._held = text + self._held, ""
        return text

    def _advance(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        start = _first_stop(text, self._stop)
        if start is not None:
            self.stopped, self._held = True, ""
            return text[:start]
        hold = self._hold_length(text)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def _hold_length(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        for length in range(min(self._longest_hold, len(text)), 0, -1):
            tail = text[-length:]
            if any(item.startswith(tail) for item in self._stop):
                return length
        return 0


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string to be completed in ``text`` begins."""
    found = [(text.find(item), item) for item in stop]
    ends = [(start + len(item), start) for start, item in found if start >= 0]
    return min(ends)[1] if ends else None
