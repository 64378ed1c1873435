"""Training a run from its recipe: the trunk, then what follows it, each from where it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from minicpm_edge.atomic import write_text
from minicpm_edge.cli.progress import Progress
from minicpm_edge.errors import UserError
from minicpm_edge.formats.checkpoint import read_config
from minicpm_edge.model.config import ModelConfig
from minicpm_edge.model.transformer import MiniCPM, count_parameters
from minicpm_edge.text.tokenizer import Tokenizer
from minicpm_training.callbacks import Metrics, PeriodicCallback, TensorBoard
from minicpm_training.evaluation import Validation, open_validation
from minicpm_training.hardware import (
    Precision,
    choose_device,
    choose_precision,
    environment,
    flops_per_token,
    peak_flops,
)
from minicpm_training.objectives.registry import OBJECTIVES
from minicpm_training.optimizer import Optimizer, build_optimizer
from minicpm_training.parallel import process_group, sharding
from minicpm_training.plot import plot_run
from minicpm_training.recipe.compatibility import same_model
from minicpm_training.recipe.files import saved_recipe, to_toml
from minicpm_training.recipe.schema import Recipe
from minicpm_training.run import Branch, Run
from minicpm_training.samples import complete
from minicpm_training.start import check_fits, model_config, starting_model
from minicpm_training.state import (
    TrainingState,
    load_model_for_training,
    read_state,
    restore_optimizer,
    save_state,
)
from minicpm_training.trainer import Callback, Trainer


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What surrounds a run: where its progress goes, and whether it is asked to stop."""

    progress: Progress
    should_stop: Callable[[], bool] = lambda: False


def train_run(recipe: Recipe, run: Run, context: RunContext) -> bool:
    """Train the trunk to its end, then the stages that follow it; False if stopped before the end."""
    if not train_branch(recipe, run, run.trunk, None, context):
        return False
    if not recipe.plan.branch:
        return True
    tip = run.trunk.checkpoint(recipe.trunk_steps)
    branch = process_group.broadcast_from_rank0(lambda: decay_branch(run, recipe))
    return train_branch(recipe, run, branch, tip, context)


def decay_branch(run: Run, recipe: Recipe) -> Branch:
    """The decay of this very recipe, to resume; else a new one, so that no release is trained over."""
    base = run.trunk.checkpoint(recipe.trunk_steps).name
    number = 1
    while True:
        branch = run.decay(base if number == 1 else f"{base}-{number}")
        if not branch.recipe_path.is_file() or same_model(saved_recipe(branch.recipe_path), recipe):
            return branch
        number += 1


def train_branch(recipe: Recipe, run: Run, branch: Branch, start: Path | None, context: RunContext) -> bool:
    """Train one branch to its end: a trunk (``start`` None) or a decay from the trunk's checkpoint ``start``.

    Resumes from the branch's newest checkpoint where there is one; the same recipe gives the same bits on a CPU
    however often it was stopped. Returns False if stopped before the end, with a checkpoint saved.
    """
    until_step = recipe.trunk_steps if start is None else recipe.total_steps
    if process_group.is_rank0():
        branch.remove_stale()
    steps = process_group.broadcast_from_rank0(branch.steps)
    resume_from = branch.checkpoint(steps[-1]) if steps else start
    step = steps[-1] if steps else 0
    if step > until_step:
        length = "last stage" if recipe.stages else "schedule.stable_tokens"
        raise UserError(
            f"{branch.folder} is at step {step}, past the end its recipe now gives ({until_step}): "
            f"give a longer {length}, or branch with `minicpm-edge decay`"
        )
    if steps and step == until_step and read_state(branch.checkpoint(step)).finished:
        return True
    return Session(recipe=recipe, run=run, branch=branch, resume_from=resume_from).train(until_step, context)


@dataclass(frozen=True, kw_only=True)
class Session:
    """Training one branch from a checkpoint on: the objects made from its recipe, each on first use."""

    recipe: Recipe
    run: Run
    branch: Branch
    resume_from: Path | None

    def train(self, until_step: int, context: RunContext) -> bool:
        """Train up to ``until_step``; False if stopped before."""
        trainer = self.trainer()
        if process_group.is_rank0():
            self._open_folder(trainer.step)
        trainer.callbacks = self._callbacks(until_step, context.progress)
        return trainer.run(until_step, context.should_stop)

    def _open_folder(self, step: int) -> None:
        self.branch.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.branch.recipe_path, to_toml(self.recipe))
        record = {**environment(), "num_processes": process_group.world_size()}
        write_text(self.branch.folder / "environment.json", json.dumps(record, indent=2) + "\n")
        self.branch.truncate_metrics(step)

    @cached_property
    def device(self) -> torch.device:
        return process_group.local_device(choose_device(self.recipe.device))

    @cached_property
    def precision(self) -> Precision:
        return choose_precision(self.recipe.precision, self.device)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.recipe.data.tokenizer)

    @cached_property
    def config(self) -> ModelConfig:
        if self.resume_from is None:
            return model_config(self.recipe, self.tokenizer)
        config = read_config(self.resume_from)
        check_fits(config, self.recipe, self.tokenizer.vocab_size)
        return config

    def trainer(self) -> Trainer:
        """The training loop at the checkpoint to resume from, without callbacks."""
        recipe = self.recipe
        objective = OBJECTIVES[recipe.objective.kind]
        # First: the cheapest to find fault with.
        dataloader = objective.dataloader(recipe, self.tokenizer)
        model, optimizer, step, tokens = self._state()
        return Trainer(
            model=model,
            optimizer=optimizer,
            objective=objective.objective(recipe, model, self._reference),
            dataloader=dataloader,
            schedule=recipe.lr_schedule(),
            peak_lr=recipe.schedule.peak_lr,
            clip_norm=recipe.optimizer.clip_norm,
            precision=self.precision,
            step=step,
            tokens=tokens,
        )

    def _state(self) -> tuple[MiniCPM, Optimizer, int, int]:
        """Model, optimizer, steps done and tokens seen."""
        recipe, rule = self.recipe, self.recipe.model.embedding_rule
        if self.resume_from is None:
            model = starting_model(recipe, self.config, self.device)
            sharding.shard(model, self.device)
            optimizer = build_optimizer(model, self.config, recipe.optimizer, embedding_rule=rule)
            return model, optimizer, 0, 0
        state = read_state(self.resume_from)
        model = load_model_for_training(self.resume_from, device=self.device)
        optimizer = build_optimizer(model, model.config, recipe.optimizer, embedding_rule=rule)
        restore_optimizer(self.resume_from, optimizer)
        return model, optimizer, state.step, state.tokens

    def _reference(self) -> MiniCPM:
        """A frozen copy of the model that the run starts from, whole on every rank."""
        config = model_config(self.recipe, self.tokenizer)
        return starting_model(self.recipe, config, self.device).eval().requires_grad_(False)

    def _callbacks(self, until_step: int, progress: Progress) -> list[Callback]:
        """Callbacks in their order: a checkpoint comes last, so that what it resumes from has been measured.

        Rank 0 alone writes and prints; the others take part in what needs the whole model.
        """
        recipe = self.recipe
        peak, _ = peak_flops(self.device, self.precision)
        num_parameters = count_parameters(self.config, active=True)
        validations = [open_validation(entry, recipe, self.tokenizer) for entry in recipe.data.valid]
        callbacks: list[Callback] = []
        if process_group.is_rank0():
            callbacks.append(
                Metrics(
                    branch=self.branch,
                    progress=progress,
                    every=recipe.log.every,
                    until_step=until_step,
                    flops_per_token=lambda step: flops_per_token(
                        self.config, num_parameters, recipe.plan.at(step).sequence_length
                    ),
                    peak_flops=peak * process_group.world_size(),
                    sinks=(TensorBoard(self.branch),) if recipe.log.tensorboard else (),
                )
            )
        if validations:
            callbacks.append(
                PeriodicCallback(
                    action=lambda trainer: self._validate(trainer, validations, progress),
                    every=recipe.evaluation.every,
                )
            )
        if recipe.sample.prompts:
            callbacks.append(
                PeriodicCallback(
                    action=lambda trainer: self._sample(trainer, progress), every=recipe.sample.every
                )
            )
        if process_group.is_rank0():
            callbacks.append(PeriodicCallback(action=self._plot, every=recipe.evaluation.every))
        callbacks.append(
            PeriodicCallback(
                action=lambda trainer: self._save(trainer, finished=trainer.step >= until_step),
                every=recipe.checkpoint.every,
                when_stopped=True,
            )
        )
        return callbacks

    def _validate(self, trainer: Trainer, validations: list[Validation], progress: Progress) -> None:
        bits = {
            validation.name: validation.measure(trainer.model, trainer.autocast).bits_per_byte
            for validation in validations
        }
        shown = "  ".join(f"{name} {value:.4f}" for name, value in bits.items())
        self._tell(trainer, {"valid": bits}, [f"validation, bits per byte: {shown}"], progress)

    def _sample(self, trainer: Trainer, progress: Progress) -> None:
        settings = self.recipe.sample
        samples = [
            {
                "prompt": prompt,
                "text": complete(trainer.model, self.tokenizer, prompt, max_tokens=settings.max_tokens),
            }
            for prompt in settings.prompts
        ]
        shown = [f"{entry['prompt']} →{json.dumps(entry['text'], ensure_ascii=False)}" for entry in samples]
        self._tell(trainer, {"samples": samples}, shown, progress)

    def _tell(
        self, trainer: Trainer, entry: dict[str, object], lines: Sequence[str], progress: Progress
    ) -> None:
        if process_group.is_rank0():
            self.branch.append_metrics({"step": trainer.step, "tokens": trainer.tokens, **entry})
            for line in lines:
                progress.message(f"step {trainer.step}  {line}")

    def _plot(self, trainer: Trainer) -> None:
        plot_run(self.run)

    def _save(self, trainer: Trainer, *, finished: bool) -> None:
        recipe = self.recipe
        state = TrainingState(
            step=trainer.step,
            tokens=trainer.tokens,
            stage=recipe.lr_schedule().stage(max(0, trainer.step - 1)),
            finished=finished,
            recipe_sha256=hashlib.sha256(to_toml(recipe).encode()).hexdigest(),
        )
        save_state(
            self.branch.checkpoint(trainer.step),
            trainer.model,
            trainer.optimizer,
            state,
            tokenizer=Path(recipe.data.tokenizer),
        )
        if not process_group.is_rank0():
            return
        protect = self.run.branch_points() if self.branch == self.run.trunk else frozenset[int]()
        self.branch.prune(
            keep=recipe.checkpoint.keep, keep_every=recipe.checkpoint.keep_every, protect=protect
        )
