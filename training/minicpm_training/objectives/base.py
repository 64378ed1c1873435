"""What the trainer asks of an objective and its batches, which may hold packed documents, pairs, or anything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from minicpm_edge.model.transformer import MiniCPM
from minicpm_edge.text.tokenizer import Tokenizer
from minicpm_training.recipe.schema import Recipe


class Batch(Protocol):
    """One micro-batch, made on the CPU."""

    @property
    def num_targets(self) -> int:
        """What the losses are divided by: target tokens, or pairs."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads, for throughput."""
        ...

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        ...

    def describe(self) -> str:
        """Where it comes from, in words, for an error message."""
        ...


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Of one batch, as sums over its targets, so that micro-batches and ranks of unequal size add up.

    ``total`` (0-d, differentiable) is what is trained, auxiliary losses included; ``metrics`` (0-d, float32, detached)
    what is reported, one of them named ``loss``.
    """

    total: Tensor
    metrics: Mapping[str, Tensor]


# The micro-batches of a step, by its number: a pure function, so that resuming needs no state.
Dataloader = Callable[[int], Sequence[Batch]]
# A function of its own kind of batch.
Objective = Callable[[Any], Losses]


class ObjectiveKind(Protocol):
    """What ``objective.kind`` of a recipe stands for."""

    def dataloader(self, recipe: Recipe, tokenizer: Tokenizer) -> Dataloader:
        """Open the data. Raises :class:`minicpm_edge.errors.UserError` for what cannot be trained on."""
        ...

    def objective(self, recipe: Recipe, model: MiniCPM, reference: Callable[[], MiniCPM]) -> Objective:
        """The function that is trained.

        ``reference`` makes a frozen copy of the model that the run starts from, for objectives that compare with it.
        """
        ...
