"""Continuing a few prompts during training, to see what the loss means."""

from __future__ import annotations

import torch

from minicpm_edge.model.attention import KVCache
from minicpm_edge.model.transformer import MiniCPM
from minicpm_edge.text.tokenizer import Tokenizer
from minicpm_training.parallel.process_group import broadcast_from_rank0


@torch.no_grad()  # not inference_mode: what FSDP gathers here is trained on later
def complete(model: MiniCPM, tokenizer: Tokenizer, prompt: str, *, max_tokens: int) -> str:
    """The greedy continuation of a prompt at the start of a document, without the prompt.

    Ends at the end of a document, after ``max_tokens``, or where the trained context is full. Draws no random
    numbers, so that a run with samples is the same run.
    """
    ids = tokenizer.encode(prompt, bos=True)
    room = min(max_tokens, model.config.max_position_embeddings - len(ids))
    device = model.embedding.weight.device
    cache = KVCache(model.config, 1, len(ids) + max(0, room), device=device)
    new_ids: list[int] = []
    input_ids_BT = torch.tensor([ids], device=device)
    while len(new_ids) < room:
        next_id = int(broadcast_from_rank0(model(input_ids_BT, cache=cache)[0, -1].argmax().item))
        if next_id in tokenizer.stop_ids:
            break
        new_ids.append(next_id)
        input_ids_BT = torch.tensor([[next_id]], device=device)
    return tokenizer.decode_raw(new_ids)
