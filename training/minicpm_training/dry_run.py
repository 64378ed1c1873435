"""What a recipe would do, worked out without training: sizes, cost, memory, schedule and mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minicpm_edge.cli.progress import duration
from minicpm_edge.model.config import ModelConfig
from minicpm_edge.model.transformer import count_parameters
from minicpm_edge.text.tokenizer import Tokenizer
from minicpm_training.data.tokenized_dataset import TokenizedDataset
from minicpm_training.hardware import choose_device, choose_precision, flops_per_token, peak_flops
from minicpm_training.recipe.plan import Stage
from minicpm_training.recipe.schema import Recipe
from minicpm_training.recipe.sections import Source
from minicpm_training.start import model_config

ASSUMED_MFU = 0.4
# Python, torch and their scratch memory. With it the estimate was within 3 % of the peak seen on a CPU (tiny, 8,192
# and 32,768 tokens a micro-batch, bf16 and fp32: 1.5 to 3.5 GiB).
LIBRARY_BYTES = 1 << 30
LOGIT_CHUNK_TOKENS = 4096  # tokens of logits that the loss holds at once, at most


def plan(recipe: Recipe, *, num_processes: int = 1) -> dict[str, Any]:
    """The whole plan as plain values, for printing and for ``--json``. Sets and tokenizer may be missing yet.

    Micro-batches and memory are those of each process.
    """
    config, vocabulary = _config(recipe)
    schedule, steps = recipe.lr_schedule(), recipe.total_steps
    num_active = count_parameters(config, active=True)
    stages = recipe.plan.stages
    device = choose_device(recipe.device)
    precision = choose_precision(recipe.precision, device)
    peak, peak_source = peak_flops(device, precision)
    if device.type == "cuda":  # one each; CPUs are shared
        peak *= num_processes
    total_flops = sum(
        flops_per_token(config, num_active, stage.sequence_length) * stage.num_steps * stage.batch_tokens
        for stage in stages
    )
    marks = {
        "first": 0,
        "end of warm-up": max(0, recipe.warmup_steps - 1),
        "end of stable": recipe.trunk_steps - 1,
        "middle of decay": (recipe.trunk_steps + steps) // 2,
        "last": steps - 1,
    }
    return {
        "name": recipe.name,
        "model": {
            "preset": recipe.model_name,
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "vocabulary": config.vocab_size,
            "vocabulary_from": vocabulary,
            "parameters": count_parameters(config, embeddings=True),
            "parameters_without_embedding": count_parameters(config),
        },
        "steps": steps,
        "batch_tokens": recipe.batch_tokens,
        "num_processes": num_processes,
        "micro_batches": -(
            -stages[0].sequences_per_step
            // num_processes
            // stages[0].sequences_per_micro_batch(recipe.micro_batch_tokens)
        ),
        "tokens": recipe.plan.num_tokens(steps),
        "flops": total_flops,
        "device": str(device),
        "precision": precision,
        "peak_flops": peak,
        "peak_flops_source": peak_source,
        "seconds_at_40_percent_of_peak": total_flops / (ASSUMED_MFU * peak),
        "memory_bytes": memory(
            recipe, config, half_precision=precision == "bf16", num_processes=num_processes
        ),
        "learning_rate": {
            name: {
                "step": step + 1,
                "stage": schedule.stage(step),
                "lr": recipe.schedule.peak_lr * schedule.multiplier(step),
            }
            for name, step in marks.items()
            if step < steps and (name != "middle of decay" or recipe.plan.branch)
        },
        "mixture": {
            name: _mixture(stage.sources, stage.num_steps * stage.batch_tokens)
            for name, stage in zip(_names(stages), stages, strict=True)
        },
    }


def memory(
    recipe: Recipe, config: ModelConfig, *, half_precision: bool, num_processes: int = 1
) -> dict[str, int]:
    """An estimate in bytes, for each process.

    Weights, gradients and two moments are float32; activations those that backward needs. A layer keeps, for each
    token: the residual (twice, with each norm's output), queries, keys and values before and after rotation, the mixed
    values, gate, up and their product. The loss holds one chunk of logits and its gradient.

    Of several processes each has its share of the float32 tensors and gathers what is at work: weights of embedding,
    head and two layers, gradients of embedding, head and one. Half-precision weights stay whole until backward.
    """
    size = 2 if half_precision else 4
    num_parameters = count_parameters(config, embeddings=True)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    attention = (3 * heads + 3 * kv_heads) * config.head_dim
    feed_forward = 3 * config.intermediate_size * max(1, config.num_experts_per_tok)
    per_layer = size * (2 * config.hidden_size + attention + feed_forward) + 4 * 2 * config.hidden_size
    num_tokens = max(
        min(
            stage.sequences_per_micro_batch(recipe.micro_batch_tokens),
            stage.sequences_per_step // num_processes,
        )
        * stage.sequence_length
        for stage in recipe.plan.stages
    )
    num_in_layer = count_parameters(config) // config.num_hidden_layers
    num_outside = num_parameters - num_in_layer * config.num_hidden_layers
    parts = {
        "weights": 4 * num_parameters // num_processes,
        "gradients": 4 * num_parameters // num_processes,
        "optimizer": 8 * num_parameters // num_processes,
        "gathered": 4 * (2 * num_outside + 3 * num_in_layer) if num_processes > 1 else 0,
        "half_precision_weights": 2 * num_parameters if half_precision else 0,
        "activations": num_tokens * config.num_hidden_layers * per_layer,
        "libraries": LIBRARY_BYTES,
        "logits": 2 * 4 * min(num_tokens, LOGIT_CHUNK_TOKENS) * config.vocab_size,
    }
    return {**parts, "total": sum(parts.values())}


def render(summary: Mapping[str, Any]) -> str:
    """The plan as text."""
    model, memory_bytes, num_processes = summary["model"], summary["memory_bytes"], summary["num_processes"]
    each = f" for each of {num_processes} processes" if num_processes > 1 else ""
    lines = [
        f"run           {summary['name'] or '(unnamed)'}",
        f"model         {model['preset']}: {model['layers']} layers, width {model['width']}, "
        f"vocabulary {model['vocabulary']:,} (of the {model['vocabulary_from']})",
        f"parameters    {model['parameters']:,}, without the embedding {model['parameters_without_embedding']:,}",
        f"tokens        {summary['tokens']:,} = {summary['steps']:,} steps of {summary['batch_tokens']:,} "
        f"in {summary['micro_batches']} micro-batches" + each,
        f"FLOPs         {summary['flops']:.3g}; at 40 % of this machine's {summary['peak_flops']:.3g} FLOP/s "
        f"({summary['peak_flops_source']}) {duration(summary['seconds_at_40_percent_of_peak'])}",
        f"device        {summary['device']}, {summary['precision']}",
        f"memory        about {memory_bytes['total'] / 2**30:.2f} GiB{each}: "
        + ", ".join(
            f"{name.replace('_', ' ')} {value / 2**30:.2f}"
            for name, value in memory_bytes.items()
            if value and name != "total"
        ),
        "schedule",
    ]
    lines += [
        f"  step {mark['step']:<10,} {mark['stage']:<8} lr {mark['lr']:.3e}   {name}"
        for name, mark in summary["learning_rate"].items()
    ]
    for stage, sources in summary["mixture"].items():
        lines.append(f"mixture, {stage}")
        lines += [_render_source(source) for source in sources]
    return "\n".join(lines)


def _render_source(source: Mapping[str, Any]) -> str:
    start = f"  {source['share']:7.2%}  {source['tokens']:>16,} tokens  "
    if source["available_tokens"] is None:
        return f"{start}{source['path']} (not prepared yet)"
    return f"{start}{source['epochs']:6.2f} epochs of {source['available_tokens']:,}  {source['path']}"


def _names(stages: Sequence[Stage]) -> list[str]:
    """Names of the stages, numbered where several have the same."""
    names = [stage.name for stage in stages]
    return [
        f"{name} {names[: index + 1].count(name)}" if names.count(name) > 1 else name
        for index, name in enumerate(names)
    ]


def _config(recipe: Recipe) -> tuple[ModelConfig, str]:
    if Path(recipe.data.tokenizer).exists():
        return model_config(recipe, Tokenizer.load(recipe.data.tokenizer)), "tokenizer"
    return model_config(recipe, None), "preset: there is no tokenizer yet"


def _mixture(sources: tuple[Source, ...], tokens: int) -> list[dict[str, Any]]:
    total_weight = sum(source.weight for source in sources)
    entries = []
    for source in sources:
        share = source.weight / total_weight
        available = _num_tokens(Path(source.path))
        entries.append(
            {
                "path": source.path,
                "share": share,
                "tokens": round(share * tokens),
                "available_tokens": available,
                "epochs": share * tokens / available if available else None,
            }
        )
    return entries


def _num_tokens(folder: Path) -> int | None:
    return TokenizedDataset.open(folder).num_tokens if folder.exists() else None
