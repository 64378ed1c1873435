"""Tokens that a folder's settings add, or mark as special, beside what its tokenizer file says of them.

A published tokenizer names its special tokens in up to four files. `transformers` takes them all, the settings before
the tokenizer file; so does this.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minicpm_edge.json_file import read_json
from minicpm_edge.text.chatml import CHATML_TOKENS

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
LISTS = ("additional_special_tokens", "extra_special_tokens")
# The tokens of ChatML, and those at which llama.cpp ends an answer in any model that has them: there they are control
# tokens whatever the file says. Text of a user's must not spell them.
TURN_TOKENS = (
    *CHATML_TOKENS,
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
)
DEFAULTS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def declared_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Text → entry of a tokenizer.json's ``added_tokens``, without ``id`` where the folder gives none.

    Among them are special tokens that the vocabulary may not have.

    Args:
        folder: where ``added_tokens.json`` and ``special_tokens_map.json`` are looked for.
        config: the content of ``tokenizer_config.json``.

    Raises:
        UserError: for a file that is not JSON.
    """
    declared: dict[str, dict[str, Any]] = {}
    for content, index in read_json(folder / "added_tokens.json", missing_ok=True).items():
        if isinstance(index, int):
            declared[content] = {**DEFAULTS, "id": index, "content": content, "special": False}
    decoder = config.get("added_tokens_decoder")
    for index, entry in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and index.isdecimal():
            known = {key: bool(entry[key]) for key in (*DEFAULTS, "special") if key in entry}
            content = entry["content"]
            declared[content] = {**DEFAULTS, "special": False, **known, "id": int(index), "content": content}
    special_map = read_json(folder / "special_tokens_map.json", missing_ok=True)
    for content in (*TURN_TOKENS, *_named(special_map), *_named(config)):
        declared[content] = {**DEFAULTS, "content": content, **declared.get(content, {}), "special": True}
    return declared


def _named(settings: Mapping[str, Any]) -> Iterator[str]:
    lists = [settings.get(name) for name in LISTS]
    values = [settings.get(name) for name in NAMED]
    for value in values + [entry for entries in lists if isinstance(entries, list) for entry in entries]:
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str) and content:
            yield content


def add_declared(definition: str, declared: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of a tokenizer.json with these tokens among its added ones; unchanged where it has them all."""
    content: dict[str, Any] = json.loads(definition)
    vocab = content["model"]["vocab"]
    # Unigram models list (token, score) pairs by id.
    ids = vocab if isinstance(vocab, dict) else {token: index for index, (token, _) in enumerate(vocab)}
    added = {token["content"]: token for token in content.get("added_tokens") or ()}
    changed = False
    for text, token in declared.items():
        index = added[text]["id"] if text in added else ids.get(text, token.get("id"))
        if index is None or (text in added and added[text]["special"] == token["special"]):
            continue
        kept = {key: value for key, value in added.get(text, token).items() if key != "special"}
        added[text] = {**kept, "id": index, "special": token["special"]}
        changed = True
    if not changed:
        return definition
    content["added_tokens"] = sorted(added.values(), key=lambda token: int(token["id"]))
    return json.dumps(content, ensure_ascii=False)
