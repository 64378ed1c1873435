"""The list of stages that a recipe comes to, in steps: what is trained when, on what, at which learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minicpm_training.recipe.sections import Source
from minicpm_training.schedule import Form, Schedule, Segment


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stretch of a run. ``half_life`` is in steps; the learning rate is as in :class:`Segment`."""

    name: str
    first_step: int
    num_steps: int
    batch_tokens: int
    sequence_length: int
    sources: tuple[Source, ...]
    form: Form
    floor: float
    half_life: float

    @property
    def end_step(self) -> int:
        return self.first_step + self.num_steps

    @property
    def sequences_per_step(self) -> int:
        return self.batch_tokens // self.sequence_length

    def sequences_per_micro_batch(self, micro_batch_tokens: int) -> int:
        """At least one; at most what a step has."""
        return min(self.sequences_per_step, max(1, micro_batch_tokens // self.sequence_length))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The stages of a run, one after another. Leading stages of constant learning rate are the trunk."""

    stages: tuple[Stage, ...]
    warmup_steps: int

    @property
    def trunk(self) -> tuple[Stage, ...]:
        """The stages up to the first decay; of a run without a constant stage (cosine), all of it."""
        constant = [stage.form == "constant" for stage in self.stages]
        length = constant.index(False) if False in constant else len(constant)
        return self.stages[: length or len(constant)]

    @property
    def branch(self) -> tuple[Stage, ...]:
        """The stages after the trunk."""
        return self.stages[len(self.trunk) :]

    @property
    def trunk_steps(self) -> int:
        return self.trunk[-1].end_step

    @property
    def total_steps(self) -> int:
        return self.stages[-1].end_step

    @property
    def can_branch(self) -> bool:
        """Whether a decay can begin at any step of the trunk, which a curve of known length does not allow."""
        return self.stages[0].form == "constant"

    def at(self, step: int) -> Stage:
        """The stage of a step."""
        return next(stage for stage in reversed(self.stages) if stage.first_step <= step)

    def num_tokens(self, step: int) -> int:
        """Tokens seen before ``step``."""
        return sum(
            stage.batch_tokens * max(0, min(step, stage.end_step) - stage.first_step) for stage in self.stages
        )

    def schedule(self) -> Schedule:
        """The learning rate over all stages."""
        return Schedule(
            warmup_steps=self.warmup_steps,
            segments=tuple(
                Segment(
                    name=stage.name,
                    num_steps=stage.num_steps,
                    form=stage.form,
                    floor=stage.floor,
                    half_life=stage.half_life,
                )
                for stage in self.stages
            ),
        )

    def until(self, step: int) -> list[tuple[object, ...]]:
        """What is trained before ``step``, comparable between recipes: of every stage its steps, data and rate.

        Sets are known by their folders' names, which seed the order of their sequences: a folder may move.
        """
        return [
            (
                min(step, stage.end_step) - stage.first_step,
                stage.batch_tokens,
                stage.sequence_length,
                by_name(stage.sources),
                stage.form,
                *(() if stage.form == "constant" else (stage.num_steps, stage.floor, stage.half_life)),
            )
            for stage in self.stages
            if stage.first_step < step
        ]


def by_name(sources: Sequence[Source]) -> list[tuple[str, float]]:
    """Sources as (name of the folder, weight)."""
    return [(Path(source.path).name, source.weight) for source in sources]


def steps_for(tokens: int, batch_tokens: int) -> int:
    """The number of steps that see at least ``tokens`` tokens."""
    return math.ceil(tokens / batch_tokens)


def in_a_row(stages: Sequence[Stage]) -> Iterator[Stage]:
    """The stages, each beginning where the one before ends."""
    first_step = 0
    for stage in stages:
        yield replace(stage, first_step=first_step)
        first_step += stage.num_steps
