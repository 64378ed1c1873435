"""Compares the settings of an exported folder with its source: tokenizer, chat template, end of text, context."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from minicpm_edge.errors import UserError
from minicpm_edge.formats.generation import read_generation
from minicpm_edge.json_file import read_json
from minicpm_edge.text.tokenizer import CONFIG_FILE, Tokenizer
from minicpm_export.source import Source


def wrong_settings(folder: Path, source: Source) -> Iterator[str]:
    """A line for each setting that a reader of the folder would find to be another than the source's."""
    try:
        tokenizer = Tokenizer.load(folder)
        generation = read_generation(folder, tokenizer)
        config = read_json(folder / "config.json")
    except UserError as error:
        yield str(error)
        return
    if tokenizer.sha256 != source.tokenizer.sha256:
        yield "the tokenizer is not the model's"
    # Readers differ in where they look for it first.
    templates = {tokenizer.chat_template, read_json(folder / CONFIG_FILE).get("chat_template")}
    if templates != {source.tokenizer.chat_template}:
        yield "the chat template is not the model's"
    pairs = (
        ("begin of text", generation.bos_id, source.generation.bos_id),
        ("end of text", tokenizer.eos_id, source.tokenizer.eos_id),
        ("ends of an answer", set(generation.stop_ids), set(source.generation.stop_ids)),
        ("padding", generation.pad_id, source.generation.pad_id),
        ("sampling", generation.sampling, source.generation.sampling),
        ("context length", config.get("max_position_embeddings"), source.config.max_position_embeddings),
        ("vocabulary", config.get("vocab_size"), source.config.vocab_size),
        ("norm epsilon", config.get("rms_norm_eps"), source.config.rms_norm_eps),
    )
    for name, got, expected in pairs:
        if got != expected:
            yield f"{name}: {got}, the model's is {expected}"
