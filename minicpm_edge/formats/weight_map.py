"""The map between the published tensor names and the model's own merged weights: one table.

An internal weight is several published ones stacked: rows one below the other (``qkv``, ``gate_up``), or expert by
expert into a leading dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

from minicpm_edge.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class WeightMapping:
    """One internal parameter: its name, and for each expert (one, when dense) the published parts by rows."""

    name: str
    parts: tuple[tuple[str, ...], ...]
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


def _plain(name: str, published: str, rows: int, columns: int | None = None) -> WeightMapping:
    return WeightMapping(name=name, parts=((published,),), rows=(rows,), columns=columns)


def _layer(config: ModelConfig, ours: str, theirs: str) -> list[WeightMapping]:
    hidden, width = config.hidden_size, config.intermediate_size
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    qkv = tuple(f"{theirs}.self_attn.{part}_proj.weight" for part in "qkv")
    return [
        _plain(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight", hidden),
        WeightMapping(
            name=f"{ours}.attention.qkv.weight", parts=(qkv,), rows=(query, key, key), columns=hidden
        ),
        _plain(f"{ours}.attention.out.weight", f"{theirs}.self_attn.o_proj.weight", hidden, query),
        _plain(f"{ours}.feed_forward_norm.weight", f"{theirs}.post_attention_layernorm.weight", hidden),
        *(_experts if config.num_experts else _dense)(config, ours, theirs, hidden, width),
    ]


def _dense(config: ModelConfig, ours: str, theirs: str, hidden: int, width: int) -> list[WeightMapping]:
    gate_up = (f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight")
    return [
        WeightMapping(
            name=f"{ours}.feed_forward.gate_up.weight", parts=(gate_up,), rows=(width, width), columns=hidden
        ),
        _plain(f"{ours}.feed_forward.down.weight", f"{theirs}.mlp.down_proj.weight", hidden, width),
    ]


def _experts(config: ModelConfig, ours: str, theirs: str, hidden: int, width: int) -> list[WeightMapping]:
    experts = [f"{theirs}.mlp.experts.{index}" for index in range(config.num_experts)]
    return [
        _plain(f"{ours}.feed_forward.router.weight", f"{theirs}.mlp.gate.weight", config.num_experts, hidden),
        WeightMapping(  # w1 is the gate, w3 the up projection, w2 the down projection
            name=f"{ours}.feed_forward.gate_up",
            parts=tuple((f"{expert}.w1.weight", f"{expert}.w3.weight") for expert in experts),
            rows=(width, width),
            columns=hidden,
            stacked=True,
        ),
        WeightMapping(
            name=f"{ours}.feed_forward.down",
            parts=tuple((f"{expert}.w2.weight",) for expert in experts),
            rows=(hidden,),
            columns=width,
            stacked=True,
        ),
    ]
