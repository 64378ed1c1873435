"""Recipes: defaults < file < --set, unknown keys, ranges, and the way back to TOML."""

import pytest
from minicpm_training.recipe.files import load_recipe, shipped_recipes, to_toml
from minicpm_training.recipe.schema import Recipe

from minicpm_edge.errors import UserError

SMALLEST = """
[data]
tokenizer = "tok"
stable = [{ path = "shards/a" }]
[schedule]
stable_tokens = 3_276_800
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(SMALLEST + "peak_lr = 0.02\n", encoding="utf-8")
    return path


def test_defaults_are_overridden_by_the_file_and_the_file_by_set(recipe_file):
    assert load_recipe(str(recipe_file)).schedule.peak_lr == 0.02
    settings = [
        "schedule.peak_lr=0.005",
        "model.num_hidden_layers=2",
        "precision=fp32",
        "schedule.form=1-sqrt",
    ]
    recipe = load_recipe(str(recipe_file), [*settings, 'data.decay=[{path="b", weight=3}]'])
    assert recipe.schedule.peak_lr == 0.005
    assert recipe.model.config().num_hidden_layers == 2
    assert recipe.precision == "fp32" and recipe.schedule.form == "1-sqrt"
    assert recipe.data.decay[0].weight == 3.0
    assert recipe.optimizer.beta2 == 0.95 and recipe.name == "mine"


def test_defaults_are_the_papers_choices(recipe_file):
    recipe = load_recipe(str(recipe_file))
    optimizer = recipe.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps) == (0.9, 0.95, 1e-8)
    assert (optimizer.weight_decay, optimizer.clip_norm, recipe.objective.z_loss) == (0.1, 1.0, 0.0)
    assert Recipe.model_fields["schedule"].annotation.model_fields["peak_lr"].default == 0.01
    assert recipe.warmup_steps == recipe.trunk_steps // 100 == 1


@pytest.mark.parametrize(
    ("setting", "nearest"),
    [
        ("schedule.peak_rl=0.1", "schedule.peak_lr"),
        ("scheduel.peak_lr=0.1", "schedule.peak_lr"),
        ("batch_token=1", "batch_tokens"),
        ("model.num_layers=3", "model.num_hidden_layers"),
        ('data.stable=[{path="a", wieght=1}]', "data.stable.weight"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(recipe_file, setting, nearest):
    with pytest.raises(UserError, match=f"unknown key .*{nearest!r}"):
        load_recipe(str(recipe_file), [setting])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("schedule.peak_lr=-1", "schedule.peak_lr is -1: input should be greater than 0"),
        ("schedule.peak_lr=nan", "schedule.peak_lr"),
        ("schedule.form=cubic", "schedule.form is 'cubic'"),
        ("seed=99999999999999999999999", "seed"),
        ("batch_tokens=1000", "batch_tokens 1000 is not a multiple .* nearest is 1024"),
        ("micro_batch_tokens=1000", "micro_batch_tokens 1000 is not a multiple"),
        ("schedule.floor=0", "half_life_tokens"),
        ("schedule.warmup_tokens=9_999_999", "warmup_tokens is larger"),
        ("data.stable=[]", "data.stable"),
        ("data.stable=3", "data.stable"),
        ("model=3", "model"),
        ("schedule.kind.x=3", "schedule.kind"),
        ("=3", "not of the form"),
        ("schedule.peak_lr", "not of the form"),
        ("schedule.peak_lr=[1", "not a TOML value"),
        ("schedule.peak_lr=", "schedule.peak_lr"),
        ("schedule.peak_lr=1\nseed=2", "more than one value"),
    ],
)
def test_a_bad_value_is_one_clear_line(recipe_file, setting, message):
    with pytest.raises(UserError, match=message) as failure:
        load_recipe(str(recipe_file), [setting])
    assert "\n" not in str(failure.value)


def test_cosine_has_no_decay_stage(recipe_file):
    assert load_recipe(str(recipe_file), ["schedule.kind=cosine"]).total_steps == 100
    with pytest.raises(UserError, match="decay_tokens to 0"):
        load_recipe(str(recipe_file), ["schedule.kind=cosine", "schedule.decay_tokens=100"])


def test_missing_things_are_named(tmp_path):
    with pytest.raises(UserError, match=r"data.* is missing: give it"):
        load_recipe(None)
    with pytest.raises(UserError, match=r"no recipe file 'nowhere\.toml'; shipped recipes: .*tiny"):
        load_recipe("nowhere.toml")
    (tmp_path / "bad.toml").write_text("a = = 3")
    with pytest.raises(UserError, match="is not TOML"):
        load_recipe(str(tmp_path / "bad.toml"))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(str(tmp_path / "bytes.toml"))
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(str(tmp_path))


def test_resolved_toml_reads_back_equal_and_is_settled(tmp_path, recipe_file):
    nasty = 'quote " backslash \\ newline \n tab \t del \x7f 中 🙂'
    recipe = load_recipe(str(recipe_file))
    recipe = recipe.model_copy(update={"sample": recipe.sample.model_copy(update={"prompts": (nasty,)})})
    path = tmp_path / "out" / "recipe.toml"
    path.parent.mkdir()
    path.write_text(to_toml(recipe), encoding="utf-8", newline="\n")
    again = load_recipe(str(path))
    assert again == recipe and again.sample.prompts == (nasty,)
    assert again.schedule.warmup_tokens == recipe.batch_tokens  # 1 % of 100 steps, written down
    # A longer trunk keeps the warm-up that has been run.
    longer = load_recipe(str(path), ["schedule.stable_tokens=32_768_000"])
    assert longer.warmup_steps == recipe.warmup_steps == 1


def test_paths_become_absolute(recipe_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(str(recipe_file))
    assert recipe.data.tokenizer == (tmp_path / "tok").as_posix()
    assert recipe.data.stable[0].path == (tmp_path / "shards/a").as_posix()


def test_stage_lengths_in_steps(recipe_file):
    recipe = load_recipe(str(recipe_file), ["schedule.decay_tokens=32769"])
    assert (recipe.trunk_steps, recipe.total_steps) == (100, 102)  # the last batch is whole
    schedule = recipe.lr_schedule()
    assert [(segment.name, segment.num_steps) for segment in schedule.segments] == [
        ("stable", 100),
        ("decay", 2),
    ]


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load(name):
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.model.config() and recipe.schedule.decay_tokens


def test_the_papers_recipes_have_the_papers_values():
    large = load_recipe("minicpm-2.4b")
    assert large.batch_tokens == 3_932_160 and large.data.sequence_length == 4096
    assert (large.trunk_steps, large.total_steps) == (261_000, 279_500)
    assert large.lr_schedule().segments[1].half_life == 5000
    assert sum(source.weight for source in large.data.stable) == 100
    assert large.lr_schedule().multiplier(279_499) == 0.1
    small = load_recipe("minicpm-1.2b")
    assert small.batch_tokens == 4_194_304 and small.model.config().num_key_value_heads == 8
    assert small.total_steps * small.batch_tokens == pytest.approx(1.1e12, rel=1e-3)
