"""Validation loss in bits per byte: what a model needs to write down held-out text, whatever its tokenizer.

bits per byte = cross-entropy in nats / ln 2 / UTF-8 bytes of the text predicted.

Legend: B batch, T time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minicpm_edge.errors import UserError
from minicpm_edge.model.transformer import MiniCPM
from minicpm_edge.text.tokenizer import Tokenizer
from minicpm_training.data.packed_batch import packed_batch
from minicpm_training.data.tokenized_dataset import TokenizedDataset
from minicpm_training.parallel import process_group
from minicpm_training.recipe.schema import Recipe
from minicpm_training.recipe.sections import ValidationSet

BATCH_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class ValidationResult:
    """Sums over the tokens that were predicted. ``num_bytes`` is the text they stand for."""

    cross_entropy: float
    num_tokens: int
    num_bytes: float

    @property
    def bits_per_byte(self) -> float:
        return self.cross_entropy / math.log(2.0) / self.num_bytes

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.cross_entropy / self.num_tokens

    @property
    def perplexity(self) -> float:
        """Per token; infinite where it has no float."""
        return math.exp(self.loss) if self.loss < 700.0 else math.inf

    def to_dict(self) -> dict[str, float]:
        """Everything, for ``--json``."""
        return {
            "bits_per_byte": self.bits_per_byte,
            "perplexity": self.perplexity,
            "loss": self.loss,
            "num_tokens": self.num_tokens,
            "num_bytes": self.num_bytes,
        }


@dataclass(frozen=True, kw_only=True)
class Validation:
    """A held-out set and the sequences of it to measure: all of them, or ``max_tokens`` spread evenly over it.

    The bytes are the set's own count, shared out by the bytes of the tokens that are predicted, so that whole sets
    have exactly their text's bytes and parts their part.
    """

    name: str
    tokens: TokenizedDataset
    token_bytes: np.ndarray[tuple[int], np.dtype[np.int64]]
    sequence_length: int
    sequences: tuple[int, ...]
    bytes_per_token_byte: float

    @classmethod
    def open(
        cls,
        folder: Path,
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        max_tokens: int | None = None,
        name: str = "",
    ) -> Validation:
        """Open a tokenized dataset.

        Raises:
            UserError: where it is of another tokenizer, or holds no whole sequence.
        """
        tokens = TokenizedDataset.open(folder)
        if tokens.tokenizer_sha256 != tokenizer.sha256:
            raise UserError(
                f"{folder} was prepared with another tokenizer: prepare it again with the model's own"
            )
        sequence_length = min(sequence_length, tokens.num_tokens - 1)
        num_sequences = tokens.num_sequences(sequence_length)
        if num_sequences < 1:
            raise UserError(f"{folder} has {tokens.num_tokens} tokens, too few to measure on")
        wanted = (
            num_sequences if max_tokens is None else min(num_sequences, max(1, max_tokens // sequence_length))
        )
        table = np.array([len(tokenizer.token_bytes(index)) for index in range(tokenizer.vocab_size)])
        total = sum(int(table[part].sum()) for part in tokens.parts())
        return cls(
            name=name or folder.name,
            tokens=tokens,
            token_bytes=table,
            sequence_length=sequence_length,
            sequences=tuple(index * num_sequences // wanted for index in range(wanted)),
            bytes_per_token_byte=tokens.num_bytes / max(1, total),
        )

    def measure(
        self, model: MiniCPM, autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> ValidationResult:
        """The model's loss on the sequences, within documents. Leaves the model's mode as it was.

        Several processes measure a batch each at a time, and add up.
        """
        device = model.embedding.weight.device
        at_once = max(1, BATCH_TOKENS // self.sequence_length)
        cross_entropy, num_tokens, num_bytes = 0.0, 0, 0
        was_training = model.training
        model.eval()
        with torch.no_grad(), autocast():
            last = len(self.sequences) - 1
            for first in range(0, len(self.sequences), at_once * process_group.world_size()):
                start = first + at_once * process_group.rank()
                sequences = self.sequences[start : start + at_once]
                # All processes take part in every forward, those that have no sequences left with the last one.
                chosen = sequences or self.sequences[last:]
                batch = packed_batch([(self.tokens, index) for index in chosen], self.sequence_length)
                targets = batch.targets_BT[batch.targets_BT >= 0].numpy()
                on_device = batch.to(device)
                loss = model.loss(
                    on_device.input_ids_BT,
                    on_device.targets_BT,
                    cu_seqlens=on_device.cu_seqlens,
                    max_seqlen=on_device.max_seqlen,
                )
                if sequences:
                    cross_entropy += float(loss.cross_entropy)
                    num_tokens += targets.size
                    num_bytes += int(self.token_bytes[targets].sum())
        model.train(was_training)
        return ValidationResult(
            cross_entropy=process_group.all_reduce_sum(cross_entropy),
            num_tokens=process_group.all_reduce_sum(num_tokens),
            num_bytes=process_group.all_reduce_sum(num_bytes) * self.bytes_per_token_byte,
        )


def open_validation(entry: ValidationSet, recipe: Recipe, tokenizer: Tokenizer) -> Validation:
    """A recipe's validation set."""
    return Validation.open(
        Path(entry.path),
        tokenizer,
        sequence_length=recipe.data.sequence_length,
        max_tokens=recipe.evaluation.tokens,
        name=entry.label,
    )
