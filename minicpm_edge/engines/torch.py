"""torch on the CPU: runs a checkpoint or Hugging Face folder as it was trained, in float32.

Legend: B batch (1 here), T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from minicpm_edge.engines.base import Cancelled, resolve_context_length
from minicpm_edge.engines.folder import load_tokenizer, stop_token_ids
from minicpm_edge.engines.pooling import unit_vector
from minicpm_edge.engines.prompt_cache import PromptCache
from minicpm_edge.engines.sampling import Sampler
from minicpm_edge.engines.sampling_params import SamplingParams
from minicpm_edge.formats.checkpoint import load_checkpoint
from minicpm_edge.model.attention import KVCache
from minicpm_edge.model.transformer import MiniCPM

BATCH = 256


class TorchRunner:
    """One folder in torch. See :class:`~minicpm_edge.engines.base.ModelRunner`."""

    backend = "torch"

    def __init__(self, folder: Path, *, context_length: int | None, threads: int) -> None:
        torch.set_num_threads(threads)
        model = load_checkpoint(folder)
        config = model.config
        self.context_length = resolve_context_length(context_length, config.max_position_embeddings, folder)
        self.vocabulary = load_tokenizer(folder)
        self.stop_token_ids = stop_token_ids(folder, self.vocabulary)
        self._loaded: tuple[MiniCPM, KVCache] | None = (model, KVCache(config, 1, self.context_length))
        self._prompts = PromptCache(BATCH)

    def tokens(self, prompt: Sequence[int], params: SamplingParams, cancelled: Cancelled) -> Generator[int]:
        """See :meth:`minicpm_edge.engines.base.ModelRunner.tokens`."""
        start = self._prompts.usable(prompt)
        _, cache = self._open()
        cache.truncate(start)
        sampler, logits_V = Sampler(params), np.zeros(0, np.float32)
        for _, batch in self._prompts.batches(prompt, start):
            if cancelled():
                return
            logits_V = self._logits(batch)
        for _ in range(len(prompt), self.context_length):
            token = sampler(logits_V)
            yield token
            if cancelled():
                return
            logits_V = self._logits([token])

    def embed(self, tokens: Sequence[int]) -> list[float]:
        """See :meth:`minicpm_edge.engines.base.ModelRunner.embed`."""
        model, _ = self._open()
        with torch.inference_mode():
            states_BTD = model.hidden(torch.tensor([list(tokens)]))
            return unit_vector(states_BTD[0].sum(dim=0).numpy())

    def close(self) -> None:
        """Free the weights and the cache."""
        self._loaded = None
        self._prompts.clear()

    def _open(self) -> tuple[MiniCPM, KVCache]:
        assert self._loaded is not None, "the engine does not use a closed runner"
        return self._loaded

    def _logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append ``tokens`` to the cache; logits (V,) after the last, without ids the tokenizer does not know."""
        model, cache = self._open()
        with torch.inference_mode():
            states_BTD = model.hidden(torch.tensor([list(tokens)]), cache=cache)
            logits_V: NDArray[np.float32] = model.logits(states_BTD[0, -1]).numpy()
        return logits_V[: self.vocabulary.vocab_size]
