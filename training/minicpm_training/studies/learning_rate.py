"""``tunnel lr``: the best learning rate at several sizes, and whether the width rules carry it from one to another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from minicpm_edge.model.transformer import count_parameters
from minicpm_training.recipe.files import with_settings
from minicpm_training.recipe.schema import Recipe
from minicpm_training.studies.fits import Interval, optimum
from minicpm_training.studies.report import Report, new_figure, write_csv
from minicpm_training.studies.sizes import Rules, seeded, sized
from minicpm_training.studies.trials import Trial, TrialResult

TITLES = {"mup": "muP rules (paper, table 7)", "standard": "one rate for all widths"}


@dataclass(frozen=True, kw_only=True)
class LearningRateStudy:
    """Every learning rate at every size, by each set of rules, with each seed."""

    recipe: Recipe
    widths: Sequence[int]
    depths: Sequence[int] = ()  # empty: the recipe's own
    rates: Sequence[float]
    rules: Sequence[Rules] = ("mup", "standard")
    num_seeds: int = 1

    def trials(self) -> list[Trial]:
        """In the order of the table."""
        depths = self.depths or [self.recipe.model.config().num_hidden_layers]
        cells = product(self.rules, self.widths, depths, self.rates, range(self.num_seeds))
        return [
            Trial(
                values={"rules": rules, "width": width, "depth": depth, "lr": rate, "seed": seed},
                recipe=with_settings(
                    seeded(sized(self.recipe, width=width, depth=depth, rules=rules), seed),
                    {"schedule.peak_lr": rate},
                ),
            )
            for rules, width, depth, rate, seed in cells
        ]

    def phases(self) -> list[list[Trial]]:
        """All trials at once."""
        return [self.trials()]

    def after_phase(self, number: int, results: Sequence[TrialResult], folder: Path) -> None:
        """Nothing waits for them."""

    def report(self, results: Sequence[TrialResult], study: Path) -> Path:
        """Optimum with interval for each size, how far they lie apart, and the curves; returns report.md."""
        trials = self.trials()
        write_csv(trials, results, study)
        curves = _curves(trials, results)
        optima: dict[Rules, list[Interval]] = {rules: [] for rules in self.rules}
        report = Report(title="Learning rate over sizes")
        figure, panels = new_figure(len(self.rules))
        axes = dict(zip(self.rules, panels, strict=True))
        rows = []
        for (rules, width, depth), scores in curves.items():
            rates = list(scores)
            best = optimum(rates, list(scores.values()))
            optima[rules].append(best)
            means = [sum(values) / len(values) for values in scores.values()]
            parameters = count_parameters(sized(self.recipe, width=width, depth=depth).model.config())
            rows.append(
                [rules, str(width), str(depth), f"{parameters:,}", f"{best:.4f}", f"{min(means):.4f}"]
            )
            axes[rules].plot(rates, means, marker="o", label=f"{width} × {depth}")
        for rules, axis in axes.items():
            axis.set(title=TITLES[rules], xscale="log", xlabel="base learning rate", ylabel="score")
            axis.legend(title="width × depth", fontsize=8)
        report.table(
            ["rules", "width", "depth", "parameters without embedding", "best rate", "its score"], rows
        )
        for rules, values in optima.items():
            ratio = max(value.value for value in values) / min(value.value for value in values)
            report.say(f"{TITLES[rules]}: the optima lie within a factor of {ratio:.2f}.")
        return report.write(study, figure)


def _curves(
    trials: Sequence[Trial], results: Sequence[TrialResult]
) -> dict[tuple[Rules, int, int], dict[float, list[float]]]:
    """(rules, width, depth) → learning rate → the seeds' scores."""
    curves: dict[tuple[Rules, int, int], dict[float, list[float]]] = {}
    for trial, result in zip(trials, results, strict=True):
        values = trial.values
        rules: Rules = "mup" if values["rules"] == "mup" else "standard"
        size = rules, int(values["width"]), int(values["depth"])
        curves.setdefault(size, {}).setdefault(float(values["lr"]), []).append(result.score)
    return curves
