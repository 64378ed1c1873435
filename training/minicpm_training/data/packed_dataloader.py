"""The dataloader of packed documents: the micro-batches of each step, a pure function of (seed, stages, step).

Resuming needs one integer; a stage of another batch size or sequence length needs no state either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from minicpm_edge.errors import UserError
from minicpm_edge.text.tokenizer import Tokenizer
from minicpm_training.data.mixture import Mixture, MixtureSampler
from minicpm_training.data.packed_batch import PackedBatch, packed_batch
from minicpm_training.data.tokenized_dataset import TokenizedDataset
from minicpm_training.parallel import process_group
from minicpm_training.recipe.plan import Plan
from minicpm_training.recipe.schema import Recipe


def open_packed(recipe: Recipe, tokenizer: Tokenizer) -> PackedDataloader:
    """The recipe's batches.

    Raises:
        UserError: for a set that is missing, damaged, too short, or of another tokenizer.
    """
    paths = dict.fromkeys(source.path for stage in recipe.plan.stages for source in stage.sources)
    datasets = {path: _open(path, tokenizer) for path in paths}
    return PackedDataloader(
        plan=recipe.plan,
        sampler=mixture_sampler(recipe, datasets),
        datasets=datasets,
        micro_batch_tokens=recipe.micro_batch_tokens,
    )


def mixture_sampler(recipe: Recipe, datasets: Mapping[str, TokenizedDataset]) -> MixtureSampler:
    """Which sequences the recipe's stages take of the sets (by path)."""
    stages = recipe.plan.stages
    return MixtureSampler(
        seed=recipe.seed,
        stages=[
            Mixture(
                num_sequences=stage.num_steps * stage.sequences_per_step,
                sequence_length=stage.sequence_length,
                weights=tuple((source.path, source.weight) for source in stage.sources),
            )
            for stage in stages
        ],
        num_sequences={
            (source.path, stage.sequence_length): datasets[source.path].num_sequences(stage.sequence_length)
            for stage in stages
            for source in stage.sources
        },
    )


@dataclass(frozen=True, kw_only=True)
class PackedDataloader:
    """The micro-batches of a step, by its number: of the step's sequences, this rank's share."""

    plan: Plan
    sampler: MixtureSampler
    datasets: Mapping[str, TokenizedDataset]  # by path
    micro_batch_tokens: int

    def __call__(self, step: int) -> list[PackedBatch]:
        stage = self.plan.at(step)
        per_rank = stage.sequences_per_step // process_group.world_size()
        start = self._first_positions[stage.first_step] + (step - stage.first_step) * stage.sequences_per_step
        start += process_group.rank() * per_rank
        at_once = stage.sequences_per_micro_batch(self.micro_batch_tokens)
        return [
            self.batch(first, min(at_once, start + per_rank - first))
            for first in range(start, start + per_rank, at_once)
        ]

    def batch(self, start: int, count: int) -> PackedBatch:
        """The batch of the sequences at positions [start, start + count), counted over all stages."""
        samples = self.sampler.samples(start, count)
        sequences = [(self.datasets[sample.source], sample.index) for sample in samples]
        return packed_batch(sequences, samples[0].sequence_length)

    @cached_property
    def _first_positions(self) -> dict[int, int]:
        """The position of each stage's first sequence, by the stage's first step."""
        positions, position = {}, 0
        for stage in self.plan.stages:
            positions[stage.first_step] = position
            position += stage.num_steps * stage.sequences_per_step
        return positions


def _open(path: str, tokenizer: Tokenizer) -> TokenizedDataset:
    dataset = TokenizedDataset.open(Path(path))
    if dataset.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(f"{path} was prepared with another tokenizer than data.tokenizer: prepare it again")
    return dataset
