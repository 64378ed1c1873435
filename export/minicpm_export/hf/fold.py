"""MiniCPM's scales multiplied into its weights, so that a plain Llama computes the same function.

The residual scale goes into the two projections that end a branch, the embedding scale into the embedding, and the
logit scale into the last norm. A tied embedding stays tied: what it brings into the logits the norm takes out again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import frexp, prod

import torch
from torch import Tensor

from minicpm_edge.formats.checkpoint import LazyTensor
from minicpm_edge.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ScaledTensor:
    """A tensor times a number, in F32: products of 16-bit weights do not fit into 16 bits."""

    source: LazyTensor
    scale: float

    @property
    def num_bytes(self) -> int:
        """Its size as it is written."""
        return prod(self.source.shape) * self._dtype.itemsize

    @property
    def _dtype(self) -> torch.dtype:
        # Powers of two only move the exponent.
        return self.source.dtype if frexp(self.scale)[0] == 0.5 else torch.float32

    def read(self) -> Tensor:
        """The product, rounded once."""
        return (self.source.read().double() * self.scale).to(self._dtype)


def fold_scales(
    config: ModelConfig, tensors: Mapping[str, LazyTensor]
) -> dict[str, LazyTensor | ScaledTensor]:
    """The tensors of a Llama by Hugging Face name; those without a scale are as they were."""
    folded: dict[str, LazyTensor | ScaledTensor] = {}
    for name, tensor in tensors.items():
        scale = _scale(config, name)
        folded[name] = tensor if scale == 1.0 else ScaledTensor(source=tensor, scale=scale)
    return folded


def _scale(config: ModelConfig, name: str) -> float:
    if name == "model.embed_tokens.weight":
        return config.scale_emb
    if name == "model.norm.weight":
        return config.logit_scale / (config.scale_emb if config.tie_word_embeddings else 1.0)
    ends_branch = name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight"))
    return config.residual_scale if ends_branch else 1.0
