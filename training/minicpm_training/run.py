"""The run folder: a trunk (warm-up and stable stage) and the decays that branch from it.

::

    runs/NAME/                  the trunk
        recipe.toml             resolved
        environment.json
        metrics.jsonl
        loss.png
        checkpoints/step-NNNNNNNN/
        decays/LABEL/           one release each, with the same files
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm_edge.atomic import write_text
from minicpm_edge.errors import UserError
from minicpm_edge.formats import run_folder
from minicpm_edge.formats.run_folder import (
    CHECKPOINT_NAME,
    CHECKPOINTS,
    DECAYS,
    METRICS,
    RECIPE,
    RUNS,
    checkpoint_name,
    checkpoint_steps,
)


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A trunk or a decay: one folder with a recipe, metrics and checkpoints."""

    folder: Path

    @property
    def recipe_path(self) -> Path:
        return self.folder / RECIPE

    @property
    def metrics_path(self) -> Path:
        return self.folder / METRICS

    @property
    def checkpoints_folder(self) -> Path:
        return self.folder / CHECKPOINTS

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step is or will be."""
        return self.checkpoints_folder / checkpoint_name(step)

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first."""
        return checkpoint_steps(self.folder)

    def remove_stale(self) -> None:
        """Remove what a killed save left behind. Only whole checkpoints bear their final name."""
        for leftover in self.checkpoints_folder.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def prune(self, *, keep: int, keep_every: int, protect: frozenset[int] = frozenset()) -> None:
        """Remove all checkpoints but the newest ``keep``, multiples of ``keep_every`` and protected steps."""
        for step in self.steps()[:-keep]:
            if step not in protect and not (keep_every and step % keep_every == 0):
                # Renamed first: a half-removed folder must not bear a checkpoint's name.
                doomed = self.checkpoints_folder / f".{checkpoint_name(step)}.doomed"
                self.checkpoint(step).rename(doomed)
                shutil.rmtree(doomed)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; one that a kill cut short ends the list."""
        return list(_read_lines(self.metrics_path))

    def truncate_metrics(self, step: int) -> None:
        """Drop the lines past ``step``: they are of steps that will be done again."""
        if self.metrics_path.is_file():
            kept = [json.dumps(line) for line in self.metrics() if line["step"] <= step]
            write_text(self.metrics_path, "".join(line + "\n" for line in kept))

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        with self.metrics_path.open("a", encoding="utf-8", newline="\n") as stream:
            stream.write(json.dumps(line) + "\n")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def trunk(self) -> Branch:
        return Branch(folder=self.folder)

    def decay(self, label: str) -> Branch:
        return Branch(folder=self.folder / DECAYS / label)

    def decays(self) -> list[Branch]:
        """The decays, by name."""
        folder = self.folder / DECAYS
        found = folder.iterdir() if folder.is_dir() else iter(())
        return [Branch(folder=path) for path in sorted(found) if (path / RECIPE).is_file()]

    def branch_points(self) -> frozenset[int]:
        """Trunk steps that decays branched from: their names begin with the checkpoint's."""
        names = (CHECKPOINT_NAME.match(branch.folder.name) for branch in self.decays())
        return frozenset(int(name[1]) for name in names if name)


def find_runs(root: Path) -> list[Run]:
    """Runs under ``root``, the one written to last at the end."""
    return [Run(folder=path) for path in reversed(run_folder.find_runs(root))]


def open_run(name: str | None, *, root: Path = RUNS) -> Run:
    """The run of a folder or of a name under ``root``; the newest run when ``name`` is None."""
    if name is None:
        runs = find_runs(root)
        if not runs:
            raise UserError(f"no runs under {root}: start one with `minicpm-edge train RECIPE`")
        return runs[-1]
    for folder in (Path(name), root / name):
        if (folder / RECIPE).is_file():
            return Run(folder=folder)
    raise UserError(f"{name!r} is not a run: no recipe.toml there nor under {root / name}")


def new_run_folder(name: str, *, root: Path = RUNS) -> Path:
    """``root/name``, numbered when that run exists."""
    folder, number = root / name, 1
    while folder.exists():
        number += 1
        folder = root / f"{name}-{number}"
    return folder


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                return
            yield entry
