"""What a GGUF of architecture ``minicpm`` holds: its keys and its tensors, each as a table.

llama.cpp runs this architecture on its Granite graph, for dense models and mixtures of experts alike. Two things
differ from the published checkpoints. Rotary pairs are neighbours there (rows 2i and 2i+1 of a head) and half a head
apart here (rows i and i + C/2), so the rows of Q and K are reordered. And the graph *divides* the logits by
``logit_scale``, so the key holds hidden_size / dim_model_base. All three scales are always written: a reader's
defaults for missing ones are wrong (logits 81 times too large at a width of 2304).

Legend: C head dim, C2 half of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from gguf import GGUFValueType
from numpy.typing import NDArray

from minicpm_edge.model.config import ModelConfig

ARCHITECTURE = "minicpm"
U32, F32, STRING = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING

Reader = Callable[[ModelConfig], Any]
# key (after "minicpm.") → its type, and its value; None leaves it out.
KEYS: tuple[tuple[str, GGUFValueType, Reader], ...] = (
    ("block_count", U32, lambda config: config.num_hidden_layers),
    ("context_length", U32, lambda config: config.max_position_embeddings),
    ("embedding_length", U32, lambda config: config.hidden_size),
    ("feed_forward_length", U32, lambda config: config.intermediate_size),
    ("vocab_size", U32, lambda config: config.vocab_size),
    ("attention.head_count", U32, lambda config: config.num_attention_heads),
    ("attention.head_count_kv", U32, lambda config: config.num_key_value_heads),
    ("attention.key_length", U32, lambda config: config.head_dim),
    ("attention.value_length", U32, lambda config: config.head_dim),
    ("attention.layer_norm_rms_epsilon", F32, lambda config: config.rms_norm_eps),
    ("embedding_scale", F32, lambda config: config.scale_emb),
    ("residual_scale", F32, lambda config: config.residual_scale),
    ("logit_scale", F32, lambda config: 1.0 / config.logit_scale),
    ("rope.dimension_count", U32, lambda config: config.head_dim),
    ("rope.freq_base", F32, lambda config: config.rope_theta),
    ("rope.scaling.type", STRING, lambda config: _scaling(config, "kind")),
    ("rope.scaling.factor", F32, lambda config: _scaling(config, "factor")),
    (
        "rope.scaling.original_context_length",
        U32,
        lambda config: _scaling(config, "original_max_position_embeddings", of="longrope"),
    ),
    (
        "rope.scaling.attn_factor",
        F32,
        lambda config: _scaling(config, "kind", of="longrope") and config.attention_factor,
    ),
    ("expert_count", U32, lambda config: config.num_experts or None),
    ("expert_used_count", U32, lambda config: config.num_experts_per_tok or None),
)


def _scaling(config: ModelConfig, name: str, *, of: str | None = None) -> Any:
    """A field of a scaling that llama.cpp has a name for, of one kind of them or all; else None."""
    scaling = config.rope_scaling
    kinds = ("linear", "longrope") if of is None else (of,)
    return getattr(scaling, name) if scaling is not None and scaling.kind in kinds else None


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor of the file: where it comes from, and what is done to it on the way.

    Several sources are stacked into a new leading dimension (experts). ``heads`` above 0 asks for the rotary
    reordering of the rows, head by head. ``keep_f32`` marks what llama.cpp computes with in F32 in files of
    every type: vectors, and the router.
    """

    name: str
    sources: tuple[str, ...]
    heads: int = 0
    keep_f32: bool = False


Row = tuple[str, str, str | None, bool]
# name in the file → published name, the heads whose rows are reordered (a field of the config), kept in F32
_TOP: tuple[Row, ...] = (
    ("token_embd", "model.embed_tokens", None, False),
    ("output_norm", "model.norm", None, True),
    ("output", "lm_head", None, False),
)
_LAYER: tuple[Row, ...] = (
    ("attn_norm", "input_layernorm", None, True),
    ("attn_q", "self_attn.q_proj", "num_attention_heads", False),
    ("attn_k", "self_attn.k_proj", "num_key_value_heads", False),
    ("attn_v", "self_attn.v_proj", None, False),
    ("attn_output", "self_attn.o_proj", None, False),
    ("ffn_norm", "post_attention_layernorm", None, True),
)
_DENSE: tuple[Row, ...] = (
    ("ffn_gate", "mlp.gate_proj", None, False),
    ("ffn_up", "mlp.up_proj", None, False),
    ("ffn_down", "mlp.down_proj", None, False),
)
_EXPERTS: tuple[Row, ...] = (  # {} is the expert's number: one source an expert
    ("ffn_gate_inp", "mlp.gate", None, True),
    ("ffn_gate_exps", "mlp.experts.{}.w1", None, False),
    ("ffn_up_exps", "mlp.experts.{}.w3", None, False),
    ("ffn_down_exps", "mlp.experts.{}.w2", None, False),
)


def architecture_keys(config: ModelConfig) -> Iterator[tuple[str, GGUFValueType, Any]]:
    """Every architecture key of this model, with its full name."""
    for name, kind, read in KEYS:
        value = read(config)
        if value is not None:
            yield f"{ARCHITECTURE}.{name}", kind, value


def tensor_specs(config: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor of this model that comes from the checkpoint, in file order."""
    for row in _TOP:
        if row[0] != "output" or not config.tie_word_embeddings:
            yield _spec(row, config)
    for layer in range(config.num_hidden_layers):
        for row in _LAYER + (_EXPERTS if config.num_experts else _DENSE):
            spec = _spec(row, config)
            sources = tuple(f"model.layers.{layer}.{source}" for source in spec.sources)
            yield replace(spec, name=f"blk.{layer}.{spec.name}", sources=sources)


def _spec(row: Row, config: ModelConfig) -> TensorSpec:
    name, source, heads, keep_f32 = row
    experts = range(config.num_experts if "{}" in source else 1)
    return TensorSpec(
        name=f"{name}.weight",
        sources=tuple(f"{source.format(expert)}.weight" for expert in experts),
        heads=getattr(config, heads) if heads else 0,
        keep_f32=keep_f32,
    )


def rotary_order(num_heads: int, head_dim: int) -> NDArray[np.int64]:
    """Which row of the checkpoint each row of the file is: in a head, 0, C2, 1, C2 + 1, …"""
    rows = np.arange(num_heads * head_dim).reshape(num_heads, 2, head_dim // 2)
    return rows.swapaxes(1, 2).reshape(-1)


def frequency_factors(config: ModelConfig) -> dict[str, NDArray[np.float32]]:
    """Tensors (C2,) that llama.cpp divides the base frequencies by, by name; none where keys say it all.

    Of longrope's two it takes the short ones while a context is no longer than the original one. Dynamic NTK has no
    form there, and needs none up to the trained context.
    """
    scaling = config.rope_scaling
    if scaling is None or scaling.kind in ("linear", "dynamic"):
        return {}
    if scaling.kind == "longrope":
        factors = {"long": scaling.long_factor, "short": scaling.short_factor}
        return {f"rope_factors_{name}.weight": np.array(row, np.float32) for name, row in factors.items()}
    from minicpm_edge.model.rope import inverse_frequencies

    base_C2 = inverse_frequencies(replace(config, rope_scaling=None))
    factors_C2: NDArray[np.float32] = (base_C2 / inverse_frequencies(config)).numpy()
    return {"rope_freqs.weight": factors_C2}
