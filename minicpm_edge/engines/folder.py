"""What engines read from a model folder beside its weights: tokenizer, stop tokens, context length."""

from __future__ import annotations

from pathlib import Path

from minicpm_edge.errors import UserError
from minicpm_edge.formats.generation import read_generation
from minicpm_edge.json_file import read_json
from minicpm_edge.text.chatml import chatml_for
from minicpm_edge.text.tokenizer import Tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer, with ChatML for a template where it has none but has the tokens.

    Raises:
        UserError: where there is none, it is broken, or it has more tokens than the model has embeddings.
    """
    tokenizer = Tokenizer.load(folder)
    num_embeddings = read_json(folder / "config.json", missing_ok=True).get("vocab_size")
    if isinstance(num_embeddings, int):
        tokenizer.check_fits(num_embeddings, folder)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = chatml_for(tokenizer.special_tokens)
    return tokenizer


def stop_token_ids(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """Ids at which generation ends: the tokenizer's, and those that config.json and generation_config.json name."""
    return frozenset(read_generation(folder, tokenizer).stop_ids)


def trained_context(folder: Path) -> int:
    """``max_position_embeddings`` of the folder's config.json."""
    length = read_json(folder / "config.json", missing_ok=True).get("max_position_embeddings")
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise UserError(f"{folder / 'config.json'} must give max_position_embeddings, the context length")
    return length
