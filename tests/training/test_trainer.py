"""The loop: it learns, accumulates exactly, repeats to the bit, and its loss is the golden one."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from minicpm_training.run import Run
from minicpm_training.state import read_state

from minicpm_edge.errors import UserError
from minicpm_edge.formats.checkpoint import load_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden" / "pretrain.json"
# Rounding differs between processors; after 20 updates it has grown to about 1e-4 of the loss.
GOLDEN_TOLERANCE = 2e-3


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in run.trunk.metrics() if "loss" in line]


@pytest.mark.slow
def test_the_loss_falls_on_a_repetitive_corpus(make_recipe, train, workspace, tmp_path):
    recipe = make_recipe(
        f'data.stable=[{{path="{(workspace / "b").as_posix()}"}}]', "schedule.stable_tokens=10_240"
    )
    values = losses(train(recipe, tmp_path / "run"))
    assert len(values) == 80 and values[0] > 4.0
    assert sum(values[-5:]) / 5 < 0.4  # the text is one sentence over and over


def test_a_mixture_of_experts_learns_and_is_saved(make_recipe, train, workspace, tmp_path):
    recipe = make_recipe(
        f'data.stable=[{{path="{(workspace / "b").as_posix()}"}}]',
        "schedule.stable_tokens=5_120",
        "model.num_experts=4",
        "model.num_experts_per_tok=2",
    )
    run = train(recipe, tmp_path / "run")
    values = losses(run)
    assert sum(values[-5:]) / 5 < 0.5 * values[0]
    model = load_checkpoint(run.trunk.checkpoint(40))
    assert model.config.num_experts == 4
    router = model.get_parameter("layers.0.feed_forward.router.weight")
    assert router.shape[0] == 4 and torch.isfinite(router).all()


def test_accumulated_micro_batches_are_one_big_batch(make_recipe, train, tmp_path):
    runs = [
        train(make_recipe(f"micro_batch_tokens={size}", "schedule.stable_tokens=640"), tmp_path / str(size))
        for size in (32, 96, 128)  # 96 leaves a smaller last micro-batch
    ]
    models = [load_checkpoint(run.trunk.checkpoint(5)) for run in runs]
    for other in models[1:]:
        for name, parameter in models[0].named_parameters():
            torch.testing.assert_close(dict(other.named_parameters())[name], parameter, rtol=1e-4, atol=1e-5)
    for other in runs[1:]:
        assert losses(other) == pytest.approx(losses(runs[0]), rel=1e-5)


def test_golden_losses(make_recipe, train, tmp_path):
    """Changed only on purpose, in a commit that says why."""
    values = losses(train(make_recipe("schedule.decay_tokens=0"), tmp_path / "run"))
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))["losses"]
    assert values == pytest.approx(golden, rel=GOLDEN_TOLERANCE)


def test_bf16_follows_fp32(make_recipe, train, tmp_path):
    exact = losses(train(make_recipe(), tmp_path / "fp32"))
    rounded = losses(train(make_recipe("precision=bf16"), tmp_path / "bf16"))
    assert rounded == pytest.approx(exact, rel=0.05) and rounded != exact


def test_metrics_say_what_happened(make_recipe, train, tmp_path):
    recipe = make_recipe("schedule.stable_tokens=1280", "schedule.decay_tokens=640", "schedule.form=linear")
    run = train(recipe, tmp_path / "run")
    lines = run.trunk.metrics()
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["tokens"] for line in lines] == [128 * step for step in range(1, 11)]
    assert [line["stage"] for line in lines] == ["warmup"] * 3 + ["stable"] * 7
    assert [line["lr"] for line in lines[:4]] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.01])
    for line in lines:
        assert line["grad_norm"] > 0 and line["tokens_per_second"] > 0 and 0 < line["mfu"] < 1
    decay = run.decay("step-00000010").metrics()
    assert [line["step"] for line in decay] == list(range(11, 16))
    assert [line["lr"] for line in decay] == pytest.approx([0.01, 0.0082, 0.0064, 0.0046, 0.0028])
    assert {line["stage"] for line in decay} == {"decay"}
    state = read_state(run.decay("step-00000010").checkpoint(15))
    assert (state.step, state.tokens, state.stage, state.finished) == (15, 15 * 128, "decay", True)


@pytest.mark.slow
def test_watching_does_not_change_the_run_and_resuming_is_exact(
    make_recipe, train, same_checkpoint, workspace, tmp_path
):
    plain = train(make_recipe(), tmp_path / "plain")
    watched = [
        f'data.valid=[{{path="{(workspace / "valid").as_posix()}"}}]',
        "evaluation.every=3",
        "evaluation.tokens=500",
        'sample.prompts=["the cat"]',
        "sample.every=4",
        "sample.max_tokens=5",
    ]
    train(make_recipe(*watched, "schedule.stable_tokens=1408"), tmp_path / "watched")  # 11 steps, then on
    run = train(make_recipe(*watched), tmp_path / "watched")
    assert same_checkpoint(plain.trunk.checkpoint(20), run.trunk.checkpoint(20))
    lines = run.trunk.metrics()
    assert losses(run) == losses(plain)
    assert [line["step"] for line in lines if "valid" in line] == [3, 6, 9, 11, 12, 15, 18, 20]
    assert [line["step"] for line in lines if "samples" in line] == [4, 8, 11, 12, 16, 20]
    assert all(0 < line["valid"]["valid"] < 8 for line in lines if "valid" in line)
    assert (run.folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_checkpoints_kept(make_recipe, train, tmp_path):
    recipe = make_recipe("checkpoint.every=2", "checkpoint.keep=2", "checkpoint.keep_every=8")
    run = train(recipe, tmp_path / "run")
    assert run.trunk.steps() == [8, 16, 18, 20]
    assert not list(run.trunk.checkpoints_folder.glob(".*"))


def test_cosine_lives_in_the_trunk(make_recipe, train, tmp_path):
    run = train(make_recipe("schedule.kind=cosine"), tmp_path / "run")
    lines = run.trunk.metrics()
    assert lines[-1]["lr"] == pytest.approx(0.01 * (0.1 + 0.45 * (1 + math.cos(math.pi * 16 / 17))))
    assert not run.decays() and run.trunk.steps()[-1] == 20


def test_z_loss_trains_but_is_not_in_the_reported_loss(make_recipe, train, tmp_path):
    short = "schedule.stable_tokens=384"
    plain = losses(train(make_recipe(short), tmp_path / "plain"))
    with_z = losses(train(make_recipe(short, "optimizer.z_loss=0.1"), tmp_path / "z"))
    assert with_z[0] == plain[0] and with_z[2] != plain[2]


def test_tensorboard_is_optional(make_recipe, train, tmp_path):
    recipe = make_recipe("log.tensorboard=true", "schedule.stable_tokens=384")
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(UserError, match="needs the package 'tensorboard'"):
            train(recipe, tmp_path / "run")
    else:
        train(recipe, tmp_path / "run")
        assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


@pytest.mark.slow(seconds=20)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler modules
def test_torch_compile_gives_the_same_losses(make_recipe, train, tmp_path):
    short = ("schedule.stable_tokens=512", "model.num_hidden_layers=1")
    plain = losses(train(make_recipe(*short), tmp_path / "plain"))
    compiled = losses(train(make_recipe(*short, "compile=true"), tmp_path / "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-3)
