"""Decays branch from any kept trunk checkpoint, the trunk goes on, and both are to the bit what one run would be."""

import pytest
from minicpm_training.recipe.branching import decay_recipe
from minicpm_training.recipe.files import load_recipe
from minicpm_training.session import RunContext, train_branch

from minicpm_edge.cli.progress import Progress
from minicpm_edge.errors import UserError
from minicpm_edge.formats.resolve import resolve_model


@pytest.fixture
def branch_off(tmp_path):
    def branch_off(run, at, tokens, *settings):
        recipe = decay_recipe(load_recipe(str(run.trunk.recipe_path)), at, tokens, settings)
        start = run.trunk.checkpoint(at)
        with (tmp_path / "log").open("w") as stream:
            context = RunContext(progress=Progress(stream))
            assert train_branch(recipe, run, run.decay(start.name), start, context)
        return run.decay(start.name)

    return branch_off


@pytest.mark.slow
def test_branching_and_going_on(make_recipe, train, branch_off, same_checkpoint, tmp_path):
    trunk_20 = make_recipe()
    run = train(trunk_20, tmp_path / "run")
    tip = run.trunk.checkpoint(20)
    tip_before = (tip / "model.safetensors").read_bytes()
    decayed = branch_off(run, 10, 5 * 128, "schedule.form=1-sqrt")

    # The same as one run with those settings.
    whole = make_recipe("schedule.stable_tokens=1280", "schedule.decay_tokens=640", "schedule.form=1-sqrt")
    straight = train(whole, tmp_path / "straight")
    assert same_checkpoint(decayed.checkpoint(15), straight.decay("step-00000010").checkpoint(15))
    # And the recipe in its folder alone trains it again.
    again = train(load_recipe(str(decayed.recipe_path)), tmp_path / "again")
    assert same_checkpoint(decayed.checkpoint(15), again.decay("step-00000010").checkpoint(15))

    # The trunk is untouched and goes on as a longer run would have.
    assert (tip / "model.safetensors").read_bytes() == tip_before
    longer = make_recipe("schedule.stable_tokens=3840")
    run = train(longer, tmp_path / "run")
    assert same_checkpoint(run.trunk.checkpoint(30), train(longer, tmp_path / "long").trunk.checkpoint(30))
    assert [line["step"] for line in run.trunk.metrics()] == list(range(1, 31))


def test_the_decay_reads_its_own_mixture_where_the_trunk_stopped(make_recipe, workspace):
    from minicpm_training.data.packed_dataloader import open_packed

    from minicpm_edge.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(workspace / "tok")
    recipe = make_recipe("schedule.stable_tokens=1280", "schedule.decay_tokens=640")
    dataloader = open_packed(recipe, tokenizer)
    origins = [[origin for batch in dataloader(step) for origin in batch.origins] for step in range(15)]
    trunk = [origin for step in origins[:10] for origin in step]
    decay = [origin for step in origins[10:] for origin in step]
    assert all(origin.startswith("a:") for origin in trunk) and len(set(trunk)) == 40
    from_a = [origin for origin in decay if origin.startswith("a:")]
    assert 6 <= len(from_a) <= 7 and len(decay) == 20  # a third of the sequences
    assert not set(from_a) & set(trunk)  # no sequence twice before the set is through


def test_a_run_stands_for_its_newest_finished_decay(make_recipe, train, branch_off, tmp_path):
    run = train(make_recipe(), tmp_path / "run")
    assert resolve_model(run.folder).path == run.trunk.checkpoint(20)
    decayed = branch_off(run, 15, 256)
    assert resolve_model(run.folder).path == decayed.checkpoint(17)


def test_what_cannot_branch_is_refused(make_recipe):
    recipe = make_recipe()
    with pytest.raises(UserError, match="still in warm-up"):
        decay_recipe(recipe, 2, 256, [])
    with pytest.raises(UserError, match="at least one token"):
        decay_recipe(recipe, 10, 0)
    with pytest.raises(UserError, match="give --at and --tokens"):
        decay_recipe(recipe, 10, 256, ["schedule.stable_tokens=1152"])
    with pytest.raises(UserError, match=r"schedule\.peak_lr was 0\.01"):
        decay_recipe(recipe, 10, 256, ["schedule.peak_lr=0.02"])
    with pytest.raises(UserError, match="no stable stage to branch from"):
        decay_recipe(make_recipe("schedule.kind=cosine"), 10, 256, [])


@pytest.mark.slow
def test_another_decay_of_the_same_tip_is_a_branch_of_its_own(make_recipe, train, tmp_path):
    run = train(make_recipe("schedule.decay_tokens=256"), tmp_path / "run")
    [first] = run.decays()
    released = (first.checkpoint(22) / "model.safetensors").read_bytes()
    train(make_recipe("schedule.decay_tokens=1024"), tmp_path / "run")
    assert [branch.folder.name for branch in run.decays()] == ["step-00000020", "step-00000020-2"]
    assert (first.checkpoint(22) / "model.safetensors").read_bytes() == released
    # What touches no number goes on in the same branch.
    train(make_recipe("schedule.decay_tokens=1024", "log.every=5"), tmp_path / "run")
    assert len(run.decays()) == 2
