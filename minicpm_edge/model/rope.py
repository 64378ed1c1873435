"""Rotary position frequencies: the base rule and its scaled forms (RoFormer, section 3.2.2).

Legend: C2 half the head dim (C / 2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minicpm_edge.model.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig, length: int = 0) -> Tensor:
    """inv_freq_C2 in float32, on the CPU: theta^(-2i/head_dim), scaled as ``config.rope_scaling`` says.

    Args:
        config: the model's.
        length: tokens of the longest text that they are for, which decides where
            :attr:`~minicpm_edge.model.config.RopeScaling.depends_on_length`.
    """
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic":
        return _plain(config, _dynamic_base(config, scaling, length))
    inv_freq_C2 = _plain(config, config.rope_theta)
    if scaling is None:
        return inv_freq_C2
    if scaling.kind == "linear":
        assert scaling.factor is not None
        return inv_freq_C2 / scaling.factor
    if scaling.kind == "longrope":
        is_long = length > scaling.original_max_position_embeddings
        return inv_freq_C2 / torch.tensor(scaling.long_factor if is_long else scaling.short_factor)
    return _llama3(inv_freq_C2, scaling)


def _plain(config: ModelConfig, base: float) -> Tensor:
    exponents_C2 = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return torch.as_tensor(1.0 / (base**exponents_C2))


def _dynamic_base(config: ModelConfig, scaling: RopeScaling, length: int) -> float:
    """The base grows with a text longer than the trained context ("NTK-aware" scaling, as in `transformers`)."""
    assert scaling.factor is not None
    growth = max(length, config.max_position_embeddings) / config.max_position_embeddings
    exponent = config.head_dim / (config.head_dim - 2)
    return float(config.rope_theta * (scaling.factor * growth - (scaling.factor - 1)) ** exponent)


def _llama3(inv_freq_C2: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3's rule: long waves are scaled by the factor, short ones kept, those between interpolated."""
    assert scaling.factor is not None
    context = scaling.original_max_position_embeddings
    waves_in_context_C2 = context * inv_freq_C2 / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep_C2 = ((waves_in_context_C2 - low) / (high - low)).clamp(0.0, 1.0)
    return keep_C2 * inv_freq_C2 + (1.0 - keep_C2) * inv_freq_C2 / scaling.factor
