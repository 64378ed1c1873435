"""What distinguishes two recipes: which changes make another run, and which only another length or another log.

Each key says so itself, where it stands (:class:`minicpm_training.recipe.sections.Effect`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from minicpm_edge.errors import UserError
from minicpm_training.recipe.files import sections_of
from minicpm_training.recipe.plan import by_name
from minicpm_training.recipe.schema import Recipe
from minicpm_training.recipe.sections import Effect


def same_model(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes train the same model, up to rounding."""
    return not any(changes(one, other, allowed={Effect.HARMLESS}))


def refuse_another_run(saved: Recipe, asked: Recipe, what: str) -> None:
    """Raise :class:`UserError` naming the first key that makes ``asked`` another run than ``saved``.

    Where the learning rate follows a curve of known length from the start (cosine), the length is part of it.
    """
    allowed = {Effect.HARMLESS, Effect.LENGTH} if saved.plan.can_branch else {Effect.HARMLESS}
    for key, before, after in changes(saved, asked, allowed=allowed):
        raise UserError(
            f"{key} was {before!r} when {what} was trained and cannot become {after!r}: start a new run"
        )
    both = min(saved.trunk_steps, asked.trunk_steps)
    if Effect.LENGTH in allowed and saved.plan.until(both) != asked.plan.until(both):
        raise UserError(
            f"stages are not those that {what} was trained by, within their first {both} steps: start a new run"
        )


def changes(one: Recipe, other: Recipe, *, allowed: set[Effect]) -> Iterator[tuple[str, Any, Any]]:
    """(key, value in ``one``, value in ``other``) of every difference whose effect is not ``allowed``."""
    effects = dict(effects_of(Recipe))
    before, after = dict(_leaves(one)), dict(_leaves(other))
    for key in {**before, **after}:
        if before.get(key) != after.get(key) and _effect(key, effects) not in allowed:
            yield key, before.get(key), after.get(key)


def recipe_key(recipe: Recipe, *, ignore: set[Effect], keep: Collection[str] = ()) -> str:
    """A short hash of all that distinguishes a recipe but the keys of the effects to ``ignore``; of those, ``keep``."""
    effects = dict(effects_of(Recipe))
    leaves = {
        key: value for key, value in _leaves(recipe) if _effect(key, effects) not in ignore or key in keep
    }
    text = json.dumps(leaves, sort_keys=True, default=lambda value: getattr(value, "path", str(value)))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _effect(key: str, effects: Mapping[str, Effect]) -> Effect:
    """A key's effect, or that of the section it is in: an objective may have keys that the first one has not."""
    while key not in effects:
        key = key.rpartition(".")[0]
    return effects[key]


def effects_of(section: type[BaseModel], prefix: str = "", default: Effect | None = None) -> Iterator[Any]:
    """(dotted key, :class:`Effect`) of every key of a recipe; a key without a mark has its section's."""
    for name, field in section.model_fields.items():
        marks = [mark for mark in field.metadata if isinstance(mark, Effect)]
        effect = marks[0] if marks else default
        yield f"{prefix}{name}", effect
        for inner in sections_of(section, name):
            yield from effects_of(inner, f"{prefix}{name}.", effect)


def _leaves(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in a recipe; a mixture as the names and weights of its sets."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{prefix}{name}.")
        elif name in ("stable", "decay", "sources"):
            yield f"{prefix}{name}", by_name(value)
        elif name == "stages":
            yield name, [dict(_leaves(stage)) for stage in value]
        else:
            yield f"{prefix}{name}", value
