"""MiniCPM's decoder with its KV cache as one ONNX graph, built from tables.

Matrices are either fp32 (``MatMul``) or int8 (``MatMulNBits``: 8 bits, a scale for each 32 weights). Three scales are
multiplied into weights on the way: the residual scale into the projections that end a branch, and the logit scale into
the last norm. What is left is a plain decoder, which ONNX Runtime, onnxruntime-genai and transformers.js run
as it is. Heads keep the checkpoint's layout: ``GroupQueryAttention`` rotates halves.

Legend: B batch, T new tokens, P past tokens, S = P + T, D model, C head dim, C2 half of it, K kv heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from minicpm_kernels import rope_tables
from numpy.typing import NDArray
from onnx import TensorProto, helper

from minicpm_edge.errors import UserError
from minicpm_edge.formats.checkpoint import HFStateDict
from minicpm_edge.model.config import ModelConfig
from minicpm_edge.model.rope import inverse_frequencies
from minicpm_export.onnx.weights import BLOCK, ZERO_POINT, Initializers, quantize_rows

MICROSOFT = "com.microsoft"
OPSET, MICROSOFT_OPSET, IR_VERSION = 17, 1, 8  # old enough for every runtime of the last years
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CACHE = ("key", "value")

Scale = Callable[[ModelConfig], float]


def _residual(config: ModelConfig) -> float:
    return config.residual_scale


def _one(config: ModelConfig) -> float:
    return 1.0


# matrix of a layer → the published weights whose rows it stacks, and the scale multiplied in
MATRICES: Mapping[str, tuple[tuple[str, ...], Scale]] = {
    "qkv": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), _one),
    "attention_out": (("self_attn.o_proj",), _residual),
    "gate": (("mlp.gate_proj",), _one),
    "up": (("mlp.up_proj",), _one),
    "down": (("mlp.down_proj",), _residual),
}


@dataclass(kw_only=True)
class Builder:
    """The graph while it grows: nodes in order, and where weights come from and go to."""

    config: ModelConfig
    tensors: HFStateDict
    initializers: Initializers
    int8: bool
    report: Callable[[str], None]
    nodes: list[onnx.NodeProto] = field(default_factory=list)

    def node(
        self, op: str, inputs: list[str], outputs: list[str] | str, *, domain: str = "", **attributes: Any
    ) -> str:
        """Append a node; returns its first output."""
        names = [outputs] if isinstance(outputs, str) else outputs
        self.nodes.append(
            helper.make_node(op, inputs, names, name=f"/{names[0]}/{op}", domain=domain, **attributes)
        )
        return names[0]

    def constant(self, name: str, value: Any, dtype: type[np.generic]) -> str:
        """A small constant."""
        return self.initializers.add(name, np.asarray(value, dtype=dtype))

    def weight(self, sources: tuple[str, ...], scale: float = 1.0) -> NDArray[np.float32]:
        """Published tensors stacked by rows, in fp32, times a scale."""
        parts = [self.tensors[source].read().float() for source in sources]
        stacked = torch.cat(parts) if len(parts) > 1 else parts[0]
        array: NDArray[np.float32] = (stacked if scale == 1.0 else stacked * scale).numpy()
        return array

    def matmul(self, x: str, name: str, weight_NK: NDArray[np.float32], out: str) -> str:
        """``out`` = ``x`` · weightᵀ."""
        if not self.int8:
            return self.node("MatMul", [x, self.initializers.add(f"{name}.weight", weight_NK.T)], out)
        return self.matmul_blocks(x, *self.blocks(name, weight_NK), weight_NK.shape, out)

    def blocks(self, name: str, weight_NK: NDArray[np.float32]) -> tuple[str, str]:
        """Store a matrix as 8-bit blocks; returns the names of bytes and scales."""
        bytes_NGB, scales_NG = quantize_rows(weight_NK)
        stored = self.initializers.add(f"{name}.weight_q8", bytes_NGB)
        return stored, self.initializers.add(f"{name}.weight_scales", scales_NG)

    def matmul_blocks(self, x: str, blocks: str, scales: str, shape: tuple[int, ...], out: str) -> str:
        """``MatMulNBits``; accuracy level 4 lets the kernel compute in int8, ten times faster than without."""
        sizes = {"N": shape[0], "K": shape[1], "bits": 8, "block_size": BLOCK, "accuracy_level": 4}
        return self.node("MatMulNBits", [x, blocks, scales], out, domain=MICROSOFT, **sizes)


def build(
    config: ModelConfig,
    tensors: HFStateDict,
    initializers: Initializers,
    *,
    int8: bool,
    report: Callable[[str], None],
) -> onnx.ModelProto:
    """The whole graph. :class:`UserError` for models that it cannot express.

    Inputs: ``input_ids`` (B, T) int64, ``attention_mask`` (B, S) int64 with ones from the left,
    ``past_key_values.N.key`` and ``.value`` (B, K, P, C) float32. Outputs: ``logits`` (B, T, V) float32,
    ``present.N.key`` and ``.value`` (B, K, S, C).
    """
    if config.num_experts:
        raise UserError("a mixture of experts has no ONNX form yet; --gguf exports it")
    if int8 and config.hidden_size % BLOCK:
        raise UserError(
            f"hidden_size {config.hidden_size} is no multiple of {BLOCK}; export ONNX with --quant F32"
        )
    builder = Builder(config=config, tensors=tensors, initializers=initializers, int8=int8, report=report)
    _lengths(builder)
    _rotary_tables(builder)
    residual, head = _embed(builder)
    branch: str | None = None
    for layer in range(config.num_hidden_layers):
        report(f"building layer {layer + 1}/{config.num_hidden_layers}")
        residual, branch = _layer(builder, layer, residual, branch)
    x, _ = _norm(builder, "model.norm", residual, branch, "final", scale=config.logit_scale)
    head(x)
    graph = helper.make_graph(
        builder.nodes, "minicpm", list(_inputs(config)), list(_outputs(config)), initializers.tensors
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, MICROSOFT_OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="minicpm-edge")


def _lengths(builder: Builder) -> None:
    """``seqlens_k`` (B,) int32, the last position of each row, and ``total_length``, S, as attention asks for them."""
    one = builder.constant("one", [1], np.int64)
    builder.node("ReduceSum", ["attention_mask", one], "row_lengths", keepdims=0)
    builder.node("Sub", ["row_lengths", one], "last_positions")
    builder.node("Cast", ["last_positions"], "seqlens_k", to=TensorProto.INT32)
    builder.node("Shape", ["attention_mask"], "mask_shape")
    builder.node("Gather", ["mask_shape", builder.constant("axis_one", 1, np.int64)], "total_length_64")
    builder.node("Cast", ["total_length_64"], "total_length", to=TensorProto.INT32)


def _rotary_tables(builder: Builder) -> None:
    """``cos_cache`` and ``sin_cache`` (S, C2); of longrope's two, those of the text's length so far."""
    config = builder.config
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "longrope":
        _add_rotary_tables(builder, "", config.max_position_embeddings, 0)
        return
    trained = scaling.original_max_position_embeddings
    if config.max_position_embeddings <= trained:
        _add_rotary_tables(builder, "", config.max_position_embeddings, trained)
        return
    branches = {}
    for name, length in (("short", trained), ("long", config.max_position_embeddings)):
        _add_rotary_tables(builder, f"{name}_", length, length)
        copies = [
            helper.make_node("Identity", [f"{name}_{table}"], [f"{name}_{table}_taken"])
            for table in ("cos_cache", "sin_cache")
        ]
        outputs = [
            helper.make_tensor_value_info(
                f"{name}_{table}_taken", TensorProto.FLOAT, [length, config.head_dim // 2]
            )
            for table in ("cos_cache", "sin_cache")
        ]
        branches[name] = helper.make_graph(copies, f"{name}_rotary_tables", [], outputs)
    limit = builder.constant("trained_length", trained, np.int64)
    builder.node("Greater", ["total_length_64", limit], "is_long")
    builder.node(
        "If",
        ["is_long"],
        ["cos_cache", "sin_cache"],
        then_branch=branches["long"],
        else_branch=branches["short"],
    )


def _add_rotary_tables(builder: Builder, prefix: str, num_positions: int, length: int) -> None:
    """Tables for so many positions, of texts of that length."""
    inv_freq_C2 = inverse_frequencies(builder.config, length)
    cos_SC2, sin_SC2 = rope_tables(torch.arange(num_positions), inv_freq_C2, builder.config.attention_factor)
    builder.initializers.add(f"{prefix}cos_cache", cos_SC2.numpy())
    builder.initializers.add(f"{prefix}sin_cache", sin_SC2.numpy())


def _embed(builder: Builder) -> tuple[str, Callable[[str], str]]:
    """The scaled embeddings of ``input_ids`` and how to make ``logits``; a tied matrix is stored once for both."""
    config = builder.config
    table_VD = builder.weight((EMBEDDING,))
    scale = builder.constant("embedding_scale", config.scale_emb, np.float32)
    if builder.int8:
        blocks, scales = builder.blocks("embedding", table_VD)
        rows = _embed_blocks(builder, blocks, scales)
    else:
        rows = builder.node(
            "Gather", [builder.initializers.add("embedding.weight", table_VD), "input_ids"], "rows"
        )
    residual = builder.node("Mul", [rows, scale], "embedded")
    shape = table_VD.shape

    def head(x: str) -> str:
        if not config.tie_word_embeddings:
            return builder.matmul(x, "head", builder.weight((HEAD,)), "logits")
        if builder.int8:
            return builder.matmul_blocks(x, blocks, scales, shape, "logits")
        transposed = builder.node("Transpose", ["embedding.weight"], "head.weight", perm=[1, 0])
        return builder.node("MatMul", [x, transposed], "logits")

    return residual, head


def _embed_blocks(builder: Builder, blocks: str, scales: str) -> str:
    """Rows of a matrix of 8-bit blocks, by ordinary operators: (byte - 128) · scale."""
    zero = builder.constant("zero_point", ZERO_POINT, np.float32)
    last = builder.constant("last_axis", [-1], np.int64)
    shape = builder.constant("row_shape", [0, 0, builder.config.hidden_size], np.int64)
    builder.node("Gather", [blocks, "input_ids"], "row_bytes")
    builder.node("Cast", ["row_bytes"], "row_floats", to=TensorProto.FLOAT)
    builder.node("Sub", ["row_floats", zero], "row_values")
    builder.node("Gather", [scales, "input_ids"], "row_scales")
    builder.node("Unsqueeze", ["row_scales", last], "row_scales_4d")
    builder.node("Mul", ["row_values", "row_scales_4d"], "row_blocks")
    return builder.node("Reshape", ["row_blocks", shape], "rows")


def _layer(builder: Builder, layer: int, residual: str, branch: str | None) -> tuple[str, str]:
    """(residual, branch not yet added) → the same after this layer."""
    config, at = builder.config, f"layers.{layer}"

    def matmul(x: str, name: str) -> str:
        parts, scale = MATRICES[name]
        sources = tuple(f"model.layers.{layer}.{part}.weight" for part in parts)
        weight_NK = builder.weight(sources, scale(config))
        return builder.matmul(x, f"{at}.{name}", weight_NK, f"{at}.{name}")

    published = f"model.layers.{layer}"
    x, residual = _norm(builder, f"{published}.input_layernorm", residual, branch, f"{at}.attention_norm")
    mixed = builder.node(
        "GroupQueryAttention",
        [
            matmul(x, "qkv"),
            "",
            "",
            *(f"past_key_values.{layer}.{part}" for part in CACHE),
            "seqlens_k",
            "total_length",
            "cos_cache",
            "sin_cache",
        ],
        [f"{at}.mixed", *(f"present.{layer}.{part}" for part in CACHE)],
        domain=MICROSOFT,
        num_heads=config.num_attention_heads,
        kv_num_heads=config.num_key_value_heads,
        scale=config.head_dim**-0.5,
        do_rotary=1,
        rotary_interleaved=0,
    )
    branch = matmul(mixed, "attention_out")
    x, residual = _norm(
        builder, f"{published}.post_attention_layernorm", residual, branch, f"{at}.feed_forward_norm"
    )
    gate, up = matmul(x, "gate"), matmul(x, "up")
    if config.hidden_act == "fatrelu":
        activated = builder.node("ThresholdedRelu", [gate], f"{at}.fatrelu", alpha=config.hidden_act_param)
    else:
        sigmoid = builder.node("Sigmoid", [gate], f"{at}.sigmoid")
        activated = builder.node("Mul", [gate, sigmoid], f"{at}.silu")
    return residual, matmul(builder.node("Mul", [activated, up], f"{at}.gated"), "down")


def _norm(
    builder: Builder, published: str, residual: str, branch: str | None, name: str, scale: float = 1.0
) -> tuple[str, str]:
    """(normalised residual + branch, residual + branch)."""
    weight = builder.initializers.add(f"{name}.weight", builder.weight((f"{published}.weight",), scale))
    epsilon = builder.config.rms_norm_eps
    if branch is None:
        inputs = [residual, weight]
        return builder.node("SimplifiedLayerNormalization", inputs, name, axis=-1, epsilon=epsilon), residual
    added = f"{name}.residual"
    builder.node(
        "SkipSimplifiedLayerNormalization",
        [residual, branch, weight],
        [name, "", "", added],
        domain=MICROSOFT,
        epsilon=epsilon,
    )
    return name, added


def _inputs(config: ModelConfig) -> Iterator[onnx.ValueInfoProto]:
    yield helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
    yield helper.make_tensor_value_info(
        "attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]
    )
    yield from _cache(config, "past_key_values", "past_sequence_length")


def _outputs(config: ModelConfig) -> Iterator[onnx.ValueInfoProto]:
    shape: list[str | int] = ["batch_size", "sequence_length", config.vocab_size]
    yield helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)
    yield from _cache(config, "present", "total_sequence_length")


def _cache(config: ModelConfig, prefix: str, length: str) -> Iterator[onnx.ValueInfoProto]:
    shape: list[str | int] = ["batch_size", config.num_key_value_heads, length, config.head_dim]
    for layer in range(config.num_hidden_layers):
        for part in CACHE:
            yield helper.make_tensor_value_info(f"{prefix}.{layer}.{part}", TensorProto.FLOAT, shape)
