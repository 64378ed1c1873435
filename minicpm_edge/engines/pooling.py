"""One vector for a text from the states of its tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from minicpm_edge.errors import UserError


def unit_vector(sum_D: NDArray[np.floating]) -> list[float]:
    """``sum_D`` scaled to length 1, which makes a sum of states the same as their mean."""
    norm = float(np.linalg.norm(sum_D.astype(np.float64)))
    if not np.isfinite(norm) or norm == 0:
        raise UserError("the model gives no usable states for this text; its file may be damaged")
    return [float(value) for value in sum_D / norm]
