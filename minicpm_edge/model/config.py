"""The shape and scales of a model: :class:`ModelConfig`, read from and written as a Hugging Face ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from minicpm_edge.errors import UserError

# No field of a real config comes near; a broken file must not ask for terabytes.
MAX_DIMENSION = 1 << 24


# kind of rotary scaling → the fields that it uses, in the order of config.json
ROPE_SCALINGS: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": (
        "factor",
        "attention_factor",
        "short_factor",
        "long_factor",
        "original_max_position_embeddings",
    ),
    "dynamic": ("factor",),
}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are scaled past the trained context.

    ``linear`` is plain interpolation, ``llama3`` Llama 3's rule, ``longrope`` a factor for each frequency, one set for
    texts up to ``original_max_position_embeddings`` tokens and one for longer ones (LongRoPE, arXiv 2402.13753), and
    ``dynamic`` NTK scaling by the text's length, beyond ``max_position_embeddings`` only.
    """

    kind: Literal["linear", "llama3", "longrope", "dynamic"]
    factor: float | None = None
    """How many times the context grows; longrope needs it only for the default of ``attention_factor``."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float | None = None
    """longrope: factor on cosines and sines; by default the one that the paper derives from ``factor``."""
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if (
            not isinstance(self.original_max_position_embeddings, int)
            or self.original_max_position_embeddings < 2
        ):
            raise UserError(
                "rope_scaling: original_max_position_embeddings is "
                f"{self.original_max_position_embeddings!r}; it must be a whole number of tokens"
            )
        needed = ("short_factor", "long_factor") if self.kind == "longrope" else ("factor",)
        for name in ROPE_SCALINGS[self.kind]:
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else () if value is None else (value,)
            if not all(_is_positive(number) for number in numbers) or (name in needed and not numbers):
                raise UserError(f"rope_scaling ({self.kind}): {name} is {value!r}; it must be positive")

    @property
    def depends_on_length(self) -> bool:
        """Whether a longer text has other frequencies."""
        return self.kind in ("longrope", "dynamic")

    def to_dict(self) -> dict[str, object]:
        """The ``rope_scaling`` entry of config.json."""
        entries: dict[str, object] = {"rope_type": self.kind}
        # MiniCPM's own code reads the older name of this key.
        if self.kind != "llama3":
            entries["type"] = self.kind
        for name in ROPE_SCALINGS[self.kind]:
            value = getattr(self, name)
            if value is not None:
                entries[name] = list(value) if isinstance(value, tuple) else value
        return entries

    @staticmethod
    def from_dict(entry: Mapping[str, Any] | None) -> RopeScaling | None:
        """Parse ``rope_scaling`` (or the newer ``rope_parameters``); None and ``default`` mean no scaling.

        Raises:
            UserError: for a type of scaling that is not supported.
        """
        if not entry:
            return None
        kind = entry.get("rope_type", entry.get("type", "default"))
        if kind == "default":
            return None
        if kind not in ROPE_SCALINGS:
            raise UserError(
                f"rope_scaling type {kind!r} is not supported; supported: default, {', '.join(ROPE_SCALINGS)}"
            )
        if kind == "longrope" and "original_max_position_embeddings" not in entry:
            raise UserError("rope_scaling (longrope): original_max_position_embeddings is missing")
        values = {name: entry[name] for name in ROPE_SCALINGS[kind] if name in entry}
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return RopeScaling(kind=kind, **values)


def _is_positive(number: object) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < math.inf


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and scales of a decoder; field names are those of MiniCPM's ``config.json``.

    Dense when ``num_experts`` is 0, else every feed-forward is a mixture of experts. The gate's activation is
    ``silu``, or ``fatrelu``: the identity above ``hidden_act_param``, and 0 below (MiniCPM-S; ProSparse,
    arXiv 2402.13516).

    Raises:
        UserError: on values that no model can have, naming the field.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 64
    max_position_embeddings: int = 4096
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    scale_emb: float = 12.0
    scale_depth: float = 1.4
    dim_model_base: float = 256.0
    hidden_act: Literal["silu", "fatrelu"] = "silu"
    hidden_act_param: float = 0.0
    initializer_range: float = 0.1
    tie_word_embeddings: bool = True
    bos_token_id: int = 1
    eos_token_id: int = 2
    num_experts: int = 0
    num_experts_per_tok: int = 0

    def __post_init__(self) -> None:
        positive = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
            "num_key_value_heads head_dim max_position_embeddings"
        )
        for name in positive.split():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < MAX_DIMENSION:
                raise UserError(
                    f"model config: {name} is {value!r}; it must be a whole number from 1 to 2^24"
                )
        for name in ["rope_theta", "rms_norm_eps", "scale_emb", "scale_depth", "dim_model_base"]:
            value = getattr(self, name)
            if not _is_positive(value):
                raise UserError(f"model config: {name} is {value!r}; it must be a positive number")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"model config: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UserError(
                f"model config: head_dim {self.head_dim} is odd; rotary embeddings need an even one"
            )
        if self.rope_scaling is not None and self.rope_scaling.kind == "longrope":
            lengths = {len(self.rope_scaling.short_factor), len(self.rope_scaling.long_factor)}
            if lengths != {self.head_dim // 2}:
                raise UserError(
                    f"model config: rope_scaling has {max(lengths)} factors; head_dim {self.head_dim} needs "
                    f"{self.head_dim // 2} short and long ones"
                )
        threshold = self.hidden_act_param
        if not (isinstance(threshold, int | float) and 0 <= threshold < math.inf):
            raise UserError(f"model config: hidden_act_param is {threshold!r}; it must be a number from 0")
        if self.num_experts and self.hidden_act != "silu":
            raise UserError(f"model config: experts with hidden_act {self.hidden_act!r} are not supported")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise UserError(
                f"model config: num_experts_per_tok is {self.num_experts_per_tok}; "
                f"it must be from 1 to num_experts ({self.num_experts})"
            )

    @property
    def residual_scale(self) -> float:
        """Factor on each block's output before the residual add: scale_depth / sqrt(layers) (paper, table 7)."""
        return self.scale_depth / math.sqrt(self.num_hidden_layers)

    @property
    def logit_scale(self) -> float:
        """Factor on the logits: 1 / m with m = hidden_size / dim_model_base (paper, table 7)."""
        return self.dim_model_base / self.hidden_size

    @property
    def attention_factor(self) -> float:
        """Factor on the rotary cosines and sines: 1 but for longrope (arXiv 2402.13753, section 3.2)."""
        scaling = self.rope_scaling
        if scaling is None or scaling.kind != "longrope":
            return 1.0
        if scaling.attention_factor is not None:
            return scaling.attention_factor
        trained = scaling.original_max_position_embeddings
        growth = scaling.factor or self.max_position_embeddings / trained
        return math.sqrt(1 + math.log(growth) / math.log(trained)) if growth > 1 else 1.0

    def to_dict(self) -> dict[str, object]:
        """The ``config.json`` of this model (``MiniCPMForCausalLM`` and its keys)."""
        entries: dict[str, object] = {
            "architectures": ["MiniCPMForCausalLM"],
            "model_type": "minicpm",
            "attention_bias": False,
            "torch_dtype": "float32",
            "use_cache": True,
        }
        for field in fields(self):
            entries[field.name] = getattr(self, field.name)
        entries["rope_scaling"] = self.rope_scaling.to_dict() if self.rope_scaling else None
        if self.hidden_act == "silu":
            del entries["hidden_act_param"]
        if not self.num_experts:
            del entries["num_experts"], entries["num_experts_per_tok"]
        return entries

    @staticmethod
    def from_dict(entries: Mapping[str, Any]) -> ModelConfig:
        """Read a ``config.json``: MiniCPM as published, or the Llama family (Llama, Mistral, Granite).

        A Llama is a MiniCPM with neutral scales.

        Raises:
            UserError: for other architectures, for features that this decoder does not compute (biases, sliding
                windows, other activations), and for missing or malformed values.
        """
        family = _family(entries)
        if entries.get("hidden_act", "silu") not in ("silu", "fatrelu"):
            raise UserError(
                f"config.json: hidden_act {entries['hidden_act']!r} is not supported, only 'silu' and 'fatrelu'"
            )
        for name in ("attention_bias", "mlp_bias"):
            if entries.get(name):
                raise UserError(f"config.json: {name} is true; models with biases are not supported")
        if entries.get("sliding_window") and entries.get("use_sliding_window", True):
            raise UserError(
                "config.json: sliding_window is set; models trained with a window are not supported"
            )
        try:
            return _parse(entries, family)
        except KeyError as missing:
            raise UserError(f"config.json: the key {missing} is missing") from None
        except (TypeError, ValueError, OverflowError, AttributeError) as error:
            raise UserError(f"config.json: a value is of the wrong kind ({error})") from None


FAMILIES = {
    "MiniCPMForCausalLM": "minicpm",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "GraniteForCausalLM": "granite",
}


def _family(entries: Mapping[str, Any]) -> str:
    architectures = entries.get("architectures") or [None]
    name = architectures[0] if isinstance(architectures, list) else architectures
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(
            f"config.json: architecture {name!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]


def _parse(entries: Mapping[str, Any], family: str) -> ModelConfig:
    hidden, heads = entries["hidden_size"], entries["num_attention_heads"]
    layers = entries["num_hidden_layers"]
    rope = entries.get("rope_parameters") or {}
    scaling = entries.get("rope_scaling") or rope
    if isinstance(trained := entries.get("original_max_position_embeddings"), int):
        scaling = {"original_max_position_embeddings": trained, **scaling}
    scales: dict[str, Any] = _SCALES[family](entries, hidden, layers)
    optional = (
        "max_position_embeddings rms_norm_eps initializer_range num_experts num_experts_per_tok "
        "bos_token_id eos_token_id hidden_act hidden_act_param"
    )
    values = {name: entries[name] for name in optional.split() if entries.get(name) is not None}
    # Llama 3 lists several; the first ends a document.
    if isinstance(values.get("eos_token_id"), list):
        values["eos_token_id"] = values["eos_token_id"][0]
    # The published MiniCPM configs and transformers disagree on the default: MiniCPM ties, Llama does not.
    tied = entries.get("tie_word_embeddings", family == "minicpm")
    return ModelConfig(
        vocab_size=entries["vocab_size"],
        hidden_size=hidden,
        intermediate_size=entries["intermediate_size"],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=entries.get("num_key_value_heads") or heads,
        head_dim=entries.get("head_dim") or hidden // heads,
        rope_theta=float(entries.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
        rope_scaling=RopeScaling.from_dict(scaling),
        tie_word_embeddings=bool(tied),
        **scales,
        **values,
    )


def _minicpm_scales(entries: Mapping[str, Any], hidden: int, layers: int) -> dict[str, float]:
    return {name: float(entries[name]) for name in ("scale_emb", "scale_depth", "dim_model_base")}


def _llama_scales(entries: Mapping[str, Any], hidden: int, layers: int) -> dict[str, float]:
    return {"scale_emb": 1.0, "scale_depth": math.sqrt(layers), "dim_model_base": float(hidden)}


def _granite_scales(entries: Mapping[str, Any], hidden: int, layers: int) -> dict[str, float]:
    head_dim = entries.get("head_dim") or hidden // entries["num_attention_heads"]
    if not math.isclose(entries.get("attention_multiplier", 1.0), head_dim**-0.5, rel_tol=1e-6):
        raise UserError("config.json: attention_multiplier is not 1/sqrt(head_dim); it is not supported")
    return {
        "scale_emb": float(entries.get("embedding_multiplier", 1.0)),
        "scale_depth": float(entries.get("residual_multiplier", 1.0)) * math.sqrt(layers),
        "dim_model_base": hidden / float(entries.get("logits_scaling", 1.0)),
    }


_SCALES = {"minicpm": _minicpm_scales, "llama": _llama_scales, "granite": _granite_scales}
