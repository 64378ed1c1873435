"""The seam for objectives: a toy one of pairs with a reference, through recipe, data, loop, metrics and checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import pytest
import torch
from minicpm_training.objectives import registry
from minicpm_training.objectives.base import Losses
from minicpm_training.recipe.schema import Recipe
from minicpm_training.recipe.sections import Effect, Section
from minicpm_training.run import Run
from minicpm_training.session import RunContext, Session
from torch import Tensor
from torch.nn import functional as F

from minicpm_edge.cli.progress import Progress


class PairsSection(Section):
    kind: Literal["pairs"] = "pairs"
    beta: float = 0.5


class PairsRecipe(Recipe):
    objective: Annotated[PairsSection, Effect.IDENTITY] = PairsSection()


@dataclass(frozen=True)
class Pairs:
    chosen_BT: Tensor
    rejected_BT: Tensor

    @property
    def num_targets(self):
        return len(self.chosen_BT)

    @property
    def num_tokens(self):
        return self.chosen_BT.numel() + self.rejected_BT.numel()

    def to(self, device):
        return replace(self, chosen_BT=self.chosen_BT.to(device), rejected_BT=self.rejected_BT.to(device))

    def describe(self):
        return "pairs"


def log_probability_B(model, ids_BT):
    logits_BTV = model(ids_BT)[:, :-1]
    return -F.cross_entropy(logits_BTV.transpose(1, 2), ids_BT[:, 1:], reduction="none").sum(1)


class PairsObjective:
    """A preference for counting up over counting down, beside the model that the run starts from."""

    def dataloader(self, recipe, tokenizer) -> Callable[[int], list[Pairs]]:
        def pairs(step):
            starts = torch.arange(2)[:, None] + 5 + step % 3
            up = starts + torch.arange(4)
            return [Pairs(up, up.flip(1)), Pairs(up[:1] + 7, up[:1].flip(1) + 7)]

        return pairs

    def objective(self, recipe, model, reference):
        frozen = reference()

        def losses(batch):
            with torch.no_grad():
                base_B = log_probability_B(frozen, batch.chosen_BT) - log_probability_B(
                    frozen, batch.rejected_BT
                )
            ours_B = log_probability_B(model, batch.chosen_BT) - log_probability_B(model, batch.rejected_BT)
            margin_B = recipe.objective.beta * (ours_B - base_B)
            loss = -F.logsigmoid(margin_B).sum()
            metrics = {"loss": loss.detach(), "accuracy": (margin_B.detach() > 0).float().sum()}
            return Losses(total=loss, metrics=metrics)

        return losses


def test_an_objective_of_pairs_is_a_file_a_section_and_a_line(
    make_recipe, train, same_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setitem(registry.OBJECTIVES, "pairs", PairsObjective())

    def recipe(stable_tokens):
        entries = make_recipe(f"schedule.stable_tokens={stable_tokens}", "checkpoint.every=4").model_dump()
        return PairsRecipe.model_validate({**entries, "objective": {"kind": "pairs"}})

    run = Run(folder=tmp_path / "run")
    session = Session(recipe=recipe(8 * 128), run=run, branch=run.trunk, resume_from=None)
    with (tmp_path / "log").open("w") as stream:
        context = RunContext(progress=Progress(stream))
        assert session.train(8, context)
        lines = run.trunk.metrics()
        # ln 2: at first, the model is its reference.
        assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
        assert lines[0]["accuracy"] == 0.0 and lines[-1]["accuracy"] == 1.0 and lines[-1]["loss"] < 0.5
        assert [line["tokens"] for line in lines] == [24 * step for step in range(1, 9)]
        # Resumed in the middle, the reference is still the model of the start.
        again = Run(folder=tmp_path / "again")
        resumed = Session(
            recipe=recipe(8 * 128), run=again, branch=again.trunk, resume_from=run.trunk.checkpoint(4)
        )
        assert resumed.train(8, context)
    assert same_checkpoint(again.trunk.checkpoint(8), run.trunk.checkpoint(8))
