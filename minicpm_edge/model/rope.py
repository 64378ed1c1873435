"""Rotary position frequencies: the base rule and its scaled forms (RoFormer, section 3.2.2).

Legend: C2 half the head dim (C / 2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minicpm_edge.model.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """inv_freq_C2 in float32, on the CPU: theta^(-2i/head_dim), scaled as ``config.rope_scaling`` says."""
    exponents_C2 = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    inv_freq_C2 = 1.0 / (config.rope_theta**exponents_C2)
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq_C2
    if scaling.kind == "linear":
        return inv_freq_C2 / scaling.factor
    return _llama3(inv_freq_C2, scaling)


def _llama3(inv_freq_C2: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3's rule: long waves are scaled by the factor, short ones kept, those between interpolated."""
    context = scaling.original_max_position_embeddings
    waves_in_context_C2 = context * inv_freq_C2 / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep_C2 = ((waves_in_context_C2 - low) / (high - low)).clamp(0.0, 1.0)
    return keep_C2 * inv_freq_C2 + (1.0 - keep_C2) * inv_freq_C2 / scaling.factor
