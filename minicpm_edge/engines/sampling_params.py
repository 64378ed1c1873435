"""How a request asks for its next token and its end: the settings, their types and their limits."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, TypedDict, Unpack

from minicpm_edge.errors import UserError

MAX_STOP_STRINGS, MAX_STOP_LENGTH = 16, 256


@dataclass(frozen=True)
class Limits:
    """The range of a number: from ``low`` (above it, if ``exclusive_low``) to ``high``."""

    low: int
    high: int
    whole: bool = False
    exclusive_low: bool = False


LIMITS: Final[Mapping[str, Limits]] = {
    "max_tokens": Limits(1, 2**31 - 1, whole=True),
    "temperature": Limits(0, 100),
    "top_p": Limits(0, 1, exclusive_low=True),
    "top_k": Limits(0, 2**31 - 1, whole=True),
    "min_p": Limits(0, 1),
    "seed": Limits(-(2**63), 2**64 - 1, whole=True),
}
"""What each setting may be. An API in front of an engine may allow less, and says so where it does."""


class SamplingOptions(TypedDict, total=False):
    """The keyword arguments of ``lm.chat`` and ``lm.generate``: the fields of :class:`SamplingParams`."""

    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    stop: str | Sequence[str]
    seed: int | None


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when to stop; validated here, wherever the values came from.

    The filters apply in llama.cpp's order: top-k, top-p (Holtzman et al., arXiv 1904.09751), min-p (arXiv 2407.01082),
    then temperature, then one seeded draw. Temperature 0 is greedy: the likeliest token, whatever the other settings.

    Raises:
        UserError: for a value of the wrong type or outside :data:`LIMITS`, naming the setting and its range.
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
        for name, limits in LIMITS.items():
            value = getattr(self, name)
            if value is not None or name not in ("max_tokens", "seed"):
                _check_number(name, value, limits)
        object.__setattr__(self, "stop", _stop_strings(self.stop))

    @classmethod
    def of(cls, **options: Unpack[SamplingOptions]) -> SamplingParams:
        """From keyword arguments, as ``lm.chat(…, temperature=0)`` takes them.

        Raises:
            UserError: for a value out of range, or an unknown name (the message offers the nearest known one).
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"the settings are {', '.join(known)}"
                raise UserError(f"{name!r} is not a sampling setting; {hint}")
        values: dict[str, Any] = dict(options)
        return cls(**values)


def _check_number(name: str, value: object, limits: Limits) -> None:
    kind = int if limits.whole else int | float
    # Comparisons with nan are false, so nan and the infinities fall out with everything else out of range.
    fits = isinstance(value, kind) and not isinstance(value, bool) and limits.low <= value <= limits.high
    if not fits or (limits.exclusive_low and value == limits.low):
        noun = "whole number" if limits.whole else "number"
        bound = "above" if limits.exclusive_low else "from"
        raise UserError(f"{name} is {_shown(value)}; give a {noun} {bound} {limits.low} to {limits.high}")


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
