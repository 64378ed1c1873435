"""Reading recipes from TOML and ``--set``, and writing resolved ones.

A key that no recipe has is refused with the name of the nearest one that exists.
"""

from __future__ import annotations

import copy
import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import BaseModel, ValidationError

from minicpm_edge.errors import UserError
from minicpm_training.recipe.schema import Recipe

# Keys of earlier versions, which stand in the recipes of runs → the same today.
RENAMED = {"optimizer.z_loss": "objective.z_loss"}


def load_recipe(
    source: str | Mapping[str, Any] | None, settings: Sequence[str] = (), *, warmup_tokens: int | None = None
) -> Recipe:
    """The recipe of a TOML file, of a shipped name or of parsed entries, with ``--set`` applied.

    ``source`` None starts from the defaults alone; ``warmup_tokens`` serves where the recipe names none. Raises
    :class:`UserError` for a file that is missing or is not TOML, for an unknown key and for a value out of range.
    """
    origin = source if isinstance(source, str) else "recipe"
    entries = _read(source) if isinstance(source, str) else copy.deepcopy(dict(source or {}))
    if isinstance(source, str):
        entries.setdefault("name", _default_name(source))
    _rename(entries)
    for setting in settings:
        _apply(entries, setting)
    if warmup_tokens is not None and isinstance(schedule := entries.get("schedule"), dict):
        schedule.setdefault("warmup_tokens", warmup_tokens)
    return parse_recipe(entries, origin=origin)


def saved_recipe(path: Path) -> Recipe:
    """The resolved recipe in a run's or a decay's folder."""
    return load_recipe(str(path))


def parse_recipe(entries: Mapping[str, Any], *, origin: str) -> Recipe:
    """Validate parsed TOML and settle what a recipe leaves open (the length of warm-up).

    Raises :class:`UserError` for an unknown key and for a value out of range.
    """
    _refuse_unknown_keys(entries, origin)
    try:
        recipe = Recipe.model_validate(entries)
    except ValidationError as error:
        raise UserError(f"{origin}: {_first_problem(error)}") from None
    if recipe.schedule.warmup_tokens is None:
        # Written down once, so that a longer trunk does not change a warm-up that has already been run.
        first_tokens = recipe.stages[0].tokens if recipe.stages else recipe.schedule.stable_tokens or 0
        warmup_tokens = recipe.warmup_steps * recipe.plan.stages[0].batch_tokens
        recipe = recipe.with_changes(schedule={"warmup_tokens": min(first_tokens, warmup_tokens)})
    return recipe


def with_settings(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with other values, by dotted key; None leaves a key to its default.

    Raises:
        UserError: for an unknown key and for a value out of range.
    """
    entries = recipe.model_dump(mode="json", exclude_none=True)
    for key, value in settings.items():
        *parents, last = key.split(".")
        table = entries
        for parent in parents:
            table = table.setdefault(parent, {})
        if value is None:
            table.pop(last, None)
        else:
            table[last] = value
    return parse_recipe(entries, origin=recipe.name or "recipe")


def shipped_recipes() -> list[str]:
    """Names of the recipes inside the package."""
    folder = files("minicpm_training") / "recipes"
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML that reads back equal; keys that are unset are left out."""
    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


def _read(source: str) -> dict[str, Any]:
    path = Path(source)
    if not path.is_file() and source in shipped_recipes():
        text = (files("minicpm_training") / "recipes" / f"{source}.toml").read_text(encoding="utf-8")
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            known = ", ".join(shipped_recipes())
            raise UserError(f"no recipe file {source!r}; shipped recipes: {known}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"recipe {source} cannot be read: {error}") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"recipe {source} is not TOML: {error}") from None


def _rename(entries: dict[str, Any]) -> None:
    """Give the keys of an earlier version their present names, where those are not given as well."""
    for old, new in RENAMED.items():
        (section, key), (new_section, new_key) = old.split("."), new.split(".")
        table, new_table = entries.get(section), entries.setdefault(new_section, {})
        if isinstance(table, dict) and isinstance(new_table, dict) and key in table:
            new_table.setdefault(new_key, table.pop(key))


def _default_name(source: str) -> str:
    path = Path(source)
    return path.parent.name if path.name == "recipe.toml" else path.name.removesuffix(".toml")


def _apply(entries: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise UserError(f"--set {setting!r} is not of the form section.key=value")
    key = RENAMED.get(key, key)
    *parents, last = key.split(".")
    table = entries
    for parent in parents:
        inner = table.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise UserError(f"--set {key}: {parent!r} is a value, not a section")
        table = inner
    table[last] = _parse_value(key, text.strip())


def _parse_value(key: str, text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
        if len(parsed) == 1:  # a line break could smuggle in a second key
            return parsed["value"]
        raise UserError(f"--set {key}: {text!r} is more than one value")
    except tomllib.TOMLDecodeError as error:
        # A shell eats the quotes of `--set precision="fp32"`: a bare word is a string.
        if text and text[0] not in "\"'[{" and "\n" not in text:
            return text
        raise UserError(f"--set {key}: {text!r} is not a TOML value: {error}") from None


def _refuse_unknown_keys(entries: Mapping[str, Any], origin: str) -> None:
    known = list(_known_keys(Recipe, ""))
    for key in _given_keys(entries, [Recipe], ""):
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = (
                f"did you mean {nearest[0]!r}?" if nearest else f"sections: {', '.join(Recipe.model_fields)}"
            )
            raise UserError(f"{origin}: unknown key {key!r}; {hint}")


def sections_of(model: type[BaseModel], key: str) -> list[type[BaseModel]]:
    """The sections that a key may hold (directly, as the element of a list, or as one of several kinds)."""
    annotation = model.model_fields[key].annotation
    candidates = (annotation, *get_args(annotation))
    return [item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)]


def _known_keys(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for key in model.model_fields:
        yield prefix + key
        for section in sections_of(model, key):
            yield from _known_keys(section, f"{prefix}{key}.")


def _given_keys(entries: Mapping[str, Any], models: Sequence[type[BaseModel]], prefix: str) -> Iterator[str]:
    """Dotted names of all that is given; below a key that no section knows, all of its keys."""
    for key, value in entries.items():
        known = [model for model in models if key in model.model_fields]
        sections = [section for model in known for section in sections_of(model, key)]
        tables = [
            table for table in (value if isinstance(value, list) else [value]) if isinstance(table, dict)
        ]
        if known or not any(tables):
            yield prefix + key
        if sections or not known:
            for table in tables:
                yield from _given_keys(table, sections, f"{prefix}{key}.")


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"{key} is missing: give it in the recipe or with --set {key}=…"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{key} is {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
