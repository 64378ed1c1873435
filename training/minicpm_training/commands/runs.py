"""``runs``: what lies under a folder; and how a run is described there and at its end."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from minicpm_edge.cli.table import format_table
from minicpm_edge.errors import UserError
from minicpm_training.recipe.files import saved_recipe
from minicpm_training.run import Branch, Run, find_runs


def list_runs(arguments: argparse.Namespace) -> int:
    """Print the runs under a folder, the newest first."""
    entries = []
    for run in reversed(find_runs(arguments.root)):
        try:
            entries.append(describe(run))
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


def describe(run: Run) -> dict[str, Any]:
    """A run as plain values, for ``--json``."""
    recipe = saved_recipe(run.trunk.recipe_path)
    return {
        "name": run.name,
        "path": str(run.folder),
        "model": recipe.model_name,
        "trunk_steps": recipe.trunk_steps,
        "checkpoints": run.trunk.steps(),
        **_last(run.trunk),
        "decays": [
            {"label": branch.folder.name, "checkpoints": branch.steps(), **_last(branch)}
            for branch in run.decays()
        ],
    }


def print_run(run: Run) -> None:
    """A run in a few lines."""
    entry = describe(run)
    print(f"run      {run.folder}")
    print(f"trunk    step {entry['step']}, loss {_loss(entry)}")
    for item in entry["decays"]:
        print(f"decay    {item['label']}: step {item['step']}, loss {_loss(item)}{_valid(item)}")


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
