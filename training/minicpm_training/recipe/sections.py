"""The sections of a recipe, and for each key what changing it makes of a run."""

from __future__ import annotations

import math
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model, model_validator

from minicpm_edge.model.config import ModelConfig
from minicpm_edge.model.mup import EmbeddingRule
from minicpm_edge.model.presets import preset
from minicpm_training.schedule import DecayForm, Form

MAX_COUNT = 1 << 53  # the largest whole number that JSON and floats keep exactly

Tokens = Annotated[int, Field(ge=0, le=MAX_COUNT)]
PositiveTokens = Annotated[int, Field(gt=0, le=MAX_COUNT)]
Steps = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Length = Annotated[int, Field(ge=2, lt=1 << 24)]
# Absolute, so that `train --resume` works from any folder. An empty path is the mark of a place to fill in.
Folder = Annotated[
    str, Field(min_length=1), AfterValidator(lambda text: Path(text).expanduser().absolute().as_posix())
]


class Effect(Enum):
    """What changing a key makes of a run that has begun. A section's mark holds for its keys without one."""

    IDENTITY = "another run"
    LENGTH = "the same trunk, with another length or ending"
    HARMLESS = "the same run: touches no number, or rounding only"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _ModelSection(Section):
    """``preset`` gives the shape; every other key replaces one of its values.

    Without ``vocab_size`` the vocabulary is the tokenizer's.
    """

    preset: str = "tiny"
    embedding_rule: EmbeddingRule = "input"

    def overrides(self) -> dict[str, Any]:
        """The keys that replace values of the preset."""
        return self.model_dump(exclude={"preset", "embedding_rule"}, exclude_none=True)

    def config(self, *, vocab_size: int | None = None) -> ModelConfig:
        """The model's config, with ``vocab_size`` where the recipe names none."""
        import dataclasses

        overrides = self.overrides()
        if vocab_size is not None:
            overrides.setdefault("vocab_size", vocab_size)
        return dataclasses.replace(preset(self.preset), **overrides)


def _override_fields() -> dict[str, Any]:
    """A key for each number and switch of :class:`ModelConfig`; those of tokens are the tokenizer's to say."""
    types: dict[Any, Any] = {
        int: Annotated[int, Field(ge=0, lt=1 << 24)],
        float: float,
        bool: bool,
    }
    return {
        name: (types[hint] | None, None)
        for name, hint in get_type_hints(ModelConfig).items()
        if hint in types and not name.endswith("_token_id")
    }


if TYPE_CHECKING:

    class ModelSection(_ModelSection): ...

else:
    ModelSection = create_model(
        "ModelSection",
        __base__=_ModelSection,
        __module__=__name__,
        __doc__=_ModelSection.__doc__,
        **_override_fields(),
    )


class UpcycleSection(Section):
    """Sparse upcycling: every feed-forward becomes ``experts`` copies of itself behind a new router."""

    experts: Annotated[int, Field(ge=2, lt=1 << 12)]
    top_k: Annotated[int, Field(ge=1)] = 2

    @model_validator(mode="after")
    def _consistent(self) -> UpcycleSection:
        if self.top_k > self.experts:
            raise ValueError(
                f"init.upcycle.top_k {self.top_k} is more than init.upcycle.experts {self.experts}"
            )
        return self


class InitSection(Section):
    """The model to start from, a checkpoint instead of random weights, and what is done to it before the first step."""

    path: Folder
    untie: bool = False
    upcycle: UpcycleSection | None = None
    rope_theta: Annotated[float, Field(gt=0)] | None = None
    max_position_embeddings: Length | None = None


class Source(Section):
    """One prepared set in a stage's mixture; weights are shares of tokens and need not sum to 1."""

    path: Folder
    weight: Annotated[float, Field(gt=0)] = 1.0


class ValidationSet(Section):
    """A prepared set held out of training; its name in metrics is the folder's unless given."""

    path: Folder
    name: str = ""

    @property
    def label(self) -> str:
        return self.name or Path(self.path).name


class DataSection(Section):
    tokenizer: Annotated[Folder, Effect.HARMLESS]  # its folder may move: sets know it by hash
    sequence_length: Annotated[Length, Effect.IDENTITY] = 512
    stable: Annotated[tuple[Source, ...], Effect.IDENTITY] = ()
    # Empty: the decay keeps the stable mixture.
    decay: Annotated[tuple[Source, ...], Effect.LENGTH] = ()
    valid: Annotated[tuple[ValidationSet, ...], Effect.HARMLESS] = ()

    @model_validator(mode="after")
    def _distinct(self) -> DataSection:
        refuse_twice("data.stable", [source.path for source in self.stable])
        refuse_twice("data.decay", [source.path for source in self.decay])
        refuse_twice("data.valid", [entry.label for entry in self.valid])
        return self


def refuse_twice(key: str, names: list[str]) -> None:
    """Raises ``ValueError`` for the first name that is there more than once."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{key} names {name!r} twice: give it once, with the weight of both")


class ScheduleSection(Section):
    """The learning rate, and the two stages of a run: ``stable_tokens`` is the whole trunk, warm-up included.

    A recipe with ``[[stages]]`` has its lengths there.
    """

    kind: Annotated[Literal["wsd", "cosine"], Effect.IDENTITY] = "wsd"
    peak_lr: Annotated[float, Field(gt=0), Effect.IDENTITY] = 0.01
    warmup_tokens: Annotated[Tokens | None, Effect.IDENTITY] = None  # None: 1 % of the run
    stable_tokens: Annotated[PositiveTokens | None, Effect.LENGTH] = None
    decay_tokens: Annotated[Tokens, Effect.LENGTH] = 0
    form: Annotated[DecayForm, Effect.LENGTH] = "exponential"
    floor: Annotated[float, Field(ge=0, le=1), Effect.LENGTH] = 0.1
    half_life_tokens: Annotated[Tokens, Effect.LENGTH] = 0  # 0: the one that meets the floor at the end

    @model_validator(mode="after")
    def _consistent(self) -> ScheduleSection:
        if self.kind == "cosine" and self.decay_tokens:
            raise ValueError("schedule.kind 'cosine' has no decay stage: set schedule.decay_tokens to 0")
        if self.kind == "wsd":
            refuse_endless_decay(
                "schedule", self.form, floor=self.floor, half_life_tokens=self.half_life_tokens
            )
        if (self.warmup_tokens or 0) > (math.inf if self.stable_tokens is None else self.stable_tokens):
            raise ValueError(
                "schedule.warmup_tokens is larger than schedule.stable_tokens, which includes it"
            )
        return self


def refuse_endless_decay(key: str, form: Form, *, floor: float, half_life_tokens: int) -> None:
    """Raises ``ValueError`` for an exponential decay whose half-life is left to a floor that it cannot meet."""
    if form == "exponential" and not (half_life_tokens or 0 < floor < 1):
        raise ValueError(f"an exponential decay never meets a floor of 0 or 1: set {key}.half_life_tokens")


class StageSection(Section):
    """One entry of ``[[stages]]``. What it leaves out is as in the stage before, or as the recipe has it.

    The learning rate begins where the stage before left it; ``form`` says whether it stays there or falls to
    ``floor`` × ``schedule.peak_lr``. Leading constant stages are the trunk, all that follows is one decay of it.
    """

    tokens: PositiveTokens
    name: str = ""  # empty: "stable" for a constant learning rate, else "decay"
    form: Form = "constant"
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1
    half_life_tokens: Tokens = 0
    sources: tuple[Source, ...] = ()
    batch_tokens: PositiveTokens | None = None
    sequence_length: Length | None = None

    @model_validator(mode="after")
    def _consistent(self) -> StageSection:
        refuse_twice("stages.sources", [source.path for source in self.sources])
        refuse_endless_decay("stages", self.form, floor=self.floor, half_life_tokens=self.half_life_tokens)
        return self


class NextTokenSection(Section):
    """Next-token cross-entropy, within documents; only on what a chat's loss mask leaves, where a set has one."""

    kind: Literal["next-token"] = "next-token"
    z_loss: Annotated[float, Field(ge=0)] = 0.0


# With a second objective: the union of both, told apart by `kind`.
ObjectiveSection = NextTokenSection


class OptimizerSection(Section):
    """AdamW. The paper gives none of these; they are the usual choice for language models of this size."""

    kind: Literal["adamw"] = "adamw"
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip_norm: Annotated[float, Field(ge=0)] = 1.0  # 0: no clipping


class CheckpointSection(Section):
    every: Steps = 200  # steps; 0: only at the end of a stage
    keep: Annotated[int, Field(ge=1)] = 2  # the newest ones
    keep_every: Steps = 0  # also every checkpoint whose step is a multiple of this; 0: none


class EvaluationSection(Section):
    every: Steps = 200  # steps; 0: only at the end
    tokens: PositiveTokens = 131_072  # of each validation set, in whole documents


class SampleSection(Section):
    every: Steps = 0  # steps; 0: only at the end
    prompts: tuple[str, ...] = ()
    max_tokens: Annotated[int, Field(ge=1)] = 48


class LogSection(Section):
    every: Annotated[int, Field(ge=1)] = 1  # steps between lines of metrics.jsonl
    tensorboard: bool = False
