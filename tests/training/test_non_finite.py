"""A loss that is not finite stops the run before it touches the weights."""

import math

import pytest
import torch
from minicpm_training.objectives.base import Losses
from minicpm_training.run import Run
from minicpm_training.session import RunContext, Session, train_run
from minicpm_training.state import read_state
from minicpm_training.trainer import NonFiniteLossError

from minicpm_edge.cli.progress import Progress
from minicpm_edge.formats.checkpoint import load_checkpoint, verify_manifest


@pytest.fixture
def trainer(make_recipe, tmp_path):
    run = Run(folder=tmp_path / "run")
    return Session(recipe=make_recipe(), run=run, branch=run.trunk, resume_from=None).trainer()


def weights_and_moments(trainer):
    tensors = [parameter.detach() for parameter in trainer.model.parameters()]
    tensors += trainer.optimizer.named_tensors().values()
    return [tensor.clone() for tensor in tensors]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nothing_changes_and_the_batch_is_named(trainer, bad, where):
    for _ in range(3):
        trainer.train_step()
    before = weights_and_moments(trainer)
    origins = [batch.describe() for batch in trainer.dataloader(3)]
    if where == "loss":
        objective = trainer.objective

        def broken(batch):
            losses = objective(batch)
            return Losses(total=losses.total, metrics={"loss": losses.metrics["loss"] * bad})

        trainer.objective = broken
    else:
        trainer.model.layers[0].attention.qkv.weight.register_hook(lambda gradient: gradient * bad)
    with pytest.raises(NonFiniteLossError) as failure:
        trainer.train_step()
    message = str(failure.value)
    assert "step 4:" in message and all(origin in message for origin in origins)
    assert ("the loss is" if where == "loss" else "the gradient's norm is") in message
    assert trainer.step == 3
    after = weights_and_moments(trainer)
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_a_run_that_blows_up_keeps_its_last_good_checkpoint(make_recipe, tmp_path):
    recipe = make_recipe("schedule.peak_lr=1e19", "schedule.warmup_tokens=0", "checkpoint.every=1")
    run = Run(folder=tmp_path / "run")
    with (
        (tmp_path / "log").open("w") as stream,
        pytest.raises(NonFiniteLossError, match="The last checkpoint"),
    ):
        train_run(recipe, run, RunContext(progress=Progress(stream)))
    tip = run.trunk.steps()[-1]
    assert len(run.trunk.metrics()) == tip == read_state(run.trunk.checkpoint(tip)).step
    verify_manifest(run.trunk.checkpoint(tip))
    model = load_checkpoint(run.trunk.checkpoint(tip))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
