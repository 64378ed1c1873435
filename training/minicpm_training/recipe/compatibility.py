"""What distinguishes two recipes: which changes make another model, and which only another length or another log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minicpm_edge.errors import UserError
from minicpm_training.recipe.schema import Recipe, Source

# Touch no number, or rounding only (precision, device, compile). The tokenizer's folder may move: sets know it by hash.
HARMLESS = (
    "name",
    "micro_batch_tokens",
    "precision",
    "compile",
    "device",
    "data.tokenizer",
    "data.valid",
    "checkpoint",
    "evaluation",
    "sample",
    "log",
)
# Of a trunk that goes on: its length, and the decay that is to follow.
LENGTHS = ("schedule.stable_tokens", "schedule.decay_tokens")
DECAY = ("data.decay", "schedule.form", "schedule.floor", "schedule.half_life_tokens")


def same_model(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes train the same model, up to rounding."""
    return not any(changes(one, other, allowed=HARMLESS))


def refuse_another_run(saved: Recipe, asked: Recipe, what: str) -> None:
    """Raise :class:`UserError` naming the first key that makes ``asked`` another run than ``saved``.

    A cosine's length is part of its curve, so only a WSD run may change its own.
    """
    allowed = (*HARMLESS, *LENGTHS, *DECAY) if saved.schedule.kind == "wsd" else (*HARMLESS, *DECAY[:1])
    for key, before, after in changes(saved, asked, allowed=allowed):
        raise UserError(
            f"{key} was {before!r} when {what} was trained and cannot become {after!r}: start a new run"
        )


def changes(one: Recipe, other: Recipe, *, allowed: Sequence[str]) -> Iterator[tuple[str, Any, Any]]:
    """(key, value in ``one``, value in ``other``) of every difference that is not ``allowed``."""
    before = _flatten(one)
    for key, value in _flatten(other).items():
        is_allowed = any(key == name or key.startswith(f"{name}.") for name in allowed)
        if before[key] != value and not is_allowed:
            yield key, before[key], value


def _flatten(recipe: Recipe) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in recipe.model_dump().items():
        nested = isinstance(value, dict)
        flat |= {f"{key}.{inner}": item for inner, item in value.items()} if nested else {key: value}
    flat["data.stable"] = _by_name(recipe.data.stable)
    flat["data.decay"] = _by_name(recipe.data.decay)
    return flat


def _by_name(sources: Sequence[Source]) -> list[tuple[str, float]]:
    """Sets are known by their folders' names, which seed the order of their rows: a folder may move."""
    return [(Path(source.path).name, source.weight) for source in sources]
