"""The inference protocol: what every engine offers, how sampling is asked for, and what comes back.

An engine turns token ids into token ids. Text lives one layer up (``text_stream.py``, ``language_model.py``), so stop
strings, split UTF-8 and token budgets behave alike whichever runtime computes.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

from minicpm_edge.errors import UserError
from minicpm_edge.text.chat import ChatTokenizer

FinishReason = Literal["stop", "length"]
Cancelled = Callable[[], bool]
"""Polled between tokens and between batches of a prompt; True ends the generation."""

MAX_STOP_STRINGS, MAX_STOP_LENGTH = 16, 256
MAX_TOKENS = 2**31 - 1


def never_cancelled() -> bool:
    """The default :data:`Cancelled`: nobody calls the generation off."""
    return False


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when to stop; validated here, wherever the values came from.

    The filters apply in llama.cpp's order: top-k, top-p, min-p, then temperature, then one seeded draw. Temperature 0
    is greedy: the likeliest token, whatever the other settings say.
    """

    max_tokens: int | None = None
    """Most tokens to generate; None means as many as the context has room for."""
    temperature: float = 0.7
    top_p: float = 0.95
    """Keep the likeliest tokens whose probabilities add up to this; 1 keeps all."""
    top_k: int = 40
    """Keep this many of the likeliest tokens; 0 keeps all."""
    min_p: float = 0.05
    """Drop tokens less likely than this share of the likeliest one; 0 keeps all."""
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these; they are never part of the text."""
    seed: int | None = None
    """The same seed, settings and prompt give the same text from the same engine; None draws a fresh seed."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _check_integer("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        _check_number("temperature", self.temperature, 0, 100)
        _check_number("top_p", self.top_p, 0, 1, exclusive_low=True)
        _check_integer("top_k", self.top_k, 0, MAX_TOKENS)
        _check_number("min_p", self.min_p, 0, 1)
        if self.seed is not None:
            _check_integer("seed", self.seed, -(2**63), 2**64 - 1)
        object.__setattr__(self, "stop", _stop_strings(self.stop))

    @classmethod
    def of(cls, **values: Any) -> SamplingParams:
        """From keyword arguments, as ``lm.chat(…, temperature=0)`` takes them.

        Raises:
            UserError: for a value out of range, or an unknown name (the message offers the nearest known one).
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"the settings are {', '.join(known)}"
                raise UserError(f"{name!r} is not a sampling setting; {hint}")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A piece of generated text. The last chunk of a stream carries ``finish_reason``; a cancelled stream has none."""

    text: str
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_completion_tokens: int


class Vocabulary(ChatTokenizer, Protocol):
    """Text to ids and back, as the model's own tokenizer does it; what chats need is in ``ChatTokenizer``."""

    @property
    def vocab_size(self) -> int:
        """One more than the greatest id."""

    @property
    def bos_id(self) -> int:
        """Id of ``bos_token``; it counts only where ``adds_bos``."""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of ``text``, without a begin token; look-alikes of special tokens are text unless ``special``."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens left out; invalid bytes become U+FFFD."""


class Engine(Protocol):
    """One model in one runtime. Not thread-safe: ``LanguageModel`` holds the lock."""

    @property
    def kind(self) -> str:
        """``torch``, ``llama_cpp`` or ``onnx``."""

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The model's tokenizer and chat template."""

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a generation: end of text, end of turn."""

    def tokens(self, prompt: Sequence[int], params: SamplingParams, cancelled: Cancelled) -> Generator[int]:
        """Sampled ids, one after another, end tokens included, until the context is full or ``cancelled``.

        ``prompt`` has at least one token and leaves room for one more (the caller checks). Nothing is computed ahead
        of the token asked for.
        """

    def embed(self, tokens: Sequence[int]) -> list[float]:
        """The mean of the final hidden states over the tokens, scaled to unit length: ``(hidden_size,)``."""

    def close(self) -> None:
        """Free the model. Calling it again does nothing."""


def choose_context(asked: int | None, trained: int, model: object, *, default: int | None = None) -> int:
    """The context length to run with: what is ``asked`` for, else the trained one (at most ``default``).

    Raises:
        UserError: when more is asked for than ``model`` was trained for; its answers would be noise.
    """
    if asked is not None and asked > trained:
        raise UserError(
            f"context_length {asked} is more than {model} was trained for; ask for at most {trained}"
        )
    return asked or min(trained, default or trained)


def _check_number(name: str, value: object, low: float, high: float, *, exclusive_low: bool = False) -> None:
    # Comparisons with nan are false, so nan and the infinities fall out with everything else out of range.
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not fits or (exclusive_low and value == low):
        bound = "above" if exclusive_low else "from"
        raise UserError(f"{name} is {_shown(value)}; give a number {bound} {low:g} to {high:g}")


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UserError(f"{name} is {_shown(value)}; give a whole number from {low} to {high}")


def _stop_strings(stop: object) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, list | tuple) or not all(isinstance(item, str) for item in strings):
        raise UserError(f"stop is {_shown(stop)}; give a string or a list of strings")
    if len(strings) > MAX_STOP_STRINGS:
        raise UserError(f"stop has {len(strings)} strings; give at most {MAX_STOP_STRINGS}")
    for item in strings:
        if not 1 <= len(item) <= MAX_STOP_LENGTH:
            raise UserError(f"stop has a string of {len(item)} characters; give 1 to {MAX_STOP_LENGTH}")
    return tuple(strings)


def _shown(value: object) -> str:
    """A short form of a rejected value; Python refuses to print an int of thousands of digits."""
    if isinstance(value, int) and abs(value) > 10**20:
        return "a number of more than 20 digits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
