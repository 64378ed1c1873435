"""What the commands ``train``, ``decay``, ``runs`` and ``eval`` do, given their parsed arguments.

With ``--nproc`` the command finds out what is wrong before it starts processes that run the same command line.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicpm_edge.cli.command import EXIT_INTERRUPTED
from minicpm_edge.cli.progress import Progress
from minicpm_edge.cli.table import format_table
from minicpm_edge.errors import UserError
from minicpm_training import distributed
from minicpm_training.interrupts import stop_on_signals
from minicpm_training.recipe.branching import decay_recipe
from minicpm_training.recipe.compatibility import refuse_another_run
from minicpm_training.recipe.files import load_recipe, saved_recipe, to_toml
from minicpm_training.recipe.schema import Recipe
from minicpm_training.run import Branch, Run, find_runs, new_run_folder, open_run

if TYPE_CHECKING:
    from minicpm_training.session import Watcher


def train(arguments: argparse.Namespace) -> int:
    """Start a run, or with ``--resume`` go on with one."""
    if arguments.dry_run:
        return _dry_run(arguments)
    return distributed.run_joined(lambda: _train(arguments))


def _train(arguments: argparse.Namespace) -> int:
    from minicpm_training.session import train_run
    from minicpm_training.time_budget import train_within

    start = _resumed if arguments.resume is not None else _started
    recipe, run = distributed.agree(lambda: start(arguments))
    num_processes = _num_processes(arguments, recipe)
    if arguments.minutes is not None:
        if not arguments.minutes > 0:
            raise UserError(f"--minutes {arguments.minutes:g}: give more than 0")
        if not recipe.plan.can_branch:
            raise UserError(
                "--minutes is for schedule.kind 'wsd': a cosine's length must be known from the start"
            )
    if num_processes > distributed.size():
        recipe_word = [arguments.recipe] if arguments.recipe else []
        return distributed.launch(["train", *recipe_word, *_options(arguments)], num_processes)
    with _watcher() as watcher:
        if arguments.minutes is not None:
            finished = train_within(recipe, run, watcher, seconds=arguments.minutes * 60)
        else:
            finished = train_run(recipe, run, watcher)
    return _ended(run, finished, go_on=["train", "--resume", str(run.folder)], as_json=arguments.json)


def decay(arguments: argparse.Namespace) -> int:
    """Branch a decay off one of a run's trunk checkpoints, or go on with the same one."""
    return distributed.run_joined(lambda: _decay(arguments))


def _decay(arguments: argparse.Namespace) -> int:
    from minicpm_training.session import decay_branch, train_branch

    run, at, recipe = distributed.agree(lambda: _branching(arguments))
    num_processes = _num_processes(arguments, recipe)
    if num_processes > distributed.size():
        return distributed.launch(["decay", arguments.run, *_options(arguments)], num_processes)
    settings = [word for setting in arguments.settings for word in ("--set", setting)]
    data = ["--data", arguments.data] if arguments.data else []
    go_on = ["decay", str(run.folder), "--at", str(at), "--tokens", str(arguments.tokens), *data, *settings]
    with _watcher() as watcher:
        branch = distributed.agree(lambda: decay_branch(run, recipe))
        finished = train_branch(recipe, run, branch, run.trunk.checkpoint(at), watcher)
    return _ended(run, finished, go_on=go_on, as_json=arguments.json)


def _branching(arguments: argparse.Namespace) -> tuple[Run, int, Recipe]:
    """The run, the step to branch from, and the decay's recipe."""
    run = open_run(arguments.run)
    steps = run.trunk.steps()
    if not steps:
        raise UserError(f"{run.folder} has no checkpoint to branch from: train it first")
    at = steps[-1] if arguments.at is None else arguments.at
    if at not in steps:
        kept = ", ".join(str(step) for step in steps[-8:])
        raise UserError(
            f"{run.folder} keeps no trunk checkpoint of step {at}; there are: {kept} "
            "(checkpoint.keep and checkpoint.keep_every say which are kept)"
        )
    sources = load_recipe(arguments.data).plan.stages[-1].sources if arguments.data is not None else ()
    trunk = saved_recipe(run.trunk.recipe_path)
    recipe = decay_recipe(trunk, at, arguments.tokens, arguments.settings, sources=sources)
    return run, at, recipe


def list_runs(arguments: argparse.Namespace) -> int:
    """Print the runs under a folder, the newest first."""
    entries = []
    for run in reversed(find_runs(arguments.root)):
        try:
            entries.append(_describe(run))
        except UserError as error:  # of another version, or damaged: the others are listed all the same
            print(f"left out {run.folder}: {error}", file=sys.stderr)
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
        print(format_table(rows))
    return 0


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
    if length is None:  # a run may have been trained on shorter rows than its model has positions
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


def _dry_run(arguments: argparse.Namespace) -> int:
    from minicpm_training.dry_run import plan, render

    if arguments.resume is not None:
        recipe, _ = _resumed(arguments)
    else:
        recipe = load_recipe(arguments.recipe, arguments.settings)
    summary = plan(recipe, num_processes=_num_processes(arguments, recipe))
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
    saved = saved_recipe(run.trunk.recipe_path)
    entries: str | dict[str, Any] = arguments.recipe or tomllib.loads(to_toml(saved))
    # A warm-up that the recipe leaves open is the one already run, not 1 % of a new length.
    recipe = load_recipe(entries, arguments.settings, warmup_tokens=saved.schedule.warmup_tokens)
    if run.trunk.steps():
        refuse_another_run(saved, recipe, f"the run {run.folder}")
    return recipe, run


def _num_processes(arguments: argparse.Namespace, recipe: Recipe) -> int:
    """How many processes are to train, checked: those of ``--nproc``, or of a launcher that is there already."""
    if arguments.nproc < 1:
        raise UserError(f"--nproc {arguments.nproc}: give at least 1")
    num_processes: int = arguments.nproc if distributed.size() == 1 else distributed.size()
    if arguments.nproc not in (1, num_processes):
        raise UserError(
            f"--nproc {arguments.nproc}: {num_processes} processes are started already; leave it out"
        )
    distributed.check(recipe, num_processes)
    return num_processes


def _options(arguments: argparse.Namespace) -> list[str]:
    """The options that were given, but ``--nproc``, as words of a command line."""
    words = [f"--set={setting}" for setting in arguments.settings]
    for name in ("out", "minutes", "at", "tokens", "data", "resume"):
        value = getattr(arguments, name, None)
        if value is not None:
            words.append(f"--{name}={value}" if value != "" else f"--{name}")
    return words + [f"--{name}" for name in ("json", "debug") if getattr(arguments, name)]


@contextmanager
def _watcher() -> Iterator[Watcher]:
    from minicpm_training.session import Watcher

    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        stop_on_signals(insist=distributed.size() == 1) as asked,
        Progress(None if distributed.is_main() else nowhere) as progress,
    ):
        yield Watcher(progress=progress, should_stop=lambda: distributed.agree_to_stop(asked()))


def _ended(run: Run, finished: bool, *, go_on: Sequence[str], as_json: bool) -> int:
    if distributed.size() > 1:
        go_on = [*go_on, "--nproc", str(distributed.size())]
    if as_json and distributed.is_main():
        print(json.dumps(_describe(run), indent=2))
    elif distributed.is_main():
        _print_result(run, finished, go_on)
    return 0 if finished else EXIT_INTERRUPTED


def _print_result(run: Run, finished: bool, go_on: Sequence[str]) -> None:
    entry = _describe(run)
    print(f"run      {run.folder}")
    print(f"trunk    step {entry['step']}, loss {_loss(entry)}")
    for item in entry["decays"]:
        print(f"decay    {item['label']}: step {item['step']}, loss {_loss(item)}{_valid(item)}")
    if finished:
        print(f"curve    {run.folder / 'loss.png'}")
    else:
        print(f"stopped with a checkpoint saved; go on: minicpm-edge {shlex.join(go_on)}")


def _describe(run: Run) -> dict[str, Any]:
    recipe = saved_recipe(run.trunk.recipe_path)
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
