"""What a study leaves: report.md, results.csv, and a figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from minicpm_edge.atomic import write_text
from minicpm_training.hardware import environment
from minicpm_training.studies.trials import Trial, TrialResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURE, REPORT, RESULTS = "figure.png", "report.md", "results.csv"


@dataclass(kw_only=True)
class Report:
    """A page of Markdown, line by line."""

    title: str
    lines: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        """A paragraph."""
        self.lines += [text, ""]

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; the cells are text."""
        self.lines.append(f"| {' | '.join(header)} |")
        self.lines.append("|" + "---|" * len(header))
        self.lines += [f"| {' | '.join(row)} |" for row in rows]
        self.lines.append("")

    def write(self, study: Path, figure: Figure | None = None) -> Path:
        """Write the page, and the figure beside it; returns the page."""
        lines = [f"# {self.title}", "", *self.lines]
        if figure is not None:
            figure.savefig(study / FIGURE)
            lines += [f"![{self.title}]({FIGURE})", ""]
        machine = environment()
        lines.append(
            f"Intervals are the middle 90 % of a bootstrap. {machine['cpu']}, {machine['num_cpus']} CPUs, "
            f"Python {machine['python']}, torch {machine['torch']}. All trials: [{RESULTS}]({RESULTS})."
        )
        write_text(study / REPORT, "\n".join(lines) + "\n")
        return study / REPORT


def write_csv(trials: Sequence[Trial], results: Sequence[TrialResult], study: Path) -> None:
    """A row for each trial: its values, then what it came to."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*trials[0].values, "tokens", "loss", "bits_per_byte", "seconds", "key"])
    for trial, result in zip(trials, results, strict=True):
        bits = "" if result.bits_per_byte is None else result.bits_per_byte
        writer.writerow([*trial.values.values(), result.tokens, result.loss, bits, result.seconds, trial.key])
    write_text(study / RESULTS, text.getvalue())


def new_figure(num_panels: int) -> tuple[Figure, list[Axes]]:
    """A figure with its panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4 * num_panels, 4.2), dpi=130, layout="constrained")
    return figure, list(figure.subplots(1, num_panels, squeeze=False)[0])
