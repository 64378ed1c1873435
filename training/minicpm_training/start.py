"""The model that a run starts from: random weights of the recipe's shape, or a checkpoint, transformed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from minicpm_edge.errors import UserError
from minicpm_edge.formats.checkpoint import load_checkpoint, read_config
from minicpm_edge.formats.resolve import resolve_model
from minicpm_edge.model.config import ModelConfig
from minicpm_edge.model.transformer import MiniCPM
from minicpm_edge.model.transforms import untie, upcycle, with_context
from minicpm_edge.text.tokenizer import Tokenizer
from minicpm_training.recipe.schema import Recipe
from minicpm_training.recipe.sections import InitSection


def model_config(recipe: Recipe, tokenizer: Tokenizer | None) -> ModelConfig:
    """The config of the recipe's model for this tokenizer (None: there is none yet).

    Raises:
        UserError: where the stages' sequences, or the tokenizer's ids, do not fit the model.
    """
    vocab_size = None if tokenizer is None else tokenizer.vocab_size
    if recipe.init is None:
        config = recipe.model.config(vocab_size=vocab_size)
    else:
        config = _transformed_config(read_config(_checkpoint(recipe.init)), recipe.init)
    check_fits(config, recipe, vocab_size)
    return config


def check_fits(config: ModelConfig, recipe: Recipe, vocab_size: int | None) -> None:
    """Raises :class:`UserError` where the stages' sequences, or so many ids, do not fit a model of that config."""
    key = "model" if recipe.init is None else "init"
    if vocab_size is not None and vocab_size > config.vocab_size:
        owner = "model.vocab_size" if recipe.init is None else "the vocabulary of init.path,"
        raise UserError(f"{owner} {config.vocab_size} is smaller than the tokenizer's {vocab_size}")
    longest = max(stage.sequence_length for stage in recipe.plan.stages)
    if config.max_position_embeddings < longest:
        raise UserError(
            f"data.sequence_length {longest} is longer than the model's context "
            f"{config.max_position_embeddings}: raise {key}.max_position_embeddings"
        )


def starting_model(recipe: Recipe, config: ModelConfig, device: torch.device) -> MiniCPM:
    """The model before the first step, float32, on a device.

    Raises:
        UserError: for an ``init.path`` that is no checkpoint, or cannot be transformed so.
    """
    if recipe.init is None:
        with torch.device(device):
            model = MiniCPM(config)
        model.init_weights(seed=recipe.seed, embedding_rule=recipe.model.embedding_rule)
        return model
    init = recipe.init
    model = load_checkpoint(_checkpoint(init), device=device)
    if init.untie:
        model = untie(model)
    if init.upcycle:
        model = upcycle(
            model,
            num_experts=init.upcycle.experts,
            num_experts_per_tok=init.upcycle.top_k,
            seed=recipe.seed,
        )
    if init.rope_theta or init.max_position_embeddings:
        model = with_context(
            model, rope_theta=init.rope_theta, max_position_embeddings=init.max_position_embeddings
        )
    return model.train()


def settled(recipe: Recipe) -> Recipe:
    """The recipe with ``init.path`` the very checkpoint: a run that it names may have a newer one tomorrow."""
    if recipe.init is None:
        return recipe
    return recipe.with_changes(init={"path": str(_checkpoint(recipe.init))})


def _transformed_config(config: ModelConfig, init: InitSection) -> ModelConfig:
    """What the transforms of ``init`` make of a config, without the weights."""
    if init.upcycle and config.num_experts:
        raise UserError(f"init.upcycle: {init.path} is a mixture of experts already")
    changes: dict[str, Any] = {}
    if init.untie:
        changes["tie_word_embeddings"] = False
    if init.upcycle:
        changes |= {"num_experts": init.upcycle.experts, "num_experts_per_tok": init.upcycle.top_k}
    for key in ("rope_theta", "max_position_embeddings"):
        if getattr(init, key) is not None:
            changes[key] = getattr(init, key)
    return dataclasses.replace(config, **changes)


def _checkpoint(init: InitSection) -> Path:
    model = resolve_model(init.path)
    if model.kind != "hf":
        raise UserError(
            f"init.path {init.path} is an export: give a run, a checkpoint or a Hugging Face folder"
        )
    return model.path
