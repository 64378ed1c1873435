"""Learning-rate schedules: pure functions from the number of an update to a multiplier of the peak rate.

Updates count from 0. Warm-up uses ``step + 1`` so that the first update moves; a decay starts at progress 0,
so that its first update is still at the peak.

Source: MiniCPM (arXiv 2404.06395), section 4.2. With W the end of warm-up, T the end of the stable stage and
S the end of the decay::

    WSD(s) = s / W        for s < W
             1            for W <= s < T
             f(s - T)     for T <= s < S

The decay printed in the paper exceeds 1 with its own symbols; the authors' blog gives the exponential form used
here, ``0.5 ** ((s - T) / half_life)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

DecayForm = Literal["exponential", "linear", "cosine", "1-sqrt"]


def warmup(step: int, warmup_steps: int) -> float:
    """Linear rise; 1.0 from the last warm-up update on."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def exponential_decay(step: int, *, half_life: float, floor: float) -> float:
    """Halves every ``half_life`` updates, not below ``floor``."""
    return max(floor, math.exp2(-step / half_life))


def shaped_decay(progress: float, form: DecayForm, floor: float) -> float:
    """From 1 at progress 0 to ``floor`` at progress 1, along a line, a half-cosine or 1 - sqrt(progress)."""
    shape = {
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "1-sqrt": 1.0 - math.sqrt(progress),
    }[form]
    return floor + (1.0 - floor) * shape


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay:
    """WSD. ``stable_steps`` is T of the paper (it includes warm-up); the run ends at ``total_steps``.

    ``half_life`` (in steps, the exponential form only) of 0 means the one that meets ``floor`` at the end.
    """

    warmup_steps: int
    stable_steps: int
    decay_steps: int = 0
    form: DecayForm = "exponential"
    floor: float = 0.1
    half_life: float = 0.0

    @property
    def total_steps(self) -> int:
        return self.stable_steps + self.decay_steps

    def multiplier(self, step: int) -> float:
        """Multiplier of the peak rate for update ``step``."""
        if step < self.stable_steps:
            return warmup(step, self.warmup_steps)
        since_stable = step - self.stable_steps
        if self.form == "exponential":
            half_life = self.half_life or self.decay_steps / math.log2(1.0 / self.floor)
            return exponential_decay(since_stable, half_life=half_life, floor=self.floor)
        return shaped_decay(min(1.0, since_stable / self.decay_steps), self.form, self.floor)

    def stage(self, step: int) -> str:
        if step < self.warmup_steps:
            return "warmup"
        return "stable" if step < self.stable_steps else "decay"


@dataclass(frozen=True, kw_only=True)
class WarmupCosine:
    """The baseline: warm-up, then the usual half-cosine down to ``floor`` at ``total_steps``.

    (As printed in the paper the formula goes negative; this is the form that every other code base means.)
    """

    warmup_steps: int
    total_steps: int
    floor: float = 0.1

    def multiplier(self, step: int) -> float:
        """Multiplier of the peak rate for update ``step``."""
        if step < self.warmup_steps:
            return warmup(step, self.warmup_steps)
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return shaped_decay(min(1.0, progress), "cosine", self.floor)

    def stage(self, step: int) -> str:
        return "warmup" if step < self.warmup_steps else "cosine"


Schedule = WarmupStableDecay | WarmupCosine
