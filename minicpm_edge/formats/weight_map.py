"""The map between Hugging Face tensor names and the model's own merged weights: one table.

A weight of the model is several Hugging Face tensors stacked: rows one below the other (``qkv``, ``gate_up``), or
expert by expert into a leading dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

from minicpm_edge.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class WeightMapping:
    """One parameter: its name in the model, and for each expert (one, when dense) the HF names of its rows."""

    name: str
    hf_names: tuple[tuple[str, ...], ...]
    rows: tuple[int, ...]
    columns: int | None
    stacked: bool = False


def weight_mappings(config: ModelConfig) -> list[WeightMapping]:
    """Every parameter of the model in file order."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    table = [_plain("embedding.weight", "model.embed_tokens.weight", vocabulary, hidden)]
    for layer in range(config.num_hidden_layers):
        table += _layer(config, f"layers.{layer}", f"model.layers.{layer}")
    table.append(_plain("norm.weight", "model.norm.weight", hidden))
    if not config.tie_word_embeddings:
        table.append(_plain("head.weight", "lm_head.weight", vocabulary, hidden))
    return table


def _plain(name: str, hf_name: str, rows: int, columns: int | None = None) -> WeightMapping:
    return WeightMapping(name=name, hf_names=((hf_name,),), rows=(rows,), columns=columns)


def _layer(config: ModelConfig, name: str, hf_name: str) -> list[WeightMapping]:
    hidden, width = config.hidden_size, config.intermediate_size
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    qkv = tuple(f"{hf_name}.self_attn.{part}_proj.weight" for part in "qkv")
    return [
        _plain(f"{name}.attention_norm.weight", f"{hf_name}.input_layernorm.weight", hidden),
        WeightMapping(
            name=f"{name}.attention.qkv.weight", hf_names=(qkv,), rows=(query, key, key), columns=hidden
        ),
        _plain(f"{name}.attention.out.weight", f"{hf_name}.self_attn.o_proj.weight", hidden, query),
        _plain(f"{name}.feed_forward_norm.weight", f"{hf_name}.post_attention_layernorm.weight", hidden),
        *(_experts if config.num_experts else _dense)(config, name, hf_name, hidden, width),
    ]


def _dense(config: ModelConfig, name: str, hf_name: str, hidden: int, width: int) -> list[WeightMapping]:
    gate_up = (f"{hf_name}.mlp.gate_proj.weight", f"{hf_name}.mlp.up_proj.weight")
    return [
        WeightMapping(
            name=f"{name}.feed_forward.gate_up.weight",
            hf_names=(gate_up,),
            rows=(width, width),
            columns=hidden,
        ),
        _plain(f"{name}.feed_forward.down.weight", f"{hf_name}.mlp.down_proj.weight", hidden, width),
    ]


def _experts(config: ModelConfig, name: str, hf_name: str, hidden: int, width: int) -> list[WeightMapping]:
    experts = [f"{hf_name}.mlp.experts.{index}" for index in range(config.num_experts)]
    return [
        _plain(
            f"{name}.feed_forward.router.weight", f"{hf_name}.mlp.gate.weight", config.num_experts, hidden
        ),
        # w1 is the gate, w3 the up projection, w2 the down projection.
        WeightMapping(
            name=f"{name}.feed_forward.gate_up",
            hf_names=tuple((f"{expert}.w1.weight", f"{expert}.w3.weight") for expert in experts),
            rows=(width, width),
            columns=hidden,
            stacked=True,
        ),
        WeightMapping(
            name=f"{name}.feed_forward.down",
            hf_names=tuple((f"{expert}.w2.weight",) for expert in experts),
            rows=(hidden,),
            columns=width,
            stacked=True,
        ),
    ]
