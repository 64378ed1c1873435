"""Recipes made from a recipe: a decay branched off somewhere along the trunk, or the same run in less time."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence

from minicpm_edge.errors import UserError
from minicpm_training.recipe.compatibility import refuse_another_run
from minicpm_training.recipe.files import load_recipe, to_toml
from minicpm_training.recipe.schema import Recipe
from minicpm_training.recipe.sections import Source, StageSection


def decay_recipe(
    trunk: Recipe, at: int, tokens: int, settings: Sequence[str] = (), *, sources: tuple[Source, ...] = ()
) -> Recipe:
    """The trunk's recipe cut at step ``at`` with a decay of ``tokens``: alone it would train the same model.

    Args:
        settings: ``--set`` for the decay's shape and for what is harmless.
        sources: another mixture for the decay.

    Raises:
        UserError: for a run that cannot be branched, a step within warm-up, and settings that make another run.
    """
    if not trunk.plan.can_branch:
        raise UserError(
            "this run has no stable stage to branch from: decays are for schedule.kind 'wsd', or for stages that "
            "begin with a constant one"
        )
    if at < trunk.warmup_steps:
        raise UserError(
            f"step {at} is still in warm-up (it ends at {trunk.warmup_steps}): branch from a later one"
        )
    if tokens < 1:
        raise UserError(f"--tokens {tokens}: a decay needs at least one token")
    entries = tomllib.loads(to_toml(trunk))
    if trunk.stages:
        if any(setting.strip().startswith(("schedule.", "stages")) for setting in settings):
            raise UserError(
                "the run has [[stages]]: its decay is shaped by the first stage of them that decays"
            )
        decays = [section for section in trunk.stages if section.form != "constant"]
        decay = decays[0] if decays else trunk.decay_section(tokens, ())
        decay = decay.model_copy(update={"tokens": tokens, "sources": sources or decay.sources})
        stages = [*trunk_sections(trunk, at), decay]
        entries["stages"] = [section.model_dump(exclude_none=True) for section in stages]
    else:
        if sources:
            entries["data"]["decay"] = [source.model_dump() for source in sources]
        entries["schedule"] |= {"stable_tokens": at * trunk.batch_tokens, "decay_tokens": tokens}
    recipe = load_recipe(entries, settings)
    refuse_another_run(trunk, recipe, "this decay")
    if recipe.trunk_steps != at or recipe.total_steps == at:
        raise UserError("--set schedule.stable_tokens and decay_tokens: give --at and --tokens instead")
    return recipe


def shortened(recipe: Recipe, trunk_steps: int) -> Recipe:
    """The recipe with its trunk ended after ``trunk_steps`` and what follows it shortened alike."""
    branch = [
        scaled_steps(stage.num_steps, recipe, trunk_steps) * stage.batch_tokens
        for stage in recipe.plan.branch
    ]
    warmup_tokens = min(trunk_steps, recipe.warmup_steps) * recipe.plan.stages[0].batch_tokens
    if recipe.stages:
        trunk = trunk_sections(recipe, trunk_steps)
        rest = [
            section.model_copy(update={"tokens": tokens})
            for section, tokens in zip(recipe.stages[len(recipe.plan.trunk) :], branch, strict=True)
        ]
        return recipe.with_changes(
            stages=[section.model_dump() for section in (*trunk, *rest)],
            schedule={"warmup_tokens": warmup_tokens},
        )
    return recipe.with_changes(
        schedule={
            "stable_tokens": trunk_steps * recipe.batch_tokens,
            "decay_tokens": sum(branch),
            "warmup_tokens": warmup_tokens,
        }
    )


def scaled_steps(num_steps: int, recipe: Recipe, trunk_steps: int) -> int:
    """What a stage of ``num_steps`` after the recipe's trunk has after another: the same share of it, at least 1."""
    return max(1, round(num_steps * trunk_steps / recipe.trunk_steps))


def trunk_sections(recipe: Recipe, until_step: int) -> list[StageSection]:
    """The recipe's ``[[stages]]`` up to a step of its trunk, the last of them cut there."""
    return [
        section.model_copy(
            update={"tokens": (min(until_step, stage.end_step) - stage.first_step) * stage.batch_tokens}
        )
        for section, stage in zip(recipe.stages, recipe.plan.trunk, strict=False)
        if stage.first_step < until_step
    ]
