"""A recipe: everything that decides a run, as frozen models read from TOML.

Defaults < recipe file < ``--set section.key=value``. The resolved recipe is written into the run folder, with
absolute paths, and alone reproduces the run.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from minicpm_edge.model.config import ModelConfig
from minicpm_edge.model.mup import EmbeddingRule
from minicpm_edge.model.presets import preset
from minicpm_training.schedule import DecayForm, Schedule, WarmupCosine, WarmupStableDecay

MAX_COUNT = 1 << 53  # the largest whole number that JSON and floats keep exactly

Tokens = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Steps = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Size = Annotated[int, Field(ge=1, lt=1 << 24)]
# Absolute, so that `train --resume` works from any folder. An empty path is the mark of a place to fill in.
Folder = Annotated[
    str, Field(min_length=1), AfterValidator(lambda text: Path(text).expanduser().absolute().as_posix())
]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSection(Section):
    """``preset`` gives the shape; every other key replaces one of its values.

    Without ``vocab_size`` the vocabulary is the tokenizer's.
    """

    preset: str = "tiny"
    embedding_rule: EmbeddingRule = "input"
    vocab_size: Size | None = None
    hidden_size: Size | None = None
    intermediate_size: Size | None = None
    num_hidden_layers: Size | None = None
    num_attention_heads: Size | None = None
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    max_position_embeddings: Size | None = None
    rope_theta: float | None = None
    rms_norm_eps: float | None = None
    scale_emb: float | None = None
    scale_depth: float | None = None
    dim_model_base: float | None = None
    initializer_range: float | None = None
    tie_word_embeddings: bool | None = None
    num_experts: int | None = None
    num_experts_per_tok: int | None = None

    def config(self, *, vocab_size: int | None = None) -> ModelConfig:
        """The model's config, with ``vocab_size`` where the recipe names none."""
        import dataclasses

        overrides = self.model_dump(exclude={"preset", "embedding_rule"}, exclude_none=True)
        if vocab_size is not None:
            overrides.setdefault("vocab_size", vocab_size)
        return dataclasses.replace(preset(self.preset), **overrides)


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
    tokenizer: Folder
    sequence_length: Annotated[int, Field(ge=2, lt=1 << 24)] = 512
    stable: Annotated[tuple[Source, ...], Field(min_length=1)]
    decay: tuple[Source, ...] = ()  # empty: the decay goes on with the stable mixture
    valid: tuple[ValidationSet, ...] = ()

    @model_validator(mode="after")
    def _distinct(self) -> DataSection:
        for key, names in {
            "data.stable": [source.path for source in self.stable],
            "data.decay": [source.path for source in self.decay],
            "data.valid": [entry.label for entry in self.valid],
        }.items():
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"{key} names {name!r} twice: give it once, with the weight of both")
        return self

    @property
    def decay_or_stable(self) -> tuple[Source, ...]:
        return self.decay or self.stable


class ScheduleSection(Section):
    """Stage lengths in tokens. ``stable_tokens`` is the whole trunk, warm-up included."""

    kind: Literal["wsd", "cosine"] = "wsd"
    peak_lr: Annotated[float, Field(gt=0)] = 0.01
    warmup_tokens: Tokens | None = None  # None: 1 % of the run
    stable_tokens: Annotated[Tokens, Field(gt=0)]
    decay_tokens: Tokens = 0
    form: DecayForm = "exponential"
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1
    half_life_tokens: Tokens = 0  # 0: the one that meets the floor at the end

    @model_validator(mode="after")
    def _consistent(self) -> ScheduleSection:
        if self.kind == "cosine" and self.decay_tokens:
            raise ValueError("schedule.kind 'cosine' has no decay stage: set schedule.decay_tokens to 0")
        if (
            self.kind == "wsd"
            and self.form == "exponential"
            and not (self.half_life_tokens or 0 < self.floor < 1)
        ):
            raise ValueError(
                "an exponential decay never meets a floor of 0 or 1: set schedule.half_life_tokens"
            )
        if self.warmup_tokens is not None and self.warmup_tokens > self.stable_tokens:
            raise ValueError(
                "schedule.warmup_tokens is larger than schedule.stable_tokens, which includes it"
            )
        return self


class OptimizerSection(Section):
    """AdamW. The paper gives none of these; they are the usual choice for language models of this size."""

    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip_norm: Annotated[float, Field(ge=0)] = 1.0  # 0: no clipping
    z_loss: Annotated[float, Field(ge=0)] = 0.0


class CheckpointSection(Section):
    every: Steps = 200  # steps; 0: only at the end of a stage
    keep: Annotated[int, Field(ge=1)] = 2  # the newest ones
    keep_every: Steps = 0  # also every checkpoint whose step is a multiple of this; 0: none


class EvaluationSection(Section):
    every: Steps = 200  # steps; 0: only at the end
    tokens: Annotated[Tokens, Field(gt=0)] = 131_072  # of each validation set, in whole documents


class SampleSection(Section):
    every: Steps = 0  # steps; 0: only at the end
    prompts: tuple[str, ...] = ()
    max_tokens: Annotated[int, Field(ge=1)] = 48


class LogSection(Section):
    every: Annotated[int, Field(ge=1)] = 1  # steps between lines of metrics.jsonl
    tensorboard: bool = False


class Recipe(Section):
    name: str = ""
    seed: Annotated[int, Field(ge=0, le=MAX_COUNT)] = 0
    batch_tokens: Annotated[Tokens, Field(gt=0)] = 32_768
    micro_batch_tokens: Annotated[Tokens, Field(gt=0)] = 8_192
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the hardware computes it
    compile: bool = False
    device: str = "auto"
    model: ModelSection = ModelSection()
    data: DataSection
    schedule: ScheduleSection
    optimizer: OptimizerSection = OptimizerSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluation: EvaluationSection = EvaluationSection()
    sample: SampleSection = SampleSection()
    log: LogSection = LogSection()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        length = self.data.sequence_length
        if self.batch_tokens % length:
            nearest = max(1, round(self.batch_tokens / length)) * length
            raise ValueError(
                f"batch_tokens {self.batch_tokens} is not a multiple of data.sequence_length {length}: "
                f"the nearest is {nearest}"
            )
        if self.micro_batch_tokens % length:
            raise ValueError(
                f"micro_batch_tokens {self.micro_batch_tokens} is not a multiple of data.sequence_length {length}"
            )
        return self

    @property
    def rows_per_step(self) -> int:
        return self.batch_tokens // self.data.sequence_length

    @property
    def rows_per_micro_batch(self) -> int:
        return min(self.rows_per_step, self.micro_batch_tokens // self.data.sequence_length)

    def steps(self, tokens: int) -> int:
        """The number of updates that see at least ``tokens`` tokens."""
        return math.ceil(tokens / self.batch_tokens)

    @property
    def trunk_steps(self) -> int:
        return self.steps(self.schedule.stable_tokens)

    @property
    def total_steps(self) -> int:
        return self.trunk_steps + self.steps(self.schedule.decay_tokens)

    @property
    def warmup_steps(self) -> int:
        if self.schedule.warmup_tokens is None:
            return min(self.trunk_steps, max(1, self.total_steps // 100))
        return self.steps(self.schedule.warmup_tokens)

    def lr_schedule(self) -> Schedule:
        """The schedule in steps."""
        if self.schedule.kind == "cosine":
            return WarmupCosine(
                warmup_steps=self.warmup_steps, total_steps=self.total_steps, floor=self.schedule.floor
            )
        return WarmupStableDecay(
            warmup_steps=self.warmup_steps,
            stable_steps=self.trunk_steps,
            decay_steps=self.total_steps - self.trunk_steps,
            form=self.schedule.form,
            floor=self.schedule.floor,
            half_life=self.schedule.half_life_tokens / self.batch_tokens,
        )

    def with_schedule(self, **changes: object) -> Recipe:
        """This recipe with other values in ``[schedule]``, validated again."""
        return self.model_validate(
            {**self.model_dump(), "schedule": {**self.schedule.model_dump(), **changes}}
        )
