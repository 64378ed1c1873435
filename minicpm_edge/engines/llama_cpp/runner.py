"""One GGUF file in one llama.cpp context, a sequence at a time."""

from __future__ import annotations

import os
import weakref
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minicpm_edge.engines.base import Cancelled, resolve_context_length
from minicpm_edge.engines.llama_cpp.library import first_error, forget_errors, llama, start
from minicpm_edge.engines.llama_cpp.sampler import sampler_chain
from minicpm_edge.engines.llama_cpp.vocabulary import LlamaVocabulary
from minicpm_edge.engines.pooling import unit_vector
from minicpm_edge.engines.prompt_cache import PromptCache
from minicpm_edge.engines.sampling_params import SamplingParams
from minicpm_edge.errors import UserError

BATCH = 128
"""Tokens a call. More is no faster on a CPU, and less of a prompt can be kept for the next."""
DEFAULT_CONTEXT = 8192
"""Context where none is asked for, if the model was trained for as much: the KV cache of more can fill a laptop."""
_ABORTED = 2  # a result of llama_decode


class LlamaCppRunner:
    """One GGUF file in one llama.cpp context. See :class:`~minicpm_edge.engines.base.ModelRunner`.

    Raises:
        UserError: when llama.cpp cannot load the file, or was asked for more context than the model was trained for.
    """

    backend = "llama_cpp"

    def __init__(self, path: Path, *, context_length: int | None, threads: int) -> None:
        start()
        self._model: Any = llama.llama_model_load_from_file(
            os.fsencode(path), llama.llama_model_default_params()
        )
        if not self._model:
            raise UserError(f"llama.cpp cannot load {path}: {first_error()}")
        # Run once: by close(), when the engine is garbage, or at exit.
        self._free_model = weakref.finalize(self, llama.llama_model_free, self._model)
        trained: int = llama.llama_model_n_ctx_train(self._model)
        self.context_length = resolve_context_length(context_length, trained, path, default=DEFAULT_CONTEXT)
        self._context: Any = llama.llama_init_from_model(self._model, self._context_params(threads))
        if not self._context:
            raise UserError(
                f"llama.cpp cannot make a context of {self.context_length} tokens for {path}: {first_error()}; "
                "a smaller context_length needs less memory"
            )
        self._batch = llama.llama_batch_init(BATCH, 0, 1)
        self._free_context = weakref.finalize(self, _free_context, self._context, self._batch)
        self._memory: Any = llama.llama_get_memory(self._context)
        self._prompts = PromptCache(BATCH)
        self.vocabulary = LlamaVocabulary(self._model)

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Every end-of-generation token llama.cpp knows for this file."""
        return self.vocabulary.stop_token_ids

    def tokens(self, prompt: Sequence[int], params: SamplingParams, cancelled: Cancelled) -> Generator[int]:
        """See :meth:`minicpm_edge.engines.base.ModelRunner.tokens`."""
        if not self._prefill(prompt, cancelled):
            return
        with sampler_chain(params) as sampler:
            for position in range(len(prompt), self.context_length):
                token: int = llama.llama_sampler_sample(sampler, self._context, -1)
                yield token
                if cancelled():
                    return
                self._decode([token], position)

    def embed(self, tokens: Sequence[int]) -> list[float]:
        """See :meth:`minicpm_edge.engines.base.ModelRunner.embed`."""
        width: int = llama.llama_model_n_embd(self._model)
        total_D = np.zeros(width)
        self._forget(0)
        llama.llama_set_embeddings(self._context, True)
        try:
            for start in range(0, len(tokens), BATCH):
                batch = tokens[start : start + BATCH]
                self._decode(batch, start, every_output=True)
                for index in range(len(batch)):
                    state = llama.llama_get_embeddings_ith(self._context, index)
                    with np.errstate(invalid="ignore"):  # a damaged file's NaN is reported below
                        total_D += np.ctypeslib.as_array(state, shape=(width,))
        finally:
            llama.llama_set_embeddings(self._context, False)
            self._forget(0)
        return unit_vector(total_D)

    def close(self) -> None:
        """Free the context and the model."""
        self._free_context()
        self._free_model()

    def _context_params(self, threads: int) -> Any:
        params = llama.llama_context_default_params()
        params.n_ctx = self.context_length
        params.n_batch = params.n_ubatch = BATCH
        params.n_seq_max = 1
        params.n_threads = params.n_threads_batch = threads
        params.pooling_type = llama.LLAMA_POOLING_TYPE_NONE  # embed() does its own
        params.no_perf = True
        return params

    def _prefill(self, prompt: Sequence[int], cancelled: Cancelled) -> bool:
        """Compute the prompt from the first batch that is not kept; False when cancelled."""
        start = self._forget(self._prompts.usable(prompt))
        abort = llama.ggml_abort_callback(lambda _: cancelled())
        llama.llama_set_abort_callback(self._context, abort, None)
        try:
            for position, batch in self._prompts.batches(prompt, start):
                if cancelled() or not self._decode(batch, position):
                    return False
        finally:  # single tokens are soon done; asking Python at each of their operations would slow them down
            llama.llama_set_abort_callback(self._context, llama.ggml_abort_callback(), None)
        return True

    def _forget(self, length: int) -> int:
        """Drop everything from position ``length`` on; returns what is left (0 where a model cannot rewind)."""
        if length and llama.llama_memory_seq_rm(self._memory, 0, length, -1):
            return length
        llama.llama_memory_clear(self._memory, True)
        self._prompts.clear()
        return 0

    def _decode(self, tokens: Sequence[int], position: int, *, every_output: bool = False) -> bool:
        """Compute ``tokens`` from ``position`` on; False when aborted."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = position + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = every_output
        batch.logits[len(tokens) - 1] = True
        forget_errors()
        code: int = llama.llama_decode(self._context, batch)
        if code not in (0, _ABORTED):
            raise UserError(
                f"llama.cpp failed at token {position} ({first_error()}, code {code}); "
                "if memory is short, a smaller context_length needs less"
            )
        return code == 0


def _free_context(context: Any, batch: Any) -> None:
    llama.llama_batch_free(batch)
    llama.llama_free(context)
