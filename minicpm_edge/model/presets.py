"""Every model of the paper by name, and ``tiny`` for a laptop's first run."""

from __future__ import annotations

import difflib

from minicpm_edge.errors import UserError
from minicpm_edge.model.config import ModelConfig

WIND_TUNNEL_VOCAB = 122_753


def _wind_tunnel(hidden_size: int, num_layers: int, num_heads: int) -> ModelConfig:
    """A size of the wind tunnel (paper, table 8): head dim 64, d_ff = 2.5 d, one key head a query head."""
    return ModelConfig(
        vocab_size=WIND_TUNNEL_VOCAB,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 5 // 2,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
    )


PRESETS: dict[str, ModelConfig] = {
    # d and d_ff are multiples of 256, so that every quantisation of llama.cpp applies to every matrix.
    "tiny": ModelConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    ),
    "9m": _wind_tunnel(320, 8, 5),
    "30m": _wind_tunnel(512, 12, 8),
    "70m": _wind_tunnel(640, 14, 10),
    "0.1b": _wind_tunnel(768, 16, 12),
    "0.17b": _wind_tunnel(896, 18, 14),
    "0.2b": _wind_tunnel(1024, 20, 16),
    "0.5b": _wind_tunnel(1344, 24, 21),
    "minicpm-1.2b": ModelConfig(
        vocab_size=73_440,
        hidden_size=1536,
        intermediate_size=3840,
        num_hidden_layers=52,
        num_attention_heads=24,
        num_key_value_heads=8,
    ),
    "minicpm-2.4b": ModelConfig(
        vocab_size=122_753,
        hidden_size=2304,
        intermediate_size=5760,
        num_hidden_layers=40,
        num_attention_heads=36,
        num_key_value_heads=36,
    ),
    # Sparse upcycling of the 2.4B: 13.59B parameters, 4.035B of them at work for a token (paper, section 6.4).
    "minicpm-moe-8x2b": ModelConfig(
        vocab_size=122_753,
        hidden_size=2304,
        intermediate_size=5760,
        num_hidden_layers=40,
        num_attention_heads=36,
        num_key_value_heads=36,
        num_experts=8,
        num_experts_per_tok=2,
    ),
}


def preset(name: str) -> ModelConfig:
    """The config of that name.

    Raises:
        UserError: for an unknown name; the message offers the nearest preset.
    """
    if name not in PRESETS:
        nearest = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(PRESETS)}"
        raise UserError(f"no model preset is called {name!r}; {hint}")
    return PRESETS[name]
