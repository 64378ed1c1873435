"""Comparing an export with its source: the runtimes' interface, the figures' limits, and the verdict on each figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from minicpm_export.verify.measures import Comparison, Measures
from minicpm_export.verify.windows import Window

VERIFYING = "verifying"  # how a status of the comparison begins


class Runtime(Protocol):
    """A model loaded by the program that will run it.

    Legend: T tokens of one window, V vocabulary.
    """

    @property
    def name(self) -> str:
        """Its name and version, for the certificate."""
        ...

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits (T, V) after each of the tokens of one window, from its beginning."""
        ...


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """The worst that passes; KL in nats. A figure that is not a number never passes.

    ``max_logit_difference`` holds for logits that spread by 1; where the model's spread more it grows with them, since
    so does the rounding of fp32 (llama.cpp's rotary angles drift with the position, the largest part of it).
    """

    mean_kl: float
    p99_kl: float
    top1_agreement: float
    """The smallest share of positions that passes, 0 to 1."""
    max_logit_difference: float = math.inf


# By the type of the weights. A lossless type must be the same function. The limits of the others are many times what
# trained models measure (Q4_K_M: a 4M model 0.003, an 8B one 0.03), with room for weights hardly trained, which suffer
# most: a broken file fails and honest rounding does not. A wrong map of a quantised file is caught by F32's limits;
# what rounding costs is in the figures.
THRESHOLDS: Mapping[str, Thresholds] = {
    "exact": Thresholds(mean_kl=0.0, p99_kl=0.0, top1_agreement=1.0, max_logit_difference=0.0),
    "F32": Thresholds(mean_kl=1e-5, p99_kl=1e-4, top1_agreement=0.99, max_logit_difference=1e-3),
    # Weights as the source has them, in the 16 bits it has them in: what is left is the runtime's rounding of
    # activations. A hundredth of what a quantised type may cost, so that a wrong map cannot hide in it.
    "F32 exact": Thresholds(mean_kl=1e-5, p99_kl=1e-4, top1_agreement=0.99, max_logit_difference=1e-3),
    "F16 exact": Thresholds(mean_kl=5e-5, p99_kl=1e-3, top1_agreement=0.99),
    "BF16 exact": Thresholds(mean_kl=1e-3, p99_kl=2e-2, top1_agreement=0.97),
    "F16": Thresholds(mean_kl=5e-3, p99_kl=0.05, top1_agreement=0.97),
    "BF16": Thresholds(mean_kl=0.02, p99_kl=0.3, top1_agreement=0.95),
    "Q8_0": Thresholds(mean_kl=0.05, p99_kl=0.8, top1_agreement=0.92),
    "INT8": Thresholds(mean_kl=0.05, p99_kl=0.8, top1_agreement=0.92),
    "Q6_K": Thresholds(mean_kl=0.1, p99_kl=1.0, top1_agreement=0.88),
    "Q5_K_M": Thresholds(mean_kl=0.15, p99_kl=1.2, top1_agreement=0.82),
    "Q4_K_M": Thresholds(mean_kl=0.3, p99_kl=2.0, top1_agreement=0.70),
    "Q4_0": Thresholds(mean_kl=0.5, p99_kl=3.0, top1_agreement=0.65),
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison: what was compared, in which runtime, the figures, and what they had to meet."""

    what: str
    runtime: str
    measures: Measures
    thresholds: Thresholds

    def failures(self) -> list[str]:
        """Which figures are past their threshold, in words; empty when all are met."""
        got, limit = self.measures, self.thresholds
        worst = [
            ("mean KL", got.mean_kl, limit.mean_kl),
            ("99th-percentile KL", got.p99_kl, limit.p99_kl),
            (
                "largest logit difference",
                got.max_logit_difference,
                limit.max_logit_difference * max(1.0, got.logit_std),
            ),
        ]
        found = [f"{name} {value:.3g} (limit {most:.3g})" for name, value, most in worst if not value <= most]
        if not got.top1_agreement >= limit.top1_agreement:
            found.append(f"top-1 agreement {got.top1_agreement:.1%} (limit {limit.top1_agreement:.0%})")
        return [f"{self.what}: {line}" for line in found]


def compare(
    reference: Runtime, export: Runtime, windows: Sequence[Window], report: Callable[[str], None]
) -> Measures:
    """Run both models over the windows and add up the figures; one window's logits are in memory at a time.

    Raises:
        ValueError: where the two disagree on the size of the vocabulary, or no position has a target.
    """
    comparison = Comparison()
    for number, window in enumerate(windows, 1):
        report(f"{VERIFYING}: window {number}/{len(windows)} in {export.name}")
        expected, got = reference.logits(window.ids), export.logits(window.ids)
        comparison.add(expected, got, np.asarray(window.targets))
    return comparison.measures()
