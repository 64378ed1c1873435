"""Next-token cross-entropy within documents: pre-training, and on masked chats supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Callable

import torch

from minicpm_edge.model.transformer import MiniCPM
from minicpm_edge.text.tokenizer import Tokenizer
from minicpm_training.data.packed_batch import PackedBatch
from minicpm_training.data.packed_dataloader import PackedDataloader, open_packed
from minicpm_training.objectives.base import Losses
from minicpm_training.recipe.schema import Recipe


class NextToken:
    """``objective.kind = "next-token"``."""

    def dataloader(self, recipe: Recipe, tokenizer: Tokenizer) -> PackedDataloader:
        """Packed documents of the stages' mixtures."""
        return open_packed(recipe, tokenizer)

    def objective(
        self, recipe: Recipe, model: MiniCPM, reference: Callable[[], MiniCPM]
    ) -> Callable[[PackedBatch], Losses]:
        """As :func:`next_token`; the reference is not needed."""
        return next_token(model, z_loss=recipe.objective.z_loss, compile_model=recipe.compile)


def next_token(
    model: MiniCPM, *, z_loss: float = 0.0, compile_model: bool = False
) -> Callable[[PackedBatch], Losses]:
    """In nats, summed over the batch's targets; ``loss`` is without the z-loss and the routers' losses.

    ``compile_model`` traces the model's loss with ``torch.compile``; the number of documents stays dynamic.
    """
    model_loss = torch.compile(model.loss) if compile_model else model.loss

    def losses(batch: PackedBatch) -> Losses:
        loss = model_loss(
            batch.input_ids_BT,
            batch.targets_BT,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
            z_loss=z_loss,
        )
        return Losses(total=loss.total, metrics={"loss": loss.cross_entropy})

    return losses
