"""Every key of a recipe says, where it stands, what changing it makes of a run."""

from typing import get_type_hints

import pytest
from minicpm_training.recipe.compatibility import effects_of, refuse_another_run, same_model
from minicpm_training.recipe.schema import Recipe
from minicpm_training.recipe.sections import Effect

from minicpm_edge.errors import UserError
from minicpm_edge.model.config import ModelConfig

EFFECTS = dict(effects_of(Recipe))


def test_every_key_is_marked():
    sections = {"data", "schedule"}  # their keys are marked one by one
    unmarked = [key for key, effect in EFFECTS.items() if effect is None and key not in sections]
    assert not unmarked and len(EFFECTS) > 60
    for key, effect in {
        "seed": Effect.IDENTITY,
        "model.hidden_size": Effect.IDENTITY,
        "optimizer.beta2": Effect.IDENTITY,
        "data.stable.weight": Effect.IDENTITY,
        "schedule.stable_tokens": Effect.LENGTH,
        "data.decay": Effect.LENGTH,
        "checkpoint.every": Effect.HARMLESS,
        "micro_batch_tokens": Effect.HARMLESS,
        "data.tokenizer": Effect.HARMLESS,
    }.items():
        assert EFFECTS[key] is effect, key


@pytest.mark.parametrize(
    ("setting", "effect"),
    [
        ("micro_batch_tokens=32", Effect.HARMLESS),
        ("log.every=7", Effect.HARMLESS),
        ("schedule.stable_tokens=1280", Effect.LENGTH),
        ("schedule.form=cosine", Effect.LENGTH),
        ("optimizer.beta1=0.8", Effect.IDENTITY),
        ("objective.z_loss=0.1", Effect.IDENTITY),
        ("data.sequence_length=64", Effect.IDENTITY),
        ("model.num_hidden_layers=3", Effect.IDENTITY),
    ],
)
def test_a_change_is_what_its_key_says(make_recipe, setting, effect):
    saved, asked = make_recipe(), make_recipe(setting)
    assert same_model(saved, asked) == (effect is Effect.HARMLESS)
    if effect is Effect.IDENTITY:
        with pytest.raises(UserError, match=f"{setting.split('=')[0]} was .* cannot become"):
            refuse_another_run(saved, asked, "the run")
    else:
        refuse_another_run(saved, asked, "the run")


def test_the_length_of_a_cosine_is_part_of_it(make_recipe):
    saved = make_recipe("schedule.kind=cosine")
    refuse_another_run(saved, make_recipe("schedule.kind=cosine", "log.every=3"), "the run")
    with pytest.raises(UserError, match="stable_tokens was 2560"):
        refuse_another_run(
            saved, make_recipe("schedule.kind=cosine", "schedule.stable_tokens=1280"), "the run"
        )


def test_folders_may_move(make_recipe, workspace, tmp_path):
    (tmp_path / "a").symlink_to(workspace / "a")
    moved = make_recipe(f"data.stable=[{{path='{(tmp_path / 'a').as_posix()}'}}]")
    assert same_model(make_recipe(), moved)
    other = make_recipe(f"data.stable=[{{path='{(workspace / 'b').as_posix()}'}}]")
    with pytest.raises(UserError, match=r"data\.stable was \[\('a', 1\.0\)\]"):
        refuse_another_run(make_recipe(), other, "the run")


def test_a_key_of_an_earlier_version_has_its_present_name(make_recipe):
    assert make_recipe("optimizer.z_loss=0.25").objective.z_loss == 0.25
    both = make_recipe("objective.z_loss=0.5")
    assert both.objective.z_loss == 0.5


def test_the_models_keys_are_those_of_its_config():
    keys = {key.removeprefix("model.") for key in EFFECTS if key.startswith("model.")}
    hints = get_type_hints(ModelConfig)
    numbers_and_switches = {name for name, hint in hints.items() if hint in (int, float, bool)}
    assert {"hidden_size", "rope_theta", "tie_word_embeddings", "num_experts"} < keys
    assert keys - {"preset", "embedding_rule"} == numbers_and_switches - {"bos_token_id", "eos_token_id"}
