"""``tunnel batch``: the batch size that reaches a loss with the fewest tokens, and its law bs = a · L^b.

Method: MiniCPM (arXiv 2404.06395), section 3.3. A parabola through tokens over log batch size is biased where the curve
is not symmetric, so that a second form stands beside it: tokens = a · B + b / B + c with nonnegative coefficients
(noise at small batches, wasted samples at large ones), lowest at √(b / a).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minicpm_edge.errors import UserError
from minicpm_training.recipe.files import with_settings
from minicpm_training.recipe.schema import Recipe
from minicpm_training.studies.fits import Array, Interval, PowerLaw, fit_power_law, parabola_minimum
from minicpm_training.studies.report import Report, new_figure, write_csv
from minicpm_training.studies.sizes import seeded, sized
from minicpm_training.studies.trials import Trial, TrialResult, training_curve

NUM_LEVELS = 8
SMOOTHING_TOKENS = 20  # the curve is a mean over a 20th of the run
FORMS = ("parabola", "a · B + b / B + c")


@dataclass(frozen=True, kw_only=True)
class BatchSizeStudy:
    """Every batch size at every width for the recipe's own number of tokens, on the trunk alone."""

    recipe: Recipe
    widths: Sequence[int]
    batch_tokens: Sequence[int]
    num_seeds: int = 1

    def trials(self) -> list[Trial]:
        trials = []
        for width in self.widths:
            for batch_tokens in self.batch_tokens:
                for seed in range(self.num_seeds):
                    recipe = with_settings(
                        seeded(sized(self.recipe, width=width), seed),
                        {
                            "batch_tokens": batch_tokens,
                            "micro_batch_tokens": min(batch_tokens, self.recipe.micro_batch_tokens),
                            "schedule.decay_tokens": 0,
                            "schedule.warmup_tokens": self.recipe.schedule.warmup_tokens,
                        },
                    )
                    values = {"width": width, "batch_tokens": batch_tokens, "seed": seed}
                    trials.append(Trial(values=values, recipe=recipe))
        return trials

    def phases(self) -> list[list[Trial]]:
        """All trials at once."""
        return [self.trials()]

    def after_phase(self, number: int, results: Sequence[TrialResult], folder: Path) -> None:
        """Nothing waits for them."""

    def report(self, results: Sequence[TrialResult], study: Path) -> Path:
        """Equal-loss minima by both forms, the law of each with intervals, and the curves; returns report.md.

        Raises:
            UserError: where no loss was reached by three batch sizes.
        """
        trials = self.trials()
        write_csv(trials, results, study)
        curves: dict[tuple[int, int], list[tuple[Array, Array]]] = {}
        for trial, result in zip(trials, results, strict=True):
            if not result.diverged:
                key = int(trial.values["width"]), int(trial.values["batch_tokens"])
                curves.setdefault(key, []).append(training_curve(trial, study, share=1 / SMOOTHING_TOKENS))
        report = Report(title="Batch size by loss")
        figure, (axis,) = new_figure(1)
        minima: dict[str, list[tuple[float, float]]] = {form: [] for form in FORMS}
        for width in self.widths:
            of_width = {batch: found for (own, batch), found in curves.items() if own == width}
            for loss in _levels(of_width):
                reached = {batch: _tokens_to(loss, found) for batch, found in of_width.items()}
                batches = [batch for batch, tokens in reached.items() if math.isfinite(tokens)]
                tokens = [reached[batch] for batch in batches]
                if len(batches) >= 3:
                    minima[FORMS[0]].append(
                        (loss, math.exp(parabola_minimum(np.log(batches), np.log(tokens))))
                    )
                    if (lowest := hyperbola_minimum(batches, tokens)) is not None:
                        minima[FORMS[1]].append((loss, lowest))
                    axis.plot(batches, tokens, marker="o", label=f"width {width}, loss {loss:.2f}")
        axis.set(xscale="log", yscale="log", xlabel="batch, tokens", ylabel="tokens to reach the loss")
        axis.legend(fontsize=6)
        rows = []
        for form, found in minima.items():
            if len({loss for loss, _ in found}) < 2:
                rows.append([form, str(len(found)), "too few minima", "", ""])
                continue
            law, low_high = _law(found)
            typical = math.exp(float(np.mean(np.log([loss for loss, _ in found]))))
            rows.append(
                [
                    form,
                    str(len(found)),
                    f"{law.scale:.3g}",
                    f"{low_high:.2f}",
                    f"{law(typical):,.0f} at {typical:.2f}",
                ]
            )
        if not any(minima.values()):
            raise UserError("no loss was reached by three batch sizes: train longer, or closer batch sizes")
        report.say("bs = a · L^b, L the training loss in nats, bs in tokens (the paper: a 1.21e9, b −6.24):")
        report.table(["minima by", "minima", "a", "b", "batch at a typical loss"], rows)
        return report.write(study, figure)


def hyperbola_minimum(batches: Sequence[float], tokens: Sequence[float]) -> float | None:
    """The lowest point of a · B + b / B + c through the points; None where it has none within their range."""
    from scipy.optimize import nnls

    sizes = np.asarray(batches, dtype=np.float64)
    scale, height = math.sqrt(sizes.min() * sizes.max()), float(np.mean(tokens))
    x = sizes / scale
    (a, b, _), _ = nnls(np.stack([x, 1 / x, np.ones_like(x)], axis=1), np.asarray(tokens) / height)
    if a <= 0 or b <= 0:
        return None
    lowest = scale * math.sqrt(b / a)
    return lowest if sizes.min() <= lowest <= sizes.max() else None


def _levels(curves: dict[int, list[tuple[Array, Array]]]) -> Array:
    """Losses that most batch sizes have reached, from where the fastest curve has its last third to its end."""
    ends = sorted(min(float(loss.min()) for _, loss in found) for found in curves.values())
    if len(ends) < 3:
        return np.array([])
    best, third = ends[0], ends[2]
    return np.linspace(max(best, third) * 1.15, max(best, third) * 1.005, NUM_LEVELS)


def _tokens_to(loss: float, curves: Sequence[tuple[Array, Array]]) -> float:
    """Tokens at which the curves (one a seed) first reach a loss, their mean; infinite where one does not."""
    reached = []
    for tokens, losses in curves:
        lowest = np.minimum.accumulate(losses)
        after = int(np.argmax(lowest <= loss))
        if lowest[after] > loss:
            return math.inf
        if after == 0:
            return math.inf
        share = (lowest[after - 1] - loss) / (lowest[after - 1] - lowest[after])
        reached.append(float(tokens[after - 1] + share * (tokens[after] - tokens[after - 1])))
    return float(np.mean(reached))


def _law(minima: Sequence[tuple[float, float]], *, seed: int = 0) -> tuple[PowerLaw, Interval]:
    """The law through (loss, batch), and its exponent with an interval."""
    points = np.asarray(minima)
    law = fit_power_law(points[:, 0], points[:, 1])
    generator, exponents = np.random.default_rng(seed), []
    for _ in range(200):
        drawn = points[generator.integers(0, len(points), len(points))]
        if len(set(drawn[:, 0])) > 1:
            exponents.append(fit_power_law(drawn[:, 0], drawn[:, 1]).exponent)
    return law, Interval.of(law.exponent, exponents)
