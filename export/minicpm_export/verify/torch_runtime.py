"""The fp32 torch model as a certificate's reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from minicpm_edge.formats.checkpoint import load_checkpoint


class TorchRuntime:
    """A Hugging Face folder in float32 on the CPU."""

    def __init__(self, folder: Path) -> None:
        self.name = f"torch {torch.__version__}"
        self._model = load_checkpoint(folder)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits (T, V) of one text from its beginning."""
        with torch.inference_mode():
            logits_BTV = self._model(torch.tensor([list(ids)]))
        array: NDArray[np.float32] = logits_BTV[0].numpy()
        return array
