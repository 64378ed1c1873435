"""``eval``: bits per byte and perplexity of a model on tokenized datasets."""

from __future__ import annotations

import argparse
import json

from minicpm_edge.errors import UserError
from minicpm_training.recipe.files import saved_recipe
from minicpm_training.run import Run


def evaluate(arguments: argparse.Namespace) -> int:
    """Print bits per byte and perplexity of a model on prepared sets."""
    from minicpm_edge.formats.checkpoint import load_checkpoint
    from minicpm_edge.formats.resolve import resolve_model
    from minicpm_edge.text.tokenizer import Tokenizer
    from minicpm_training.evaluation import Validation
    from minicpm_training.hardware import choose_device

    located = resolve_model(arguments.model)
    if located.kind != "hf":
        raise UserError(f"{located.path} is an export; `eval` measures a run or a Hugging Face folder")
    for option, value in (("--tokens", arguments.tokens), ("--length", arguments.length)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: give at least 1")
    model = load_checkpoint(located.path, device=choose_device(arguments.device))
    tokenizer = Tokenizer.load(located.path)
    length = arguments.length
    if length is None:
        # A run may have been trained on shorter sequences than its model has positions.
        run = Run(folder=located.run) if located.run else None
        length = (
            saved_recipe(run.trunk.recipe_path).data.sequence_length
            if run
            else model.config.max_position_embeddings
        )
    results = {}
    for folder in arguments.data:
        validation = Validation.open(
            folder,
            tokenizer,
            sequence_length=length,
            max_tokens=arguments.tokens,
        )
        results[str(folder)] = validation.measure(model).to_dict()
    if arguments.json:
        print(json.dumps({"model": str(located.path), "results": results}, indent=2))
        return 0
    print(f"model {located.path}")
    for name, result in results.items():
        print(
            f"{name}: {result['bits_per_byte']:.4f} bits per byte, perplexity {result['perplexity']:.2f} per token, "
            f"{result['num_tokens']:,} tokens"
        )
    return 0
