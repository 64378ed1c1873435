"""llama.cpp on the CPU, reading a GGUF back as users will.

Legend: T positions of one window, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from minicpm_edge.errors import UserError
from minicpm_export.gguf.llama_log import quiet_log
from minicpm_export.threads import num_threads

F32_CACHE, NO_FLASH_ATTENTION = 0, 0  # ggml_type, llama_flash_attn_type


class LlamaRuntime:
    """A GGUF in llama.cpp on the CPU: logits of every position, and its own tokenizer. A context manager.

    Unless ``defaults`` is set, keys and values stay in F32: by default llama.cpp rounds them to F16, in the cache
    and again inside its flash attention, and the logits of even an F32 file are then 0.01 off. What is measured is
    the file, not the rounding of the cache.
    """

    name = f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"

    def __init__(self, path: Path, *, context_length: int, defaults: bool = False) -> None:
        """Raises :class:`UserError` where llama.cpp refuses the file."""
        self.model = self._context = None
        errors = quiet_log()
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(path), model_params)
        if not self.model:
            reason = "; ".join(errors) or "no reason given"
            raise UserError(f"{path}: llama.cpp does not load it ({reason})")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = context_length
        params.n_ubatch = min(512, context_length)
        if not defaults:
            params.type_k = params.type_v = F32_CACHE
            params.flash_attn_type = NO_FLASH_ATTENTION
        params.no_perf = True
        params.n_threads = params.n_threads_batch = num_threads()
        self._context = llama_cpp.llama_init_from_model(self.model, params)
        if not self._context:
            reason = "; ".join(errors) or "no reason given"
            self.close()
            raise UserError(f"{path}: llama.cpp cannot run it ({reason})")
        self._vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size: int = llama_cpp.llama_vocab_n_tokens(self._vocab)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits (T, V) of one text from its beginning."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for position, token in enumerate(ids):
                batch.token[position], batch.pos[position] = token, position
                batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
                batch.logits[position] = True
            errors = quiet_log()
            status = llama_cpp.llama_decode(self._context, batch)
        finally:
            llama_cpp.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}: {'; '.join(errors)}")
        pointer = llama_cpp.llama_get_logits(self._context)
        shape = (len(ids), self.vocab_size)
        return np.ctypeslib.as_array(pointer, shape=shape).astype(np.float32, copy=True)

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text, without a begin token. Look-alikes of control tokens are plain text unless ``special``."""
        data = text.encode()
        room = len(data) + 16
        buffer = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), buffer, room, False, special)
        if count < 0:
            raise RuntimeError(f"llama_tokenize asks for {-count} tokens for {len(data)} bytes")
        return list(buffer[:count])

    def special_ids(self) -> dict[str, int]:
        """Tokens that llama.cpp gives a meaning, by what it does with them; -1 where it has none."""
        return {
            "bos": llama_cpp.llama_vocab_bos(self._vocab),
            "eos": llama_cpp.llama_vocab_eos(self._vocab),
            "eot": llama_cpp.llama_vocab_eot(self._vocab),
            "pad": llama_cpp.llama_vocab_pad(self._vocab),
        }

    def adds_bos(self) -> bool:
        """Whether llama.cpp begins every text with the begin token."""
        return bool(llama_cpp.llama_vocab_get_add_bos(self._vocab))

    def ends_answer(self, token: int) -> bool:
        """Whether llama.cpp stops generating at this token."""
        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

    def close(self) -> None:
        """Free the model; a second call does nothing."""
        quiet_log()
        if self._context:
            llama_cpp.llama_free(self._context)
        if self.model:
            llama_cpp.llama_model_free(self.model)
        self._context = self.model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
