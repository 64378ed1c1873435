"""Learning-rate schedules: pure functions from the number of a step to a multiplier of the peak learning rate.

Steps count from 0. Warm-up uses ``step + 1`` so that the first step moves the weights; a decay starts at progress 0,
so that its first step is still at the rate it starts from.

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
from functools import cached_property
from typing import Literal

DecayForm = Literal["exponential", "linear", "cosine", "1-sqrt"]
Form = Literal["constant", "exponential", "linear", "cosine", "1-sqrt"]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of a schedule: it begins at the multiplier where the one before ended, and stays there or falls.

    ``floor`` is a multiplier of the peak. ``half_life`` (in steps, the exponential form only) of 0 means the one that
    meets ``floor`` at the end.
    """

    name: str
    num_steps: int
    form: Form = "constant"
    floor: float = 0.1
    half_life: float = 0.0

    def multiplier(self, step: int, *, num_steps: int, start: float) -> float:
        """The multiplier ``step`` steps into a curve of ``num_steps`` that begins at ``start``."""
        if self.form == "constant" or not num_steps or start <= self.floor:
            return start
        if self.form == "exponential":
            half_life = self.half_life or num_steps / math.log2(start / self.floor)
            return max(self.floor, start * math.exp2(-step / half_life))
        progress = min(1.0, step / num_steps)
        shape = {
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
            "1-sqrt": 1.0 - math.sqrt(progress),
        }[self.form]
        return self.floor + (start - self.floor) * shape


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up to the peak, then the segments one after another; warm-up is within the first of them."""

    warmup_steps: int
    segments: tuple[Segment, ...]

    @property
    def total_steps(self) -> int:
        """The end of the last segment."""
        return sum(segment.num_steps for segment in self.segments)

    def multiplier(self, step: int) -> float:
        """Multiplier of the peak learning rate for a step; past the end, what the last segment comes to."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        curve = self._curve(step)
        return curve.segment.multiplier(step - curve.first, num_steps=curve.num_steps, start=curve.start)

    def stage(self, step: int) -> str:
        """``warmup``, or the name of the segment that a step is in."""
        return "warmup" if step < self.warmup_steps else self._curve(step).segment.name

    @property
    def starts(self) -> tuple[float, ...]:
        """The multiplier that each segment begins at."""
        return tuple(curve.start for curve in self._curves)

    def _curve(self, step: int) -> _Curve:
        return next((curve for curve in reversed(self._curves) if curve.first <= step), self._curves[0])

    @cached_property
    def _curves(self) -> tuple[_Curve, ...]:
        curves: list[_Curve] = []
        end, level = 0, 1.0
        for segment in self.segments:
            first, end = max(end, self.warmup_steps), end + segment.num_steps
            curves.append(_Curve(segment=segment, first=first, num_steps=end - first, start=level))
            level = segment.multiplier(end - first, num_steps=end - first, start=level)
        return tuple(curves)


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """A segment where it lies: ``first`` step past warm-up, steps from there on, the multiplier it starts at."""

    segment: Segment
    first: int
    num_steps: int
    start: float


def warmup_stable_decay(
    *,
    warmup_steps: int,
    stable_steps: int,
    decay_steps: int = 0,
    form: DecayForm = "exponential",
    floor: float = 0.1,
    half_life: float = 0.0,
) -> Schedule:
    """WSD. ``stable_steps`` is T of the paper (it includes warm-up)."""
    segments = [Segment(name="stable", num_steps=stable_steps)]
    if decay_steps:
        segments.append(
            Segment(name="decay", num_steps=decay_steps, form=form, floor=floor, half_life=half_life)
        )
    return Schedule(warmup_steps=warmup_steps, segments=tuple(segments))


def warmup_cosine(*, warmup_steps: int, total_steps: int, floor: float = 0.1) -> Schedule:
    """The baseline: warm-up, then the usual half-cosine down to ``floor`` at ``total_steps``.

    (As printed in the paper the formula goes negative; this is the form that every other code base means.)
    """
    segment = Segment(name="cosine", num_steps=total_steps, form="cosine", floor=floor)
    return Schedule(warmup_steps=warmup_steps, segments=(segment,))
