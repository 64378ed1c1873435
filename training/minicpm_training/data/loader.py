"""The micro-batches of each update, for a recipe: a pure function of (seed, stages, update)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from minicpm_edge.errors import UserError
from minicpm_edge.text.tokenizer import Tokenizer
from minicpm_training import distributed
from minicpm_training.data.batches import Batch, BatchStream
from minicpm_training.data.mixture import RowPlan, Stage
from minicpm_training.data.token_set import TokenSet
from minicpm_training.recipe.schema import Recipe, Source
from minicpm_training.trainer import Feed


def open_feed(recipe: Recipe, tokenizer: Tokenizer) -> Feed:
    """The recipe's batches: of each update's rows, this process's share.

    Raises :class:`UserError` for a set that is missing, damaged, too short, or of another tokenizer.
    """
    length = recipe.data.sequence_length
    stages = [_stage(recipe.data.stable, recipe.trunk_steps * recipe.rows_per_step)]
    if recipe.schedule.decay_tokens:
        num_decay_steps = recipe.total_steps - recipe.trunk_steps
        stages.append(_stage(recipe.data.decay_or_stable, num_decay_steps * recipe.rows_per_step))
    sets = _open_sets((path for stage in stages for path, _ in stage.weights), tokenizer)
    num_rows = {path: tokens.num_rows(length) for path, tokens in sets.items()}
    plan = RowPlan(seed=recipe.seed, stages=stages, num_rows=num_rows)
    stream = BatchStream(sets=sets, plan=plan, sequence_length=length)

    num_own_rows, rank = recipe.rows_per_step // distributed.size(), distributed.rank()

    def feed(step: int) -> list[Batch]:
        start = step * recipe.rows_per_step + rank * num_own_rows
        end = start + num_own_rows
        starts = range(start, end, recipe.rows_per_micro_batch)
        return [stream.batch(start, min(recipe.rows_per_micro_batch, end - start)) for start in starts]

    return feed


def _stage(sources: tuple[Source, ...], num_rows: int) -> Stage:
    return Stage(num_rows=num_rows, weights=tuple((source.path, source.weight) for source in sources))


def _open_sets(paths: Iterable[str], tokenizer: Tokenizer) -> dict[str, TokenSet]:
    sets: dict[str, TokenSet] = {}
    for path in paths:
        if path not in sets:
            tokens = TokenSet.open(Path(path))
            if tokens.tokenizer_sha256 != tokenizer.sha256:
                raise UserError(
                    f"{path} was prepared with another tokenizer than data.tokenizer: prepare it again"
                )
            sets[path] = tokens
    return sets
