"""ONNX Runtime on the CPU, reading an exported graph as users will: prompt, then token by token through its cache.

Legend: T positions of one window, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicpm_export.threads import num_threads

SINGLE_STEPS = 16


class OrtRuntime:
    """One graph. With ``through_cache`` a window is computed in parts, each on top of the cache of those before.

    The parts are the first half, 16 single tokens (as in decoding), and the rest (as a second turn of a chat).
    """

    def __init__(self, path: Path, *, through_cache: bool = False) -> None:
        os.environ["ORT_DISABLE_TELEMETRY"] = (
            "1"  # read when the package is imported; on by default in its wheels
        )
        import onnxruntime

        self.name = f"ONNX Runtime {onnxruntime.__version__}"
        self._through_cache = through_cache
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = num_threads()
        self.session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._past = {
            entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), dtype=np.float32)
            for entry in self.session.get_inputs()
            if entry.name.startswith("past_key_values.")
        }

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits (T, V) of one text from its beginning."""
        cache, parts, done = self._past, [], 0
        for end in self._ends(len(ids)):
            part, cache = self._run(ids[done:end], cache, end)
            parts.append(part)
            done = end
        return np.concatenate(parts)

    def _ends(self, length: int) -> list[int]:
        half = length // 2
        steps = range(half, min(half + SINGLE_STEPS, length))
        return [length] if not self._through_cache else sorted({*steps, length} - {0})

    def _run(
        self, ids: Sequence[int], cache: dict[str, NDArray[np.float32]], total: int
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
        feed = {
            "input_ids": np.array([ids], dtype=np.int64),
            "attention_mask": np.ones((1, total), dtype=np.int64),
            **cache,
        }
        logits, *present = self.session.run(None, feed)
        return logits[0], dict(zip(cache, present, strict=True))
