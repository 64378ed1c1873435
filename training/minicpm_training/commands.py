"""What the commands ``train``, ``decay``, ``runs`` and ``eval`` do, given their parsed arguments."""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minicpm_edge.cli import EXIT_INTERRUPTED
from minicpm_edge.errors import UserError
from minicpm_edge.progress import Progress
from minicpm_training.interrupts import stop_on_signals
from minicpm_training.recipe import Recipe
from minicpm_training.recipe_file import load_recipe, to_toml
from minicpm_training.run import Branch, Run, find_runs, new_run_folder, open_run

# What may change when a run goes on: its length, its decay, and everything that does not touch the numbers.
# Precision, device and compile change rounding only.
RESUMABLE = (
    "name",
    "micro_batch_tokens",
    "precision",
    "compile",
    "device",
    "data.tokenizer",  # the folder may move; prepared sets know the tokenizer by its hash
    "data.decay",
    "data.valid",
    "schedule.stable_tokens",
    "schedule.decay_tokens",
    "schedule.form",
    "schedule.floor",
    "schedule.half_life_tokens",
    "checkpoint",
    "evaluation",
    "sample",
    "log",
)


def train(arguments: argparse.Namespace) -> int:
    """Start a run, or with ``--resume`` go on with one."""
    if arguments.nproc != 1:
        raise UserError("--nproc: only one process is supported as yet; give 1")
    if arguments.dry_run:
        return _dry_run(arguments)
    recipe, run = _resumed(arguments) if arguments.resume is not None else _started(arguments)
    if arguments.minutes is not None:
        if not arguments.minutes > 0:
            raise UserError(f"--minutes {arguments.minutes:g}: give more than 0")
        if recipe.schedule.kind != "wsd":
            raise UserError(
                "--minutes is for schedule.kind 'wsd': a cosine's length must be known from the start"
            )
    return _train(recipe, run, as_json=arguments.json, minutes=arguments.minutes)


def decay(arguments: argparse.Namespace) -> int:
    """Branch a decay off one of a run's trunk checkpoints, or go on with the same one."""
    run = open_run(arguments.run)
    steps = run.trunk.steps()
    if not steps:
        raise UserError(f"{run.folder} has no checkpoint to branch from: train it first")
    at = steps[-1] if arguments.at is None else arguments.at
    if at not in steps:
        kept = ", ".join(str(step) for step in steps[-8:])
        raise UserError(f"{run.folder} keeps no trunk checkpoint of step {at}; there are: {kept}")
    recipe = decay_recipe(_saved_recipe(run.trunk), at, arguments.tokens, arguments.data, arguments.settings)
    return _train(recipe, run, as_json=arguments.json, branch=_decay_branch(run, recipe), at=at)


def decay_recipe(trunk: Recipe, at: int, tokens: int, data: str | None, settings: Sequence[str]) -> Recipe:
    """The trunk's recipe cut at step ``at`` with a decay of ``tokens``: alone it would train the same model."""
    if trunk.schedule.kind != "wsd":
        raise UserError("a cosine run has no stable stage to branch from: decays are for schedule.kind 'wsd'")
    if at < trunk.warmup_steps:
        raise UserError(
            f"step {at} is still in warm-up (it ends at {trunk.warmup_steps}): branch from a later one"
        )
    if tokens < 1:
        raise UserError(f"--tokens {tokens}: a decay needs at least one token")
    entries = tomllib.loads(to_toml(trunk))
    if data is not None:
        entries["data"]["decay"] = [source.model_dump() for source in _decay_sources(data)]
    entries["schedule"] |= {"stable_tokens": at * trunk.batch_tokens, "decay_tokens": tokens}
    recipe = load_recipe(entries, settings)
    _refuse_changes(trunk, recipe, "this decay")
    if recipe.trunk_steps != at or recipe.total_steps == at:
        raise UserError("--set schedule.stable_tokens and decay_tokens: give --at and --tokens instead")
    return recipe


def list_runs(arguments: argparse.Namespace) -> int:
    """Print the runs under a folder, the newest first."""
    entries = [_describe(run) for run in reversed(find_runs(arguments.root))]
    if arguments.json:
        print(json.dumps(entries, indent=2))
    elif not entries:
        print(f"no runs under {arguments.root}; `minicpm-edge train RECIPE` starts one")
    else:
        rows = [("RUN", "MODEL", "STEP", "TOKENS", "LOSS", "DECAYS")]
        for entry in entries:
            decays = ", ".join(f"{item['label']} ({_loss(item)})" for item in entry["decays"]) or "-"
            rows.append(
                (
                    entry["name"],
                    entry["model"],
                    f"{entry['step']}/{entry['trunk_steps']}",
                    f"{entry['tokens'] or 0:,}",
                    _loss(entry),
                    decays,
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    """Print bits per byte and perplexity of a model on prepared sets."""
    from minicpm_edge.checkpoint import load_checkpoint
    from minicpm_edge.locate import locate
    from minicpm_edge.tokenizer import Tokenizer
    from minicpm_training.evaluation import Validation
    from minicpm_training.hardware import choose_device

    located = locate(arguments.model)
    if located.kind != "hf":
        raise UserError(f"{located.path} is an export; `eval` measures a run or a Hugging Face folder")
    for option, value in (("--tokens", arguments.tokens), ("--length", arguments.length)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: give at least 1")
    model = load_checkpoint(located.path, device=choose_device(arguments.device))
    tokenizer = Tokenizer.load(located.path)
    length = arguments.length
    if length is None:  # a run may have been trained on shorter rows than its model has positions
        run = Run(folder=located.run) if located.run else None
        length = (
            _saved_recipe(run.trunk).data.sequence_length if run else model.config.max_position_embeddings
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


def _dry_run(arguments: argparse.Namespace) -> int:
    from minicpm_training.dry_run import plan, render

    if arguments.resume is not None:
        recipe, _ = _resumed(arguments)
    else:
        recipe = load_recipe(arguments.recipe, arguments.settings)
    summary = plan(recipe)
    print(json.dumps(summary, indent=2) if arguments.json else render(summary))
    return 0


def _started(arguments: argparse.Namespace) -> tuple[Recipe, Run]:
    recipe = load_recipe(arguments.recipe, arguments.settings)
    folder = arguments.out or new_run_folder(recipe.name or recipe.model.preset)
    if (folder / "recipe.toml").exists():
        raise UserError(
            f"{folder} already holds a run: --resume {folder} goes on with it, or give another --out"
        )
    return recipe, Run(folder=folder)


def _resumed(arguments: argparse.Namespace) -> tuple[Recipe, Run]:
    named = arguments.resume or (str(arguments.out) if arguments.out else None)
    run = open_run(named)
    saved = _saved_recipe(run.trunk)
    entries: str | dict[str, Any] = arguments.recipe or tomllib.loads(to_toml(saved))
    recipe = load_recipe(entries, arguments.settings)
    if run.trunk.steps():
        _refuse_changes(saved, recipe, f"the run {run.folder}")
    return recipe, run


def _saved_recipe(branch: Branch) -> Recipe:
    return load_recipe(str(branch.recipe_path))


def _refuse_changes(saved: Recipe, asked: Recipe, what: str) -> None:
    before, after = (_flatten(recipe) for recipe in (saved, asked))
    for key, value in after.items():
        if before[key] != value and not any(key == name or key.startswith(f"{name}.") for name in RESUMABLE):
            raise UserError(
                f"{key} was {before[key]!r} when {what} was trained and cannot become {value!r}: start a new run"
            )


def _flatten(recipe: Recipe) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in recipe.model_dump().items():
        nested = isinstance(value, dict)
        flat |= {f"{key}.{inner}": item for inner, item in value.items()} if nested else {key: value}
    # Sets are known by their folders' names, which seed the order of their rows: a folder may move.
    flat["data.stable"] = [(Path(source.path).name, source.weight) for source in recipe.data.stable]
    return flat


def _decay_sources(recipe: str) -> Sequence[Any]:
    return load_recipe(recipe).data.decay_or_stable


def _decay_branch(run: Run, recipe: Recipe) -> Branch:
    """The decay of this very recipe, else a new label."""
    base = run.trunk.checkpoint(recipe.trunk_steps).name
    number = 1
    while True:
        branch = run.decay(base if number == 1 else f"{base}-{number}")
        if not branch.recipe_path.is_file() or _saved_recipe(branch) == recipe:
            return branch
        number += 1


def _train(
    recipe: Recipe,
    run: Run,
    *,
    as_json: bool,
    branch: Branch | None = None,
    at: int = 0,
    minutes: float | None = None,
) -> int:
    from minicpm_training.session import Watcher, train_branch, train_run
    from minicpm_training.time_budget import train_within

    with stop_on_signals() as should_stop, Progress() as progress:
        watcher = Watcher(progress=progress, should_stop=should_stop)
        if branch is not None:
            finished = train_branch(recipe, run, branch, run.trunk.checkpoint(at), watcher)
        elif minutes is not None:
            finished = train_within(recipe, run, watcher, seconds=minutes * 60)
        else:
            finished = train_run(recipe, run, watcher)
    if as_json:
        print(json.dumps(_describe(run), indent=2))
    else:
        _print_result(run, finished)
    return 0 if finished else EXIT_INTERRUPTED


def _print_result(run: Run, finished: bool) -> None:
    entry = _describe(run)
    print(f"run      {run.folder}")
    print(f"trunk    step {entry['step']}, loss {_loss(entry)}")
    for item in entry["decays"]:
        print(f"decay    {item['label']}: step {item['step']}, loss {_loss(item)}{_valid(item)}")
    if finished:
        print(f"curve    {run.folder / 'loss.png'}")
    else:
        print(f"stopped with a checkpoint saved; go on: minicpm-edge train --resume {run.folder}")


def _describe(run: Run) -> dict[str, Any]:
    recipe = _saved_recipe(run.trunk)
    config = recipe.model
    return {
        "name": run.name,
        "path": str(run.folder),
        "model": config.preset,
        "trunk_steps": recipe.trunk_steps,
        "checkpoints": run.trunk.steps(),
        **_last(run.trunk),
        "decays": [
            {"label": branch.folder.name, "checkpoints": branch.steps(), **_last(branch)}
            for branch in run.decays()
        ],
    }


def _last(branch: Branch) -> dict[str, Any]:
    lines = branch.metrics()
    last: dict[str, Any] = next((line for line in reversed(lines) if "loss" in line), {})
    valid = next((line["valid"] for line in reversed(lines) if "valid" in line), None)
    return {key: last.get(key) for key in ("step", "tokens", "loss")} | {"valid_bits_per_byte": valid}


def _loss(entry: dict[str, Any]) -> str:
    return "-" if entry["loss"] is None else f"{entry['loss']:.4f}"


def _valid(entry: dict[str, Any]) -> str:
    valid = entry["valid_bits_per_byte"]
    return "".join(f", {name} {bits:.4f} bits/byte" for name, bits in valid.items()) if valid else ""
