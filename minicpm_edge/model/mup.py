"""muP: initial std and learning rate by width (paper, table 7), so that a learning rate found small serves large.

With m = d_model / d_base: 2-D tensors start with std init_std / sqrt(m) and have the learning rate lr / m; all
others keep the base learning rate. Logits are scaled by 1 / m and each block's output by scale_depth / sqrt(layers);
both of those live in the model (:mod:`minicpm_edge.model.transformer`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from minicpm_edge.model.config import ModelConfig

GroupName = Literal["embedding", "matrix", "router", "norm"]
EmbeddingRule = Literal["input", "matrix"]


@dataclass(frozen=True, kw_only=True)
class ParamGroup:
    """What a group of parameters shares: initial std (or ``ones``), learning-rate multiplier, weight decay or not."""

    init_std: float
    ones: bool = False
    lr_multiplier: float
    weight_decay: bool


def width_multiplier(config: ModelConfig) -> float:
    """m = d_model / d_base (paper, table 7)."""
    return config.hidden_size / config.dim_model_base


def param_groups(
    config: ModelConfig, *, embedding_rule: EmbeddingRule = "input"
) -> dict[GroupName, ParamGroup]:
    """Initialisation and learning rate of every group (paper, table 7): the one table.

    The paper does not say whether the (tied) embedding counts as 2-D. ``embedding_rule="input"`` (default)
    treats it as a lookup: base std and base learning rate, as other muP implementations do;
    ``"matrix"`` scales it like the other 2-D tensors. An untied head is a matrix. The router
    starts at N(0, 0.1) (paper, section 6.4).
    """
    m = width_multiplier(config)
    std = config.initializer_range
    matrix = ParamGroup(init_std=std / math.sqrt(m), lr_multiplier=1.0 / m, weight_decay=True)
    lookup = ParamGroup(init_std=std, lr_multiplier=1.0, weight_decay=True)
    return {
        "embedding": lookup if embedding_rule == "input" else matrix,
        "matrix": matrix,
        "router": ParamGroup(init_std=0.1, lr_multiplier=1.0 / m, weight_decay=True),
        "norm": ParamGroup(init_std=0.0, ones=True, lr_multiplier=1.0, weight_decay=False),
    }


def group_of(name: str) -> GroupName:
    """The group of a parameter, by its internal name (``layers.0.attention.qkv.weight``)."""
    if name.startswith("embedding."):
        return "embedding"
    if "norm." in name:
        return "norm"
    if ".router." in name:
        return "router"
    return "matrix"
