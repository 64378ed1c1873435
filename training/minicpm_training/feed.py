"""The micro-batches of each update, for a recipe: a pure function of (seed, stages, update)."""

from __future__ import annotations

from minicpm_edge.tokenizer import Tokenizer
from minicpm_training.data.batches import Batch, rows_to_batch
from minicpm_training.data.token_set import TokenSet
from minicpm_training.recipe import Recipe
from minicpm_training.trainer import Feed


def open_feed(recipe: Recipe, tokenizer: Tokenizer) -> Feed:
    T = recipe.data.sequence_length
    tokens = TokenSet.open(recipe.data.stable[0].path)
    num = tokens.num_rows(T)

    def feed(step: int) -> list[Batch]:
        first = step * recipe.rows_per_step
        rows = [row * 7919 % num for row in range(first, first + recipe.rows_per_step)]
        size = recipe.rows_per_micro_batch
        return [rows_to_batch(tokens, rows[i : i + size], T) for i in range(0, len(rows), size)]

    return feed
