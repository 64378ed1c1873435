"""Compares what a GGUF says and holds with its source: every key, every token, every row of every tensor.

Figures over a text do not see a key that only matters later (context length, the end of text), and a quantised type's
limits are wide enough to hide one wrong matrix. Here keys are stated a second time, apart from the writer's tables, and
each row may differ by the most that its type's rounding costs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, TokenType
from gguf.quants import dequantize
from numpy.typing import NDArray

from minicpm_edge.formats.checkpoint import HFStateDict
from minicpm_edge.model.config import ModelConfig
from minicpm_edge.text.sentencepiece import USER_DEFINED, read_pieces
from minicpm_edge.text.tokenizer import Tokenizer
from minicpm_export.gguf.tensor_map import TensorSpec, frequency_factors, rotary_order, tensor_specs
from minicpm_export.gguf.tokenizer import SAMPLING_KEYS
from minicpm_export.source import Source

# type → the largest relative error of a row (root of the squares' sums) that rounding to it can cost. Of the float
# types and Q8_0, Q5_0 and Q4_0 it is the bound that their blocks imply, with one outlier a block; of the others twice
# what is measured on heavy-tailed rows. A row that belongs elsewhere is at 1.4.
ROUNDING: Mapping[str, float] = {
    "F32": 0.0,
    "F16": 1e-3,
    "BF16": 4e-3,
    "Q8_0": 0.025,
    "Q6_K": 0.08,
    "Q5_K": 0.15,
    "Q5_0": 0.18,
    "Q5_1": 0.18,
    "Q4_K": 0.28,
    "Q4_0": 0.36,
    "Q4_1": 0.36,
}
OTHER_ROUNDING = 0.5  # types of fewer bits
# Scales are halves: below this a weight is as good as nothing.
NEGLIGIBLE = 1e-5
CHUNK_WEIGHTS = 4 << 20


def compare_content(file: Path, source: Source) -> list[str]:
    """A line for each thing in the file that is not as in the source; empty where it is the model."""
    reader = GGUFReader(file)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return [
        *_wrong_keys(keys, source),
        *_wrong_tokens(keys, source.tokenizer, source.config),
        *_wrong_tensors(reader, source.state_dict(), source.config),
    ]


def _wrong_keys(keys: Mapping[str, Any], source: Source) -> Iterator[str]:
    expected = {f"minicpm.{name}": value for name, value in _architecture(source.config).items()}
    sampling = source.generation.sampling
    if sampling.get("do_sample", True):
        expected |= {key: sampling[name] for name, (key, _) in SAMPLING_KEYS.items() if name in sampling}
    stated = {name for name in keys if name.startswith(("minicpm.", "general.sampling."))}
    for name in sorted(stated | expected.keys()):
        got, value = keys.get(name), expected.get(name)
        close = isinstance(value, float) and isinstance(got, float) and math.isclose(got, value, rel_tol=1e-6)
        if got != value and not close:
            yield f"the key {name} is {got}, the model's {value}"


def _architecture(config: ModelConfig) -> dict[str, int | float | str]:
    """Every key of the architecture by llama.cpp's name."""
    expected: dict[str, int | float | str] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "embedding_scale": float(config.scale_emb),
        "residual_scale": config.scale_depth / math.sqrt(config.num_hidden_layers),
        "logit_scale": config.hidden_size / config.dim_model_base,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    if config.num_experts:
        expected |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind in ("linear", "longrope"):
        expected["rope.scaling.type"] = scaling.kind
        if scaling.factor is not None:
            expected["rope.scaling.factor"] = float(scaling.factor)
    if scaling is not None and scaling.kind == "longrope":
        expected["rope.scaling.original_context_length"] = scaling.original_max_position_embeddings
        expected["rope.scaling.attn_factor"] = float(config.attention_factor)
    return expected


def _wrong_tokens(keys: Mapping[str, Any], tokenizer: Tokenizer, config: ModelConfig) -> Iterator[str]:
    texts, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    if len(texts) != config.vocab_size or len(kinds) != config.vocab_size:
        yield f"the file has {len(texts)} tokens, the model {config.vocab_size}"
        return
    expected = _kinds(tokenizer)
    for text, index in tokenizer.vocab.items():
        if texts[index] != text:
            yield f"token {index} is {texts[index]!r}, the model's {text!r}"
        elif kinds[index] != expected[index]:
            got, wanted = TokenType(kinds[index]).name, expected[index].name
            yield f"the token {text!r} is of kind {got}, the model's {wanted}"
    if keys.get("tokenizer.chat_template") != (tokenizer.chat_template or None):
        yield "the chat template is not the model's"
    yield from _wrong_merges(keys, tokenizer)


def _kinds(tokenizer: Tokenizer) -> dict[int, TokenType]:
    """The kind of each token that the tokenizer has."""
    definition = tokenizer.definition
    kinds = dict.fromkeys(tokenizer.vocab.values(), TokenType.NORMAL)
    if not tokenizer.is_byte_level:
        bytes_ = [text for text in tokenizer.vocab if re.fullmatch("<0x[0-9A-F]{2}>", text)]
        kinds |= dict.fromkeys((tokenizer.vocab[text] for text in bytes_), TokenType.BYTE)
    pieces = read_pieces(tokenizer.sentencepiece) if tokenizer.sentencepiece is not None else []
    for index, piece in enumerate(pieces):
        found = piece.kind != USER_DEFINED or index in tokenizer.encode(f"a{piece.text}a")
        if tokenizer.vocab.get(piece.text) == index and found:
            kinds[index] = TokenType(piece.kind)
    for token in definition["added_tokens"]:
        kinds[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    unknown = definition["model"].get("unk_token")
    if unknown is not None and not tokenizer.is_byte_level:
        kinds[tokenizer.vocab[unknown]] = TokenType.UNKNOWN
    return kinds


def _wrong_merges(keys: Mapping[str, Any], tokenizer: Tokenizer) -> Iterator[str]:
    merges = [
        tuple(merge.split(" ", 1) if isinstance(merge, str) else merge)
        for merge in tokenizer.definition["model"]["merges"]
    ]
    if tokenizer.is_byte_level:
        if [tuple(merge.split(" ", 1)) for merge in keys["tokenizer.ggml.merges"]] != merges:
            yield "the merges are not the tokenizer's"
        return
    if keys.get("tokenizer.ggml.add_space_prefix") != tokenizer.adds_space:
        yield "the space before a text is not as the tokenizer has it"
    # llama.cpp merges by score: each result's must be below those of all merges before it.
    results = list(dict.fromkeys("".join(merge) for merge in merges))
    scores = np.array([keys["tokenizer.ggml.scores"][tokenizer.vocab[text]] for text in results])
    if not (np.diff(scores) < 0).all():
        yield "the scores do not give the order of the tokenizer's merges"


def _wrong_tensors(reader: GGUFReader, tensors: HFStateDict, config: ModelConfig) -> Iterator[str]:
    stored = {tensor.name: tensor for tensor in reader.tensors}
    factors = frequency_factors(config)
    specs = {spec.name: spec for spec in tensor_specs(config)}
    for name in sorted(stored.keys() ^ (specs.keys() | factors.keys())):
        yield f"the tensor {name} is {'one too many' if name in stored else 'missing'}"
    for name, row in factors.items():
        if name in stored and not np.array_equal(stored[name].data, row):
            yield f"the tensor {name} is not the model's"
    for name, spec in specs.items():
        if name in stored and (wrong := _worst_row(stored[name], spec, tensors, config)) is not None:
            number, error = wrong
            kind = stored[name].tensor_type.name
            yield f"the tensor {name} ({kind}) differs from the model's by {error:.0%} in row {number}"


def _worst_row(
    stored: Any, spec: TensorSpec, tensors: HFStateDict, config: ModelConfig
) -> tuple[int, float] | None:
    """(row, relative error) of the row that is furthest off, where it is further than rounding explains."""
    limit = ROUNDING.get(stored.tensor_type.name, OTHER_ROUNDING)
    order = torch.from_numpy(rotary_order(spec.heads, config.head_dim)) if spec.heads else None
    parts = [stored.data] if len(spec.sources) == 1 else list(stored.data)
    worst: tuple[int, float] | None = None
    for part, source in zip(parts, spec.sources, strict=True):
        weight = tensors[source].read()
        weight = weight[None] if weight.dim() == 1 else weight
        rows = part[None] if part.ndim == 1 else part
        step = max(1, CHUNK_WEIGHTS // weight.shape[1])
        for start in range(0, len(weight), step):
            taken = slice(start, start + step)
            expected = (weight[taken] if order is None else weight[order[taken]]).float().numpy()
            got = dequantize(rows[taken], GGMLQuantizationType(stored.tensor_type))
            number, error = _furthest(got, expected, limit)
            if error > 0 and (worst is None or error > worst[1]):
                worst = start + number, error
    return worst


def _furthest(got: NDArray[np.float32], expected: NDArray[np.float32], limit: float) -> tuple[int, float]:
    """(row, relative error) of the row furthest past its limit; an error of 0 where none is."""
    difference = np.linalg.norm(got.astype(np.float64) - expected, axis=1)
    norms = np.linalg.norm(expected.astype(np.float64), axis=1)
    floor = NEGLIGIBLE * math.sqrt(expected.shape[1]) if limit else 0.0
    past = np.where(difference <= limit * norms + floor, 0.0, difference / np.maximum(norms, floor or 1e-30))
    number = int(past.argmax())
    return number, float(past[number])


def describe(lines: Sequence[str], most: int = 5) -> list[str]:
    """The first few lines, and how many more there are: one fault in a table makes thousands."""
    return (
        list(lines) if len(lines) <= most else [*lines[:most], f"and {len(lines) - most} more of that kind"]
    )
