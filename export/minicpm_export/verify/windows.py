"""The held-out text that a certificate is computed on, cut into windows of tokens.

In order of preference: a file that the user names, the validation set of the run the model comes from, and a text of
8 kB in this package (prose, questions and answers, code, letters, four languages; written for it, so that no
training corpus contains it).
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from minicpm_edge.errors import UserError
from minicpm_edge.json_file import read_json
from minicpm_edge.model.config import ModelConfig
from minicpm_edge.text.tokenizer import Tokenizer

NUM_WINDOWS, WINDOW_LENGTH = 8, 512
MIN_TOKENS = 64
MAX_TEXT_BYTES = 1 << 20  # more than eight windows need, whatever the language


@dataclass(frozen=True, kw_only=True)
class Window:
    """Token ids of one window, and the token that really followed each (-1 after the last token of the text)."""

    ids: list[int]
    targets: list[int]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Where the windows come from, in words for the certificate, and the windows."""

    name: str
    windows: tuple[Window, ...]


def held_out(
    tokenizer: Tokenizer, config: ModelConfig, *, text: Path | None = None, run: Path | None = None
) -> HeldOut:
    """At most 8 windows of at most 512 tokens, each beginning with the begin token.

    Raises:
        UserError: for a text file that cannot be read or is too short.
    """
    length = min(WINDOW_LENGTH, config.max_position_embeddings)
    if text is not None:
        return HeldOut(name=str(text), windows=_cut(_encode(tokenizer, _read(text), text), tokenizer, length))
    validation = _validation_tokens(run, config) if run is not None else None
    if validation is not None:
        name, tokens = validation
        return HeldOut(name=name, windows=_cut(tokens, tokenizer, length))
    return HeldOut(name="built-in text", windows=_cut(tokenizer.encode(built_in_text()), tokenizer, length))


def built_in_text() -> str:
    """The text that this package carries."""
    return (files("minicpm_export") / "verify" / "held_out.txt").read_text(encoding="utf-8")


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEXT_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read as held-out text ({error.strerror})") from None
    if b"\0" in data:
        raise UserError(f"{path}: not a text file; --text takes UTF-8 text or .jsonl")
    text = data.decode("utf-8", "replace")
    return "\n\n".join(_texts(text)) if path.suffix == ".jsonl" else text


def _texts(lines: str) -> Iterator[str]:
    """The ``text`` of each JSON line; other lines (the last one may be cut off) are passed over."""
    for line in lines.split("\n"):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and isinstance(entry.get("text"), str):
            yield entry["text"]


def _encode(tokenizer: Tokenizer, text: str, path: Path) -> list[int]:
    tokens = tokenizer.encode(text)
    if len(tokens) < MIN_TOKENS:
        raise UserError(
            f"{path}: only {len(tokens)} tokens of text; a certificate needs at least {MIN_TOKENS}"
        )
    return tokens


def _cut(tokens: Sequence[int], tokenizer: Tokenizer, length: int) -> tuple[Window, ...]:
    step = max(1, length - 1)  # one place goes to the begin token
    windows = []
    for start in range(0, min(len(tokens), NUM_WINDOWS * step), step):
        following = list(tokens[start : start + length])
        ids = [tokenizer.bos_id, *following[:step]]
        following += [-1] * (len(ids) - len(following))
        # What follows the end of a document is another document: nothing that a model could know.
        targets = [-1 if ids[at] == tokenizer.eos_id else token for at, token in enumerate(following)]
        windows.append(Window(ids=ids, targets=targets))
    return tuple(windows)


def _validation_tokens(run: Path, config: ModelConfig) -> tuple[str, list[int]] | None:
    """The beginning of the run's first validation set, or None where the run has none or it is gone."""
    recipe = run / "recipe.toml"
    if not recipe.is_file():
        return None
    try:
        sets = tomllib.loads(recipe.read_text(encoding="utf-8")).get("data", {}).get("valid", [])
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return None
    if not sets:
        return None
    folder = Path(sets[0]["path"])
    shards = sorted(folder.glob("tokens-*.bin"))
    if not shards or not (folder / "manifest.json").is_file():
        return None
    dtype = {"uint16": "<u2", "uint32": "<u4"}.get(read_json(folder / "manifest.json").get("dtype", ""))
    if dtype is None:
        return None
    tokens = np.fromfile(shards[0], dtype=dtype, count=NUM_WINDOWS * WINDOW_LENGTH)
    if len(tokens) < MIN_TOKENS or int(tokens.max()) >= config.vocab_size:
        return None
    return f"validation set {folder.name}", tokens.astype(int).tolist()
