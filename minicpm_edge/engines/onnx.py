"""ONNX Runtime on the CPU: runs a decoder graph with its cache as inputs and outputs.

The names are those that optimum, transformers.js and onnxruntime-genai use: ``input_ids``, ``attention_mask``,
``past_key_values.N.key`` and ``.value`` (B, K, S, C) in; ``logits`` (B, T, V), ``present.N.key`` and ``.value`` out.
Legend: B batch (1 here), T time, S cache positions, K key/value heads, C head dim, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicpm_edge.engines.base import Cancelled, resolve_context_length
from minicpm_edge.engines.folder import load_tokenizer, stop_token_ids, trained_context
from minicpm_edge.engines.prompt_cache import PromptCache
from minicpm_edge.engines.sampling import Sampler
from minicpm_edge.engines.sampling_params import SamplingParams
from minicpm_edge.errors import UserError
from minicpm_edge.formats.resolve import check_onnx_path, onnx_file

BATCH = 128
PAST, PRESENT = "past_key_values.", "present."
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
Cache = Mapping[str, NDArray[Any]]


class OnnxRunner:
    """One graph in ONNX Runtime. See :class:`~minicpm_edge.engines.base.ModelRunner`."""

    backend = "onnx"

    def __init__(self, path: Path, *, context_length: int | None, threads: int) -> None:
        """``path`` is a model folder, or the ``.onnx`` file in it or in its folder ``onnx``."""
        file, folder = onnx_file(path)
        self.context_length = resolve_context_length(context_length, trained_context(folder), folder)
        self.vocabulary = load_tokenizer(folder)
        self.stop_token_ids = stop_token_ids(folder, self.vocabulary)
        self._session: Any = _open_session(file, threads)
        self._inputs = {entry.name: entry for entry in self._session.get_inputs()}
        self._outputs = [entry.name for entry in self._session.get_outputs()]
        self._empty = {
            name: _empty(entry, file) for name, entry in self._inputs.items() if name.startswith(PAST)
        }
        self._check_names(file)
        self._prompts = PromptCache(BATCH)
        self._kept: Cache = self._empty

    def tokens(self, prompt: Sequence[int], params: SamplingParams, cancelled: Cancelled) -> Generator[int]:
        """See :meth:`minicpm_edge.engines.base.ModelRunner.tokens`."""
        start = self._prompts.usable(prompt)
        cache: Cache = {name: past_BKSC[:, :, :start] for name, past_BKSC in self._kept.items()}
        self._kept = cache
        sampler, logits_V = Sampler(params), np.zeros(0, np.float32)
        for position, batch in self._prompts.batches(prompt, start):
            if cancelled():
                return
            logits_V, cache = self._run(batch, position, cache)
            if len(batch) == BATCH:
                self._kept = cache
        for position in range(len(prompt), self.context_length):
            token = sampler(logits_V)
            yield token
            if cancelled():
                return
            logits_V, cache = self._run([token], position, cache)

    def embed(self, tokens: Sequence[int]) -> list[float]:
        """A decoder graph gives logits only. Raises :class:`UserError`."""
        raise UserError("an ONNX graph gives no embeddings; use the checkpoint or its GGUF")

    def close(self) -> None:
        """Free the session."""
        self._session, self._kept = None, self._empty
        self._prompts.clear()

    def _run(
        self, tokens: Sequence[int], position: int, cache: Cache
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
        """Logits (V,) after the last of ``tokens``, which begin at ``position``, and the longer cache."""
        end = position + len(tokens)
        inputs = {"input_ids": np.array([tokens], np.int64), "attention_mask": np.ones((1, end), np.int64)}
        if "position_ids" in self._inputs:
            inputs["position_ids"] = np.arange(position, end, dtype=np.int64)[None]
        results = dict(zip(self._outputs, self._session.run(None, {**inputs, **cache}), strict=True))
        logits_V: NDArray[np.float32] = results["logits"][0, -1, : self.vocabulary.vocab_size]
        return logits_V, {name: results[_present(name)] for name in cache}

    def _check_names(self, file: Path) -> None:
        known = {"input_ids", "attention_mask", "position_ids", *self._empty}
        needed = {"logits", *map(_present, self._empty)}
        wrong = sorted((self._inputs.keys() - known) | (needed - set(self._outputs)))
        if wrong or not self._empty or "input_ids" not in self._inputs:
            raise UserError(
                f"{file} is not a decoder graph with a cache ({', '.join(wrong) or 'no past_key_values'}); "
                "export one with `minicpm-edge export --onnx`"
            )


def _open_session(file: Path, threads: int) -> Any:
    # Read when the package is imported; its wheels report home otherwise.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    check_onnx_path(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what goes wrong is in the exception
    failures = (
        *(state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf),
        *(state.NoModel, state.NoSuchFile, state.NotImplemented, state.RuntimeException),
    )
    try:
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except failures as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"ONNX Runtime cannot load {file}: {reason}") from None


def _empty(entry: Any, file: Path) -> NDArray[Any]:
    """A cache input without any past: (1, K, 0, C)."""
    shape = list(entry.shape)
    if (
        len(shape) != 4
        or not isinstance(shape[1], int)
        or not isinstance(shape[3], int)
        or entry.type not in TYPES
    ):
        raise UserError(
            f"{file}: the cache input {entry.name} must be float (batch, kv heads, past, head dimension)"
        )
    return np.zeros((1, shape[1], 0, shape[3]), TYPES[entry.type])


def _present(name: str) -> str:
    return PRESENT + name.removeprefix(PAST)
