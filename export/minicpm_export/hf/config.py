"""The config.json of an exported folder: the source's own, or one under another architecture's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from minicpm_edge.errors import UserError
from minicpm_edge.json_file import read_json
from minicpm_edge.model.config import ModelConfig
from minicpm_export.source import Source

# What Granite calls MiniCPM's scales (the two compute the same function) → how it is read off a config.
GRANITE_KEYS: Mapping[str, Callable[[ModelConfig], float]] = {
    "embedding_multiplier": lambda config: config.scale_emb,
    "residual_multiplier": lambda config: config.residual_scale,
    "logits_scaling": lambda config: 1.0 / config.logit_scale,
    "attention_multiplier": lambda config: config.head_dim**-0.5,
}
MINICPM_KEYS = ("scale_emb", "scale_depth", "dim_model_base", "num_experts", "num_experts_per_tok")


def own_config(source: Source) -> dict[str, Any]:
    """The source's config.json with every key it has, ``auto_map`` too."""
    return read_json(source.folder / "config.json")


def minicpm_config(source: Source) -> dict[str, Any]:
    """MiniCPM's, whatever the source is called: a Llama has neutral scales there."""
    return source.config.to_dict()


def granite_config(source: Source) -> dict[str, Any]:
    """Granite's, which computes the same from the same tensors."""
    _check_stock(source.config, "granite")
    config = source.config
    return _without_scales(config) | {
        **{key: read(config) for key, read in GRANITE_KEYS.items()},
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
    }


def llama_config(source: Source) -> dict[str, Any]:
    """Llama's, for tensors that the scales are multiplied into (:mod:`minicpm_export.hf.fold`)."""
    _check_stock(source.config, "llama")
    names = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False}
    return _without_scales(source.config) | names


CONFIGS: Mapping[str, Callable[[Source], dict[str, Any]]] = {
    "own": own_config,
    "minicpm": minicpm_config,
    "granite": granite_config,
    "llama": llama_config,
}


def _without_scales(config: ModelConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key not in MINICPM_KEYS}


def _check_stock(config: ModelConfig, name: str) -> None:
    """Raises :class:`UserError` for what implementations of these architectures do not compute."""
    if config.num_experts:
        raise UserError(
            f"a mixture of experts has no {name} form with these tensor names; leave --architecture out"
        )
    if config.hidden_act != "silu":
        raise UserError(
            f"hidden_act {config.hidden_act!r} has no {name} form that runtimes compute; leave --architecture out"
        )
