"""What a batch is trained for: each objective is a function from a batch to the loss's sums."""

from __future__ import annotations

from collections.abc import Callable

import torch

from minicpm_edge.model.transformer import Loss, MiniCPM
from minicpm_training.data.batches import Batch

Objective = Callable[[Batch], Loss]


def pretraining(model: MiniCPM, *, z_loss: float = 0.0, compile_model: bool = False) -> Objective:
    """Next-token cross-entropy within documents, in nats summed over the batch's targets.

    ``compile_model`` traces the model's loss with ``torch.compile``; the number of documents stays dynamic.
    """
    model_loss = torch.compile(model.loss) if compile_model else model.loss

    def objective(batch: Batch) -> Loss:
        return model_loss(
            batch.input_ids_BT,
            batch.targets_BT,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
            z_loss=z_loss,
        )

    return objective
