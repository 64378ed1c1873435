"""How many threads every runtime of this package computes with."""

from __future__ import annotations

import torch

from minicpm_edge.load import default_threads


def num_threads() -> int:
    """One for each real core, or fewer where OMP_NUM_THREADS or ``torch.set_num_threads`` asks for fewer."""
    return min(default_threads(), torch.get_num_threads())
