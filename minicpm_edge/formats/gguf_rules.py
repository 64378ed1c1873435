"""What the values in a GGUF header must be so that llama.cpp does not abort on them.

Checks the values that llama.cpp asserts, divides by or trusts; it reports missing and mistyped keys itself.
"""

from __future__ import annotations

import math

from minicpm_edge.formats.gguf_types import (
    FLOAT32,
    INT32,
    NUMBERS,
    STRING,
    Array,
    GGUFError,
    Metadata,
    Scalar,
)

MAX_LAYERS, MAX_EXPERTS, MAX_WIDTH = 512, 1024, 1 << 24
ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
# Kinds of tokenizer, and whether each falls back on tokens for single bytes.
TOKENIZERS: dict[object, bool] = {"gpt2": False, "llama": True, "gemma4": True}
BYTE_TOKENS = frozenset(b"<0x%02X>" % byte for byte in range(256))
# Architectures whose heads are rotated whole.
WHOLE_HEAD_ROPE = ("llama", "minicpm", "granite")


def check_values(metadata: Metadata) -> None:
    """Check the settings of the architecture and of the tokenizer.

    Raises:
        GGUFError: naming the key and what it may be.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, Scalar) or not isinstance(architecture.value, str):
        raise GGUFError("general.architecture is missing")
    settings = _Settings(metadata, architecture.value)
    layers = settings.integer("block_count", 1, MAX_LAYERS)
    width = settings.integer("embedding_length", 1, MAX_WIDTH)
    if settings.integer("embedding_length_out", 0, MAX_WIDTH) not in (None, 0, width):
        raise GGUFError(
            f"{architecture.value}.embedding_length_out is not the embedding_length of a language model"
        )
    settings.integer("context_length", 1, 2**31 - 1)
    settings.integer("nextn_predict_layers", 0, (layers or 1) - 1)
    settings.by_layer("feed_forward_length", layers)
    _check_heads(settings, architecture.value, layers, width)
    _check_experts(settings, layers)
    for name in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
        settings.number(name, 0.0)
    for name in ("rope.freq_base", "rope.scaling.factor"):
        settings.number(name, 1e-30)
    scaling = metadata.get(f"{architecture.value}.rope.scaling.type")
    if scaling is not None and not (isinstance(scaling, Scalar) and scaling.value in ROPE_SCALINGS):
        raise GGUFError(f"{architecture.value}.rope.scaling.type must be one of {', '.join(ROPE_SCALINGS)}")
    _check_tokenizer(metadata)


class _Settings:
    """The keys of one architecture. Absent ones read as None: whether they are needed llama.cpp decides."""

    def __init__(self, metadata: Metadata, architecture: str) -> None:
        self._metadata = metadata
        self._prefix = architecture

    def integer(self, name: str, low: int, high: int) -> int | None:
        values = self._values(name)
        for value in values or ():
            if not isinstance(value, int) or not low <= value <= high:
                raise GGUFError(f"{self._prefix}.{name} must be from {low} to {high}")
        return int(values[0]) if values else None

    def number(self, name: str, low: float) -> None:
        for value in self._values(name) or ():
            if not low <= value < math.inf:
                raise GGUFError(f"{self._prefix}.{name} must be a finite number, {low:g} or more")

    def by_layer(self, name: str, layers: int | None) -> list[int]:
        """One value for all layers, or one each (where 0 means that the layer has no such part)."""
        entry = self._metadata.get(f"{self._prefix}.{name}")
        low = 0 if isinstance(entry, Array) else 1
        self.integer(name, low, MAX_WIDTH)
        values = [int(value) for value in self._values(name) or ()]
        if isinstance(entry, Array) and len(values) != layers:
            raise GGUFError(f"{self._prefix}.{name} must have a value for each of the {layers} layers")
        return values * (layers or 1) if isinstance(entry, Scalar) else values

    def _values(self, name: str) -> tuple[int | float, ...] | None:
        entry = self._metadata.get(f"{self._prefix}.{name}")
        if entry is None:
            return None
        values = entry.elements if isinstance(entry, Array) else (entry.value,)
        numbers = tuple(value for value in values if not isinstance(value, str))
        if len(numbers) != (entry.length if isinstance(entry, Array) else 1):
            raise GGUFError(f"{self._prefix}.{name} must be a number")
        return numbers


def _check_heads(settings: _Settings, architecture: str, layers: int | None, width: int | None) -> None:
    heads = settings.by_layer("attention.head_count", layers)
    kv_heads = settings.by_layer("attention.head_count_kv", layers)
    for num_heads, num_kv_heads in zip(heads, kv_heads, strict=False):
        if num_kv_heads and num_heads % num_kv_heads:
            raise GGUFError(f"{num_heads} heads cannot share {num_kv_heads} key-value heads")
    key = settings.integer("attention.key_length", 1, MAX_WIDTH)
    settings.integer("attention.value_length", 1, MAX_WIDTH)
    rotated = settings.integer("rope.dimension_count", 0, MAX_WIDTH)
    if not heads or not heads[0] or width is None:
        return
    head_dim = key or width // heads[0]
    if head_dim < 1 or (architecture in WHOLE_HEAD_ROPE and rotated not in (None, head_dim)):
        raise GGUFError(f"{rotated} rotated dimensions do not fit heads of {head_dim}")


def _check_experts(settings: _Settings, layers: int | None) -> None:
    experts = settings.integer("expert_count", 0, MAX_EXPERTS) or 0
    used = settings.by_layer("expert_used_count", layers) if experts else []
    settings.integer("expert_used_count", 0, experts)
    if experts and not any(used):
        raise GGUFError(f"of {experts} experts none is used")
    settings.integer("expert_group_count", 0, max(experts - 1, 0))


def _check_tokenizer(metadata: Metadata) -> None:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        raise GGUFError("it has no tokenizer (tokenizer.ggml.tokens)")
    if not isinstance(tokens, Array) or tokens.type != STRING or not tokens.length:
        raise GGUFError("tokenizer.ggml.tokens must be a list of texts")
    if len(tokens.texts) != tokens.length:
        raise GGUFError("two entries of tokenizer.ggml.tokens are the same")
    model = metadata.get("tokenizer.ggml.model")
    name = model.value if isinstance(model, Scalar) else None
    if name not in TOKENIZERS:
        raise GGUFError(f"its tokenizer model is {name!r}; supported are {', '.join(map(str, TOKENIZERS))}")
    if TOKENIZERS[name] and not tokens.texts >= BYTE_TOKENS:
        raise GGUFError("its tokenizer lacks tokens for single bytes (<0x00> to <0xFF>)")
    for entry_name, kind in (("token_type", INT32), ("scores", FLOAT32)):
        entry = metadata.get(f"tokenizer.ggml.{entry_name}")
        fits = isinstance(entry, Array) and entry.type == kind and entry.length == tokens.length
        if entry is not None and not fits:
            raise GGUFError(
                f"tokenizer.ggml.{entry_name} must be {tokens.length} values of {NUMBERS[kind][0]}"
            )
