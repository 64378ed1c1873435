"""From one model to a larger or longer one with the same weights: where a stage of the paper starts from another's end.

Each takes a model on the CPU or a device and returns a new one there; tensors that do not change are shared.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from minicpm_edge.model.config import ModelConfig
from minicpm_edge.model.moe import MixtureOfExperts
from minicpm_edge.model.mup import param_groups
from minicpm_edge.model.transformer import MiniCPM


def untie(model: MiniCPM) -> MiniCPM:
    """A head of its own that begins as a copy of the embedding: the same logits (paper, section 6.3).

    An untied model comes back as it is.
    """
    if model.head is not None:
        return model
    untied = _like(model, replace(model.config, tie_word_embeddings=False))
    assert untied.head is not None
    untied.head.weight = nn.Parameter(model.embedding.weight.detach().clone())
    return untied


def upcycle(model: MiniCPM, *, num_experts: int, num_experts_per_tok: int, seed: int) -> MiniCPM:
    """Sparse upcycling (paper, section 6.4): every expert a copy of the dense feed-forward, routers N(0, 0.1).

    The chosen experts' weights sum to 1, so that the logits are the dense model's but for rounding.

    Raises:
        ValueError: for a model that has experts already.
    """
    if model.config.num_experts:
        raise ValueError("the model is a mixture of experts already")
    config = replace(model.config, num_experts=num_experts, num_experts_per_tok=num_experts_per_tok)
    upcycled = _like(model, config)
    router_std = param_groups(config)["router"].init_std
    generator = torch.Generator(device=model.embedding.weight.device).manual_seed(seed)
    for layer, dense in zip(upcycled.layers, model.layers, strict=True):
        experts = layer.feed_forward
        assert isinstance(experts, MixtureOfExperts)
        for name in ("gate_up", "down"):
            weight = dense.get_parameter(f"feed_forward.{name}.weight").detach()
            setattr(experts, name, nn.Parameter(weight.expand(num_experts, *weight.shape).clone()))
        router = torch.empty(experts.router.weight.shape, device=weight.device, dtype=weight.dtype)
        experts.router.weight = nn.Parameter(router.normal_(std=router_std, generator=generator))
    return upcycled


def with_context(
    model: MiniCPM, *, rope_theta: float | None = None, max_position_embeddings: int | None = None
) -> MiniCPM:
    """The same weights with another RoPE base (ABF, paper section 6.3) and another number of positions.

    Another base turns other positions otherwise: only what follows training is a model for the longer context.
    """
    config = replace(
        model.config,
        rope_theta=model.config.rope_theta if rope_theta is None else rope_theta,
        max_position_embeddings=max_position_embeddings or model.config.max_position_embeddings,
    )
    return _like(model, config)


def _like(model: MiniCPM, config: ModelConfig) -> MiniCPM:
    """A model of another config with the parameters of ``model`` that both have; the others are left on meta."""
    with torch.device("meta"):
        other = MiniCPM(config)
    own = dict(model.named_parameters())
    for name, parameter in list(other.named_parameters()):
        if name in own and own[name].shape == parameter.shape:
            module, _, key = name.rpartition(".")
            setattr(other.get_submodule(module), key, own[name])
    other.train(model.training)
    other.inv_freq_C2 = model.inv_freq_C2
    other.reset_buffers()
    return other
