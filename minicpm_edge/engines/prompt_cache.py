"""Which part of the last prompt an engine may keep for the next one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class PromptCache:
    """Remembers the whole batches of a prompt that an engine's cache of keys and values holds.

    Prompts are computed in batches that begin at multiples of ``batch``, and only whole batches are kept. The same
    batch over the same past is the same computation, to the bit, so an answer never depends on what the model was
    asked before. Tokens computed one by one, the answers, are not kept: their bits differ.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self._kept: list[int] = []

    def usable(self, prompt: Sequence[int]) -> int:
        """How many tokens of ``prompt`` are already computed. The last never is: its logits are needed."""
        most = min(len(self._kept), len(prompt) - 1) // self.batch * self.batch
        for start in range(0, most, self.batch):
            if list(prompt[start : start + self.batch]) != self._kept[start : start + self.batch]:
                return start
        return most

    def batches(self, prompt: Sequence[int], start: int) -> Iterator[tuple[int, Sequence[int]]]:
        """The batches (position, tokens) still to compute from ``start`` on, each kept once the next is asked for."""
        del self._kept[start:]
        for position in range(start, len(prompt), self.batch):
            tokens = prompt[position : position + self.batch]
            yield position, tokens
            if len(tokens) == self.batch:
                self._kept.extend(tokens)

    def clear(self) -> None:
        """Nothing is kept any more."""
        self._kept.clear()
