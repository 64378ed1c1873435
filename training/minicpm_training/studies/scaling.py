"""``tunnel scaling``: loss over parameters and tokens, from decays branched off one trunk a size; and a prediction.

Method: MiniCPM (arXiv 2404.06395), section 4.5: a trunk is trained once a size, and a decay of 10 % branches off it at
each length, so that the cost is linear in sizes. The law is fitted by variable projection.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path

import numpy as np

from minicpm_edge.atomic import write_text
from minicpm_edge.model.transformer import count_parameters
from minicpm_training.recipe.files import with_settings
from minicpm_training.recipe.schema import Recipe
from minicpm_training.studies.fits import (
    ScalingLaw,
    bootstrap_scaling_law,
    fit_scaling_law,
    interval_of,
    predicted_interval,
)
from minicpm_training.studies.report import Report, new_figure, write_csv
from minicpm_training.studies.sizes import seeded, sized
from minicpm_training.studies.trials import Trial, TrialResult

DECAY_SHARE = 0.1  # of the trunk (paper, section 4.3)
PREDICTION = "prediction.json"
BILLION = 1e9


@dataclass(frozen=True, kw_only=True)
class ScalingStudy:
    """``lengths`` are tokens in all as multiples of the parameters (without the embedding)."""

    recipe: Recipe
    widths: Sequence[int]
    held_out_width: int
    lengths: Sequence[float] = (10, 20, 30, 40, 50, 60)
    num_seeds: int = 1
    compute: float = 1e21  # FLOPs at which the best ratio of tokens to parameters is told

    def trials(self) -> list[Trial]:
        """Of the sizes that the law is fitted to."""
        return [trial for width in self.widths for trial in self._of_width(width)]

    def held_out_trials(self) -> list[Trial]:
        """Of the larger size that it predicts."""
        return self._of_width(self.held_out_width)

    def _of_width(self, width: int) -> list[Trial]:
        model = sized(self.recipe, width=width)
        num_parameters = self.num_parameters(width)
        shortest = min(self.lengths) * num_parameters
        trials = []
        for seed in range(self.num_seeds):
            for length in sorted(self.lengths):
                trunk_tokens = round(length * num_parameters / (1 + DECAY_SHARE))
                settings = {
                    "schedule.stable_tokens": trunk_tokens,
                    "schedule.decay_tokens": max(1, round(trunk_tokens * DECAY_SHARE)),
                    # The same for all lengths: they share the trunk.
                    "schedule.warmup_tokens": max(self.recipe.batch_tokens, round(shortest / 100)),
                }
                values = {"width": width, "parameters": num_parameters, "length": length, "seed": seed}
                recipe = with_settings(seeded(model, seed), settings)
                trials.append(Trial(values=values, recipe=recipe))
        return trials

    def num_parameters(self, width: int) -> int:
        """Without the embedding, as the paper counts."""
        return count_parameters(sized(self.recipe, width=width).model.config())

    def phases(self) -> list[list[Trial]]:
        """The held-out size comes last."""
        return [self.trials(), self.held_out_trials()]

    def after_phase(self, number: int, results: Sequence[TrialResult], folder: Path) -> None:
        """Before the held-out size is trained, it is predicted."""
        if number == 0:
            self.predict(results, folder)

    def predict(self, results: Sequence[TrialResult], study: Path) -> None:
        """Fit the law and write down what it says of the held-out size, before that is trained.

        What has been written is not written again: a prediction is made once.
        """
        if (study / PREDICTION).is_file():
            return
        law, laws = self._fit(results)
        predictions = [
            {
                **trial.values,
                **asdict(
                    predicted_interval(
                        law,
                        laws,
                        int(trial.values["parameters"]) / BILLION,
                        trial.recipe.plan.num_tokens(trial.recipe.total_steps) / BILLION,
                    )
                ),
            }
            for trial in self.held_out_trials()
        ]
        write_text(
            study / PREDICTION, json.dumps({"law": asdict(law), "held_out": predictions}, indent=2) + "\n"
        )

    def _fit(self, results: Sequence[TrialResult]) -> tuple[ScalingLaw, list[tuple[ScalingLaw, np.ndarray]]]:
        points = [
            (int(trial.values["parameters"]) / BILLION, result.tokens / BILLION, result.score)
            for trial, result in zip(self.trials(), results, strict=True)
            if not result.diverged
        ]
        n, d, loss = zip(*points, strict=True)
        return fit_scaling_law(n, d, loss), bootstrap_scaling_law(n, d, loss)

    def report(self, results: Sequence[TrialResult], study: Path) -> Path:
        """The law with intervals, the prediction and by how much it missed, and the curves; returns report.md."""
        trials = [*self.trials(), *self.held_out_trials()]
        write_csv(trials, results, study)
        held_out = results[len(self.trials()) :]
        law, laws = self._fit(results[: len(self.trials())])
        report = Report(title="Scaling law")
        report.say(
            "L(N, D) = C_N · N^−α + C_D · D^−β + L0, N parameters without the embedding and D tokens in 1e9. The score "
            "is bits per byte of held-out text where the recipe has a validation set, else the training loss in nats."
        )
        names = {"c_n": "C_N", "alpha": "α", "c_d": "C_D", "beta": "β", "l_0": "L0"}
        report.table(
            ["", "value and interval"],
            [[name, f"{interval_of(law, laws, attrgetter(key)):.4g}"] for key, name in names.items()],
        )
        ratio = interval_of(law, laws, lambda one: one.tokens_per_parameter(self.compute / 1e18))
        if math.isfinite(ratio.value):
            report.say(f"Best tokens per parameter at {self.compute:.0e} FLOPs: {ratio:.4g}.")
        else:
            report.say(
                "The loss did not depend on one of the two, so that no ratio of tokens to parameters is best."
            )
        self._say_prediction(report, held_out, study)
        figure, (axis,) = new_figure(1)
        for width in (*self.widths, self.held_out_width):
            found = [
                (result.tokens, result.score)
                for trial, result in zip(trials, results, strict=True)
                if trial.values["width"] == width
            ]
            tokens = np.geomspace(min(found)[0], max(found)[0], 50)
            label = f"width {width}" + (" (held out)" if width == self.held_out_width else "")
            (line,) = axis.plot(
                tokens, law(np.asarray(self.num_parameters(width) / BILLION), tokens / BILLION), label=label
            )
            axis.plot(*zip(*found, strict=True), "o", color=line.get_color())
        axis.set(xscale="log", xlabel="tokens", ylabel="score", title="points: trained; lines: the law")
        axis.legend(fontsize=8)
        return report.write(study, figure)

    def _say_prediction(self, report: Report, held_out: Sequence[TrialResult], study: Path) -> None:
        predictions = json.loads((study / PREDICTION).read_text(encoding="utf-8"))["held_out"]
        rows, covered = [], 0
        for entry, result in zip(predictions, held_out, strict=True):
            inside = entry["low"] <= result.score <= entry["high"]
            covered += inside
            rows.append(
                [
                    f"{entry['length']:g}",
                    f"{entry['value']:.4f} [{entry['low']:.4f}, {entry['high']:.4f}]",
                    f"{result.score:.4f}",
                    f"{100 * (entry['value'] / result.score - 1):+.2f} %",
                    "yes" if inside else "no",
                ]
            )
        report.say(
            f"Width {self.held_out_width} ({self.num_parameters(self.held_out_width):,} parameters) was predicted from "
            f"the smaller ones before it was trained ({PREDICTION}); the intervals hold {covered} of {len(rows)}:"
        )
        report.table(["tokens per parameter", "predicted", "trained", "missed by", "inside"], rows)
