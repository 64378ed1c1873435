"""A recipe: everything that decides a run, as frozen models read from TOML.

Defaults < recipe file < ``--set section.key=value``. The resolved recipe is written into the run folder, with
absolute paths, and alone reproduces the run.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from minicpm_training.recipe.plan import Plan, Stage, in_a_row, steps_for
from minicpm_training.recipe.sections import (
    MAX_COUNT,
    CheckpointSection,
    DataSection,
    Effect,
    EvaluationSection,
    InitSection,
    LogSection,
    ModelSection,
    ObjectiveSection,
    OptimizerSection,
    PositiveTokens,
    SampleSection,
    ScheduleSection,
    Section,
    Source,
    StageSection,
)
from minicpm_training.schedule import Schedule


class Recipe(Section):
    name: Annotated[str, Effect.HARMLESS] = ""
    seed: Annotated[int, Field(ge=0, le=MAX_COUNT), Effect.IDENTITY] = 0
    batch_tokens: Annotated[PositiveTokens, Effect.IDENTITY] = 32_768
    micro_batch_tokens: Annotated[PositiveTokens, Effect.HARMLESS] = 8_192
    # auto: bf16 where the hardware computes it
    precision: Annotated[Literal["auto", "bf16", "fp32"], Effect.HARMLESS] = "auto"
    compile: Annotated[bool, Effect.HARMLESS] = False
    device: Annotated[str, Effect.HARMLESS] = "auto"
    init: Annotated[InitSection | None, Effect.IDENTITY] = None
    model: Annotated[ModelSection, Effect.IDENTITY] = ModelSection()
    data: DataSection
    schedule: ScheduleSection = ScheduleSection()
    stages: Annotated[tuple[StageSection, ...], Effect.LENGTH] = ()
    objective: Annotated[ObjectiveSection, Effect.IDENTITY] = ObjectiveSection()
    optimizer: Annotated[OptimizerSection, Effect.IDENTITY] = OptimizerSection()
    checkpoint: Annotated[CheckpointSection, Effect.HARMLESS] = CheckpointSection()
    evaluation: Annotated[EvaluationSection, Effect.HARMLESS] = EvaluationSection()
    sample: Annotated[SampleSection, Effect.HARMLESS] = SampleSection()
    log: Annotated[LogSection, Effect.HARMLESS] = LogSection()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.init and (names := list(self.model.overrides())):
            raise ValueError(f"model.{names[0]} is given by init.path: leave it out")
        self._check_lengths_are_given_once()
        for stage in self.plan.stages:
            self._check_batch(stage)
        self._check_falling()
        return self

    def _check_lengths_are_given_once(self) -> None:
        if not self.data.stable and not (self.stages and self.stages[0].sources):
            raise ValueError("data.stable is missing: give it in the recipe or with --set data.stable=…")
        if not self.stages:
            if self.schedule.stable_tokens is None:
                key = "schedule.stable_tokens"
                raise ValueError(f"{key} is missing: give it in the recipe or with --set {key}=…")
            return
        schedule = self.schedule
        for key, is_given in {
            "schedule.stable_tokens": schedule.stable_tokens is not None,
            "schedule.decay_tokens": schedule.decay_tokens > 0,
            "schedule.kind": schedule.kind != "wsd",
            "data.decay": bool(self.data.decay),
        }.items():
            if is_given:
                raise ValueError(f"{key} and [[stages]] say the same thing: leave {key} out")
        if (schedule.warmup_tokens or 0) > self.stages[0].tokens:
            raise ValueError("schedule.warmup_tokens is larger than the first stage, which includes it")

    def _check_batch(self, stage: Stage) -> None:
        length = stage.sequence_length
        if stage.batch_tokens % length:
            nearest = max(1, round(stage.batch_tokens / length)) * length
            raise ValueError(
                f"batch_tokens {stage.batch_tokens} is not a multiple of data.sequence_length {length}: "
                f"the nearest is {nearest}"
            )
        if self.micro_batch_tokens % length:
            raise ValueError(
                f"micro_batch_tokens {self.micro_batch_tokens} is not a multiple of data.sequence_length {length}"
            )

    def _check_falling(self) -> None:
        for stage, start in zip(self.plan.stages, self.lr_schedule().starts, strict=True):
            if stage.form != "constant" and stage.floor > start:
                raise ValueError(
                    f"stage {stage.name!r} begins at {start:.3g} of schedule.peak_lr and is to fall to "
                    f"{stage.floor:g} of it: give it a lower floor"
                )

    @property
    def plan(self) -> Plan:
        """The stages in steps."""
        sections = self.stages or self._two_stages()
        stages: list[Stage] = []
        sources, batch_tokens, length = self.data.stable, self.batch_tokens, self.data.sequence_length
        for section in sections:
            sources = section.sources or sources
            batch_tokens = section.batch_tokens or batch_tokens
            length = section.sequence_length or length
            stages.append(
                Stage(
                    name=section.name or ("stable" if section.form == "constant" else "decay"),
                    first_step=0,
                    num_steps=steps_for(section.tokens, batch_tokens),
                    batch_tokens=batch_tokens,
                    sequence_length=length,
                    sources=sources,
                    form=section.form,
                    floor=section.floor,
                    half_life=section.half_life_tokens / batch_tokens,
                )
            )
        num_steps, first = sum(stage.num_steps for stage in stages), stages[0]
        if self.schedule.warmup_tokens is None:
            warmup_steps = min(first.num_steps, max(1, num_steps // 100))
        else:
            warmup_steps = steps_for(self.schedule.warmup_tokens, first.batch_tokens)
        return Plan(stages=tuple(in_a_row(stages)), warmup_steps=warmup_steps)

    def _two_stages(self) -> tuple[StageSection, ...]:
        """What ``[schedule]`` says as a list of stages."""
        schedule = self.schedule
        tokens = schedule.stable_tokens or 0
        if schedule.kind == "cosine":
            return (StageSection(name="cosine", tokens=tokens, form="cosine", floor=schedule.floor),)
        stable = StageSection(tokens=tokens)
        if not schedule.decay_tokens:
            return (stable,)
        return stable, self.decay_section(schedule.decay_tokens, self.data.decay)

    def decay_section(self, tokens: int, sources: tuple[Source, ...]) -> StageSection:
        """A decay as ``[schedule]`` shapes it."""
        schedule = self.schedule
        return StageSection(
            tokens=tokens,
            form=schedule.form,
            floor=schedule.floor,
            half_life_tokens=schedule.half_life_tokens,
            sources=sources,
        )

    @property
    def trunk_steps(self) -> int:
        return self.plan.trunk_steps

    @property
    def total_steps(self) -> int:
        return self.plan.total_steps

    @property
    def warmup_steps(self) -> int:
        return self.plan.warmup_steps

    @property
    def model_name(self) -> str:
        """The preset, or the checkpoint that the run starts from."""
        return self.model.preset if self.init is None else self.init.path

    def lr_schedule(self) -> Schedule:
        """The schedule in steps."""
        return self.plan.schedule()

    def with_changes(self, **sections: object) -> Recipe:
        """This recipe with other values, validated again; a mapping changes the keys of a section that it names."""
        entries = self.model_dump()
        for name, value in sections.items():
            entries[name] = {**entries[name], **value} if isinstance(value, dict) else value
        return self.model_validate(entries)
