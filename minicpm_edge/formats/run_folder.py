"""Where a run keeps its files, and which of its checkpoints it stands for.

::

    runs/NAME/                      a run: its trunk (warm-up and stable stage)
        recipe.toml                 resolved
        metrics.jsonl
        checkpoints/step-NNNNNNNN/
        decays/LABEL/               a decay branched from it, with the same files
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from minicpm_edge.errors import UserError
from minicpm_edge.json_file import read_json

RUNS = Path("runs")
RECIPE, METRICS, CHECKPOINTS, DECAYS = "recipe.toml", "metrics.jsonl", "checkpoints", "decays"
# Training's own file in a checkpoint: how far it is, and whether its branch has reached its end.
STATE = "state.json"
CHECKPOINT_NAME = re.compile(r"step-(\d{8,15})")


def checkpoint_name(step: int) -> str:
    """The folder name of the checkpoint after ``step`` steps."""
    return f"step-{step:08d}"


def checkpoint_steps(branch: Path) -> list[int]:
    """Steps of a branch's checkpoints, oldest first. A branch is a run's own folder or one of its decays."""
    names = (CHECKPOINT_NAME.fullmatch(folder.name) for folder in _folders(branch / CHECKPOINTS))
    steps = (int(name[1]) for name in names if name)
    return sorted(step for step in steps if (branch / CHECKPOINTS / checkpoint_name(step)).is_dir())


def find_runs(root: Path = RUNS) -> list[Path]:
    """The run folders under ``root``, the one written to last in front."""
    runs = [folder for folder in _folders(root) if (folder / RECIPE).is_file()]
    return sorted(runs, key=lambda run: (_last_written(run), run.name), reverse=True)


def released_checkpoint(run: Path) -> Path | None:
    """The checkpoint a run stands for: of its newest finished decay, else of its trunk; None while there is none."""
    last = (_last_checkpoint(decay) for decay in _folders(run / DECAYS))
    finished = [checkpoint for checkpoint in last if checkpoint is not None and _is_finished(checkpoint)]
    if finished:
        return max(finished, key=lambda checkpoint: ((checkpoint / STATE).stat().st_mtime, checkpoint))
    return _last_checkpoint(run)


def _last_checkpoint(branch: Path) -> Path | None:
    steps = checkpoint_steps(branch)
    return branch / CHECKPOINTS / checkpoint_name(steps[-1]) if steps else None


def _is_finished(checkpoint: Path) -> bool:
    try:
        return read_json(checkpoint / STATE).get("finished") is True
    except UserError:  # no state, or a damaged one
        return False


def _folders(path: Path) -> Iterator[Path]:
    return (entry for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else iter(())


def _last_written(run: Path) -> float:
    branches = [run, *_folders(run / DECAYS)]
    files = [file for branch in branches for file in (branch / RECIPE, branch / METRICS)]
    return max(file.stat().st_mtime for file in files if file.is_file())
