"""llama.cpp: runs a ``.gguf`` on any machine, through the low-level functions of llama-cpp-python.

A prompt is computed in batches of :data:`BATCH` tokens that begin at multiples of it. Only such whole batches are kept
for a later prompt that begins alike: the same batch over the same past gives the same bits, so an answer does not
depend on what the model was asked before.
"""

from __future__ import annotations

import ctypes
import secrets
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from minicpm_edge.engine import Cancelled, SamplingParams
from minicpm_edge.engines.llama_vocabulary import LlamaVocabulary
from minicpm_edge.errors import UserError

BATCH = 128
"""Tokens a call. More is no faster on a CPU, and this bounds how long a cancelled prompt still computes."""
DEFAULT_CONTEXT = 8192
"""Context where none is asked for, if the model was trained for as much: the KV cache of more can fill a laptop."""
_WARNING, _ERROR = 3, 4  # ggml_log_level

_log_lines: deque[str] = deque(maxlen=8)


def _log(level: int, text: bytes, _: object) -> None:
    if level in (_WARNING, _ERROR):
        _log_lines.append(text.decode("utf-8", errors="replace").strip())


# llama.cpp prints nothing; its last problems are kept for the message of a failed load.
_keep_log = llama_cpp.llama_log_callback(_log)


class LlamaCppEngine:
    """One GGUF file in one llama.cpp context. See :class:`~minicpm_edge.engine.Engine`.

    Raises:
        UserError: when llama.cpp cannot load the file, or was asked for more context than the model was trained for.
    """

    kind = "llama_cpp"

    def __init__(self, path: Path, *, context_length: int | None, threads: int) -> None:
        llama_cpp.llama_log_set(_keep_log, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        _log_lines.clear()
        self._model: Any = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise UserError(f"llama.cpp cannot load {path}: {_last_problem()}")
        self._context: Any = None
        try:
            self.context_length = self._choose_context(context_length, path)
            self._context = llama_cpp.llama_init_from_model(self._model, self._context_params(threads))
            if not self._context:
                raise UserError(
                    f"llama.cpp cannot make a context of {self.context_length} tokens for {path}: {_last_problem()}; "
                    "a smaller context_length needs less memory"
                )
        except UserError:
            self.close()
            raise
        self._memory: Any = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._kept: list[int] = []
        self.vocabulary = LlamaVocabulary(self._model)

    @property
    def end_ids(self) -> frozenset[int]:
        """Every end-of-generation token llama.cpp knows for this file."""
        return self.vocabulary.end_ids

    def tokens(self, prompt: Sequence[int], params: SamplingParams, cancelled: Cancelled) -> Generator[int]:
        """See :meth:`minicpm_edge.engine.Engine.tokens`."""
        if not self._prefill(prompt, cancelled):
            return
        with _sampler(params) as sampler:
            for position in range(len(prompt), self.context_length):
                token: int = llama_cpp.llama_sampler_sample(sampler, self._context, -1)
                yield token
                if cancelled():
                    return
                self._decode([token], position)

    def embed(self, tokens: Sequence[int]) -> list[float]:
        """See :meth:`minicpm_edge.engine.Engine.embed`."""
        width: int = llama_cpp.llama_model_n_embd(self._model)
        total_D = np.zeros(width)
        self._forget(0)
        llama_cpp.llama_set_embeddings(self._context, True)
        try:
            for start in range(0, len(tokens), BATCH):
                batch = tokens[start : start + BATCH]
                self._decode(batch, start, every_output=True)
                for index in range(len(batch)):
                    state = llama_cpp.llama_get_embeddings_ith(self._context, index)
                    total_D += np.ctypeslib.as_array(state, shape=(width,))
        finally:
            llama_cpp.llama_set_embeddings(self._context, False)
            self._forget(0)
        norm = float(np.linalg.norm(total_D))
        return [float(value) for value in total_D / norm] if norm else [0.0] * width

    def close(self) -> None:
        """Free the context and the model."""
        if self._context:
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_free(self._context)
        if self._model:
            llama_cpp.llama_model_free(self._model)
        self._context = self._model = None

    def _choose_context(self, asked: int | None, path: Path) -> int:
        trained: int = llama_cpp.llama_model_n_ctx_train(self._model)
        if asked is not None and asked > trained:
            raise UserError(
                f"context_length {asked} is more than {path} was trained for; ask for at most {trained}"
            )
        return asked or min(trained, DEFAULT_CONTEXT)

    def _context_params(self, threads: int) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = self.context_length
        params.n_batch = params.n_ubatch = BATCH
        params.n_seq_max = 1
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        return params

    def _prefill(self, prompt: Sequence[int], cancelled: Cancelled) -> bool:
        """Compute the prompt, from the first batch that is not kept; False when cancelled."""
        # The last token is always computed: its logits choose the first token of the answer.
        start = min(_common_length(self._kept, prompt), len(prompt) - 1) // BATCH * BATCH
        start = self._forget(start)
        for position in range(start, len(prompt), BATCH):
            if cancelled():
                return False
            batch = prompt[position : position + BATCH]
            self._decode(batch, position)
            if len(batch) == BATCH:
                self._kept.extend(batch)
        return True

    def _forget(self, length: int) -> int:
        """Drop everything from position ``length`` on; returns how much is left (0 where a model cannot rewind)."""
        if not llama_cpp.llama_memory_seq_rm(self._memory, 0, length, -1):
            length = 0
        if length == 0:
            llama_cpp.llama_memory_clear(self._memory, True)
        del self._kept[length:]
        return length

    def _decode(self, tokens: Sequence[int], position: int, *, every_output: bool = False) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = position + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = every_output
        batch.logits[len(tokens) - 1] = True
        code: int = llama_cpp.llama_decode(self._context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code} at position {position}: {_last_problem()}")


@contextmanager
def _sampler(params: SamplingParams) -> Iterator[Any]:
    """llama.cpp's sampler chain for one request, in the order that ``SamplingParams`` documents."""
    chain: Any = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    try:
        if params.temperature == 0:
            stages = [llama_cpp.llama_sampler_init_greedy()]
        else:
            seed = secrets.randbits(32) if params.seed is None else params.seed
            stages = [
                llama_cpp.llama_sampler_init_top_k(params.top_k),
                llama_cpp.llama_sampler_init_top_p(params.top_p, 1),
                llama_cpp.llama_sampler_init_min_p(params.min_p, 1),
                llama_cpp.llama_sampler_init_temp(params.temperature),
                # The one 32-bit value left out is LLAMA_DEFAULT_SEED, for which llama.cpp draws a seed of its own.
                llama_cpp.llama_sampler_init_dist(seed % llama_cpp.LLAMA_DEFAULT_SEED),
            ]
        for stage in stages:
            llama_cpp.llama_sampler_chain_add(chain, stage)
        yield chain
    finally:
        llama_cpp.llama_sampler_free(chain)


def _common_length(left: Sequence[int], right: Sequence[int]) -> int:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def _last_problem() -> str:
    return _log_lines[-1] if _log_lines else "it gives no reason"
