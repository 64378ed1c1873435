"""Rotary embedding. (Reference only, by the lead, to unblock the model; helper C replaces it.)"""

import torch
from torch import Tensor


def rope_tables(
    positions_N: Tensor, inv_freq_D2: Tensor, attention_factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    angles_ND2 = positions_N[:, None].float() * inv_freq_D2
    return angles_ND2.cos() * attention_factor, angles_ND2.sin() * attention_factor


def rope(x_NHD: Tensor, cos_ND2: Tensor, sin_ND2: Tensor) -> Tensor:
    a, b = x_NHD.chunk(2, -1)
    cos, sin = cos_ND2[:, None], sin_ND2[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x_NHD.dtype)
