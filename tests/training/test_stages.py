"""A run is a list of stages: any lengths, mixtures, batches, sequence lengths and curves, resumed bit for bit."""

import shutil

import pytest
from minicpm_training.recipe.branching import decay_recipe, shortened
from minicpm_training.recipe.compatibility import refuse_another_run, same_model
from minicpm_training.recipe.files import load_recipe, to_toml
from minicpm_training.schedule import Schedule, Segment
from minicpm_training.session import decay_branch

from minicpm_edge.errors import UserError

# 6 steps of 4 sequences of 32, 4 of 3 of 64; then a decay of 4 and a last stage of 2 at its end's learning rate.
STAGES = """[
  {{name = "short", tokens = 768}},
  {{name = "long", tokens = 768, batch_tokens = 192, sequence_length = 64}},
  {{tokens = 768, form = "linear", floor = 0.25, sources = [{{path = "{root}/a"}}, {{path = "{root}/b"}}]}},
  {{name = "after", tokens = 384, sources = [{{path = "{root}/b"}}]}},
]"""


@pytest.fixture
def staged(make_recipe, workspace):
    """The small recipe with :data:`STAGES` instead of two lengths, and more settings on top."""

    def staged(*settings, stages=STAGES):
        text = " ".join(stages.format(root=workspace.as_posix()).split()).replace(", ]", "]")
        lengths = ("schedule={warmup_tokens=384}", "data.decay=[]")
        return make_recipe(*lengths, f"stages={text}", *settings)

    return staged


def test_the_plan_of_a_list(staged):
    plan = staged().plan
    assert [(stage.name, stage.first_step, stage.num_steps) for stage in plan.stages] == [
        ("short", 0, 6),
        ("long", 6, 4),
        ("decay", 10, 4),
        ("after", 14, 2),
    ]
    assert (plan.trunk_steps, plan.total_steps, plan.warmup_steps) == (10, 16, 3)
    assert [plan.num_tokens(step) for step in (0, 6, 10, 16)] == [0, 768, 1536, 2688]
    # What a stage leaves out is as in the one before.
    assert [stage.batch_tokens for stage in plan.stages] == [128, 192, 192, 192]
    assert [stage.sequence_length for stage in plan.stages] == [32, 64, 64, 64]
    schedule = staged().lr_schedule()
    assert [schedule.multiplier(step) for step in (0, 2, 9, 10, 12, 14, 15)] == [
        1 / 3,
        1,
        1,
        1,
        0.625,
        0.25,
        0.25,
    ]
    assert [schedule.stage(step) for step in (0, 5, 6, 10, 15)] == [
        "warmup",
        "short",
        "long",
        "decay",
        "after",
    ]


def test_a_decay_begins_where_the_stage_before_it_ended():
    schedule = Schedule(
        warmup_steps=0,
        segments=(
            Segment(name="one", num_steps=4, form="linear", floor=0.5),
            Segment(name="two", num_steps=4),
            Segment(name="three", num_steps=4, form="exponential", floor=0.125),
        ),
    )
    assert [schedule.multiplier(step) for step in (2, 4, 7, 8, 10)] == [0.75, 0.5, 0.5, 0.5, 0.25]
    assert schedule.multiplier(12) == pytest.approx(0.125)


@pytest.mark.slow
def test_two_lengths_are_a_list_of_two(staged, make_recipe, train, same_checkpoint, tmp_path, workspace):
    classical = make_recipe("schedule.stable_tokens=640", "schedule.decay_tokens=384", "schedule.form=linear")
    listed = staged(
        stages='[{{tokens = 640}}, {{tokens = 384, form = "linear", '
        'sources = [{{path = "{root}/a"}}, {{path = "{root}/b", weight = 2.0}}]}}]'
    )
    assert listed.plan == classical.plan
    one, other = train(classical, tmp_path / "one"), train(listed, tmp_path / "other")
    label = "step-00000005"
    assert same_checkpoint(one.decay(label).checkpoint(8), other.decay(label).checkpoint(8))


@pytest.mark.slow
def test_resuming_across_boundaries_is_exact(staged, train, same_checkpoint, tmp_path):
    whole = train(staged(), tmp_path / "whole")
    branch = decay_branch(whole, staged())
    assert [line["step"] for line in branch.metrics()] == [11, 12, 13, 14, 15, 16]
    assert [line["tokens"] for line in branch.metrics()][-1] == 2688
    assert [line["stage"] for line in branch.metrics()] == ["decay"] * 4 + ["after"] * 2

    for stop in range(1, 16):  # killed after each step: only the checkpoints up to it remain
        run = train(staged("checkpoint.every=1", "checkpoint.keep=99"), tmp_path / f"stopped-{stop}")
        part = decay_branch(run, staged()) if stop > 10 else run.trunk
        for step in part.steps():
            if step > stop:
                shutil.rmtree(part.checkpoint(step))
        run = train(staged(), run.folder)
        assert same_checkpoint(run.trunk.checkpoint(10), whole.trunk.checkpoint(10)), stop
        assert same_checkpoint(decay_branch(run, staged()).checkpoint(16), branch.checkpoint(16)), stop


def test_the_list_goes_round_through_toml(staged, tmp_path):
    recipe = staged()
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    assert load_recipe(str(path), ["name=small"]) == recipe


def test_a_decay_branches_off_any_stage_of_the_trunk(staged):
    decay = decay_recipe(staged(), 8, 400)
    assert [(stage.name, stage.num_steps) for stage in decay.plan.stages] == [
        ("short", 6),
        ("long", 2),
        ("decay", 3),
    ]
    assert decay.plan.stages[-1].form == "linear" and len(decay.plan.stages[-1].sources) == 2
    assert not same_model(decay, staged())
    plain = staged(stages="[{{tokens = 1280}}]")  # without a decay: as [schedule] shapes it
    assert decay_recipe(plain, 8, 400).plan.stages[-1].form == "exponential"
    with pytest.raises(UserError, match="shaped by the first stage of them that decays"):
        decay_recipe(staged(), 8, 400, ["schedule.form=cosine"])


def test_less_time_keeps_the_shares(staged):
    # Cut in the first stage, whose batch and sequences the next ones then go on with: half the tokens of each.
    short = shortened(staged(), 5)
    assert [(stage.name, stage.num_steps) for stage in short.plan.stages] == [
        ("short", 5),
        ("decay", 3),
        ("after", 2),
    ]
    assert shortened(staged(), 2).warmup_steps == 2


@pytest.mark.parametrize(
    ("stages", "is_same_run"),
    [
        (STAGES, True),
        (STAGES.replace('"long", tokens = 768', '"long", tokens = 7680'), True),  # a longer trunk
        (STAGES.replace("floor = 0.25", "floor = 0.5"), True),  # another ending
        (STAGES.replace('"short", tokens = 768', '"short", tokens = 1536'), False),
        (STAGES.replace("sequence_length = 64", "sequence_length = 32"), False),
        ('[{{tokens = 768}}, {{tokens = 768, form = "linear"}}]', True),  # cut, and another ending
    ],
)
def test_what_has_been_trained_cannot_change(staged, stages, is_same_run):
    if is_same_run:
        refuse_another_run(staged(), staged(stages=stages), "the run")
    else:
        with pytest.raises(UserError, match="stages are not those that the run was trained by"):
            refuse_another_run(staged(), staged(stages=stages), "the run")


@pytest.mark.parametrize(
    ("settings", "stages", "message"),
    [
        (["schedule.stable_tokens=640"], STAGES, r"schedule\.stable_tokens and \[\[stages\]\] say the same"),
        (["schedule.kind=cosine"], STAGES, r"schedule\.kind and \[\[stages\]\] say the same"),
        ([], "[{{tokens = 700, batch_tokens = 100}}]", "batch_tokens 100 is not a multiple"),
        ([], "[{{tokens = 256}}]", "warmup_tokens is larger than the first stage"),
        ([], '[{{tokens = 768}}, {{tokens = 768, form = "exponential", floor = 0.0}}]', "half_life_tokens"),
        (
            [],
            '[{{tokens = 768}}, {{tokens = 9, form = "linear"}}, {{name = "up", tokens = 9, form = "linear", '
            "floor = 0.5}}]",
            "stage 'up' begins at 0.1 of schedule.peak_lr and is to fall to 0.5",
        ),
        ([], "[{{tokens = 768, sorces = []}}]", "unknown key 'stages.sorces'; did you mean 'stages.sources'"),
    ],
)
def test_lists_that_cannot_be_are_one_line(staged, settings, stages, message):
    with pytest.raises(UserError, match=message):
        staged(*settings, stages=stages)
