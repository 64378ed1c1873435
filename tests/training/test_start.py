"""Runs that start from a checkpoint, as it is or transformed."""

import json

import pytest
import torch
from minicpm_training.session import Session
from minicpm_training.start import model_config, settled, starting_model
from minicpm_training.studies.run import run

from minicpm_edge.errors import UserError
from minicpm_edge.formats.checkpoint import load_checkpoint
from minicpm_edge.text.tokenizer import Tokenizer

# The recipe's own keys of the shape, which a run from a checkpoint leaves out.
SHAPE = ("model={}", "schedule.stable_tokens=384", "schedule.warmup_tokens=0")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("base") / "run"


@pytest.fixture
def from_base(make_recipe, train, base):
    """Recipes that start from a small run's last checkpoint."""
    if not base.exists():
        train(make_recipe("schedule.stable_tokens=640"), base)
    return lambda *settings: make_recipe(*SHAPE, f"init.path={base.as_posix()}", *settings)


def logits(model):
    ids = torch.arange(40).reshape(2, 20) % 97
    with torch.no_grad():
        return model.eval()(ids)


def start(recipe, workspace):
    config = model_config(recipe, Tokenizer.load(workspace / "tok"))
    model = starting_model(recipe, config, torch.device("cpu"))
    assert model.config == config
    return model


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ((), {}),
        (("init.untie=true",), {"tie_word_embeddings": False}),
        (("init.upcycle={experts=4}",), {"num_experts": 4, "num_experts_per_tok": 2}),
        (("init.upcycle={experts=3, top_k=1}", "init.untie=true"), {"num_experts": 3}),
        (("init.max_position_embeddings=4096",), {"max_position_embeddings": 4096}),
    ],
)
def test_before_any_step_the_logits_are_the_checkpoints(from_base, workspace, base, settings, keys):
    model = start(from_base(*settings), workspace)
    for key, value in keys.items():
        assert getattr(model.config, key) == value
    expected = logits(load_checkpoint(base / "checkpoints" / "step-00000005"))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_what_is_copied_is_a_copy_and_routers_differ(from_base, workspace):
    model = start(from_base("init.untie=true", "init.upcycle={experts=4}"), workspace)
    assert model.head.weight.data_ptr() != model.embedding.weight.data_ptr()
    first, second = (layer.feed_forward for layer in model.layers)
    assert torch.equal(first.gate_up[0], first.gate_up[3]) and not torch.equal(first.gate_up, second.gate_up)
    assert not torch.equal(first.router.weight, second.router.weight)
    assert first.router.weight.std().item() == pytest.approx(0.1, rel=0.2)  # paper, section 6.4
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


def test_another_rope_base_turns_positions_otherwise(from_base, workspace, base):
    model = start(from_base("init.rope_theta=1_000_000.0"), workspace)
    expected = logits(load_checkpoint(base / "checkpoints" / "step-00000005"))
    assert not torch.allclose(logits(model), expected, atol=1e-3)
    torch.testing.assert_close(logits(model)[:, 0], expected[:, 0])  # position 0 does not turn
    assert model.inv_freq_C2[-1] < load_checkpoint(base / "checkpoints" / "step-00000005").inv_freq_C2[-1]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), ("init.untie=true",), ("init.upcycle={experts=4}",)])
def test_they_train_resume_exactly_and_load_again(from_base, same_checkpoint, tmp_path, settings):
    recipe = from_base(*settings, "checkpoint.every=1", "checkpoint.keep=9")
    whole = run(recipe, tmp_path / "whole")
    assert whole.checkpoint == tmp_path / "whole/checkpoints/step-00000003"
    assert whole.loss < 5.0  # where random weights begin at ln 300 = 5.7
    the_run = whole.run
    again = Session(
        recipe=settled(recipe),
        run=the_run,
        branch=the_run.decay("x"),
        resume_from=the_run.trunk.checkpoint(1),
    ).trainer()
    assert again.run(3)
    loaded = load_checkpoint(whole.checkpoint)
    for (name, one), other in zip(again.model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_the_recipe_names_the_very_checkpoint(from_base, base, tmp_path):
    recipe = settled(from_base())
    assert recipe.init.path == (base / "checkpoints/step-00000005").as_posix()
    assert settled(recipe) == recipe


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("model.hidden_size=32",), r"model\.hidden_size is given by init\.path: leave it out"),
        (("init.upcycle={experts=2, top_k=3}",), r"top_k 3 is more than init\.upcycle\.experts 2"),
        (("init.untied=true",), r"unknown key 'init\.untied'; did you mean 'init\.untie'"),
    ],
)
def test_what_cannot_start_is_one_line(from_base, settings, message):
    with pytest.raises(UserError, match=message):
        from_base(*settings)


def test_a_checkpoint_that_does_not_fit_is_named(from_base, make_recipe, workspace, base, tmp_path):
    tokenizer = Tokenizer.load(workspace / "tok")
    with pytest.raises(UserError, match="nowhere"):
        model_config(make_recipe(*SHAPE, "init.path=nowhere"), tokenizer)
    with pytest.raises(UserError, match=r"longer than the model's context 1024: raise init\.max_position"):
        length = ("data.sequence_length=2048", "batch_tokens=2048", "micro_batch_tokens=2048")
        model_config(from_base(*length), tokenizer)
    small = tmp_path / "small"
    small.mkdir()
    for file in (base / "checkpoints/step-00000005").iterdir():
        (small / file.name).write_bytes(file.read_bytes())
    entries = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**entries, "vocab_size": 100}))
    with pytest.raises(
        UserError, match=r"the vocabulary of init\.path, 100 is smaller than the tokenizer's 300"
    ):
        model_config(make_recipe(*SHAPE, f"init.path={small.as_posix()}"), tokenizer)


def test_a_study_gets_a_result_and_a_finished_run_at_once(make_recipe, workspace, tmp_path):
    valid = f'data.valid=[{{path="{(workspace / "valid").as_posix()}"}}]'
    recipe = make_recipe("schedule.stable_tokens=384", "schedule.decay_tokens=256", valid)
    result = run(recipe, tmp_path / "run")
    assert [line["step"] for line in result.metrics if "loss" in line] == [1, 2, 3, 4, 5]
    assert result.checkpoint == tmp_path / "run/decays/step-00000003/checkpoints/step-00000005"
    assert 2 < result.loss < 7 and 1 < result.bits_per_byte["valid"] < 8
    before = result.checkpoint.stat().st_mtime_ns
    assert run(recipe, tmp_path / "run") == result
    assert result.checkpoint.stat().st_mtime_ns == before
