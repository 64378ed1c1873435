"""What engines read from a model folder beside its weights: tokenizer, end tokens, context length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minicpm_edge.errors import UserError
from minicpm_edge.text.chatml import chatml_for
from minicpm_edge.text.tokenizer import Tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer, with ChatML for a template where it has none but has the tokens."""
    tokenizer = Tokenizer.load(folder)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = chatml_for(tokenizer.special_tokens)
    return tokenizer


def end_ids(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """Ids at which generation ends: the tokenizer's, and those that config.json and generation_config.json name."""
    ids = set(tokenizer.stop_ids)
    for name in ("config.json", "generation_config.json"):
        named = read_settings(folder / name).get("eos_token_id")
        ids.update(
            token for token in (named if isinstance(named, list) else [named]) if isinstance(token, int)
        )
    return frozenset(ids)


def trained_context(folder: Path) -> int:
    """``max_position_embeddings`` of the folder's config.json."""
    length = read_settings(folder / "config.json").get("max_position_embeddings")
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise UserError(f"{folder / 'config.json'} must give max_position_embeddings, the context length")
    return length


def read_settings(file: Path) -> dict[str, Any]:
    """A JSON object from ``file``; empty where there is no such file."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{file} must hold a JSON object")
    return settings
