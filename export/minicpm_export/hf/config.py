"""The config.json of a folder under another architecture's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from minicpm_edge.model.config import ModelConfig

# What Granite calls MiniCPM's scales (the two compute the same function) → how it is read off a config.
GRANITE_KEYS: Mapping[str, Callable[[ModelConfig], float]] = {
    "embedding_multiplier": lambda config: config.scale_emb,
    "residual_multiplier": lambda config: config.residual_scale,
    "logits_scaling": lambda config: 1.0 / config.logit_scale,
    "attention_multiplier": lambda config: config.head_dim**-0.5,
}
MINICPM_KEYS = ("scale_emb", "scale_depth", "dim_model_base", "num_experts", "num_experts_per_tok")


def granite_config(config: ModelConfig) -> dict[str, object]:
    """The config.json of the Granite model that computes the same as this dense one."""
    entries = {key: value for key, value in config.to_dict().items() if key not in MINICPM_KEYS}
    entries.update({key: read(config) for key, read in GRANITE_KEYS.items()})
    return {**entries, "architectures": ["GraniteForCausalLM"], "model_type": "granite"}
