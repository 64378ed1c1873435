"""The wind tunnel through the command line, on models of a second: planned, trained, stopped, resumed, reported."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from minicpm_training.recipe.files import to_toml
from minicpm_training.studies.learning_rate import LearningRateStudy
from minicpm_training.studies.scaling import ScalingStudy
from minicpm_training.studies.sizes import sized
from minicpm_training.studies.trials import Trial, read_result, run_trials

from minicpm_edge.cli.main import main
from minicpm_edge.errors import UserError


@pytest.fixture
def recipe(make_recipe, workspace):
    valid = f'data.valid=[{{path="{(workspace / "valid").as_posix()}"}}]'
    return make_recipe(
        "schedule.stable_tokens=768", "schedule.decay_tokens=256", valid, "evaluation.tokens=500"
    )


@pytest.fixture
def recipe_file(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(to_toml(recipe), encoding="utf-8")
    return "small.toml"


def test_a_width_keeps_the_proportions(recipe):
    config = sized(recipe, width=128, depth=3).model.config()
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (128, 256, 3)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 32)
    assert config.dim_model_base == 32  # muP: the base stays
    assert sized(recipe, width=128, rules="standard").model.config().dim_model_base == 128
    with pytest.raises(UserError, match="width 100 is not a multiple of the head dim 32"):
        sized(recipe, width=100)


def test_trials_are_found_by_what_they_are(recipe, make_recipe):
    study = ScalingStudy(recipe=recipe, widths=[32, 64], held_out_width=96, lengths=[0.02, 0.04])
    one, other, *_ = study.trials()
    # One trunk, two lengths: the same folder, two results.
    assert one.folder(Path()) == other.folder(Path()) and one.key != other.key
    assert len({trial.folder(Path()) for trial in study.trials()}) == 2
    again = Trial(values={}, recipe=make_recipe("log.every=3"))
    assert again.key == Trial(values={"any": 1}, recipe=make_recipe("micro_batch_tokens=32")).key
    assert again.key != Trial(values={}, recipe=make_recipe("seed=1")).key
    # Another validation set changes no weight, but the score.
    measured = Trial(values={}, recipe=make_recipe('data.valid=[{path="other"}]'))
    assert again.key != measured.key and again.folder(Path()) != measured.folder(Path())


def test_the_plan_costs_nothing(recipe_file, capsys, tmp_path):
    words = ["tunnel", "lr", recipe_file, "--widths", "32", "64", "--rates", "0.01", "0.02", "--seeds", "2"]
    assert main([*words, "--plan-only"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == [
        "trial", "rules", "width", "depth", "lr", "seed", "tokens", "flops", "done", "key",
    ]  # fmt: skip
    assert "16 trials," in out and not (tmp_path / "runs").exists()
    assert main([*words, "--plan-only", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    # At the base's own width both rules are the same, and so is the trial.
    assert len(entries) == 16 and len({entry["key"] for entry in entries}) == 12
    assert {entry["tokens"] for entry in entries} == {1024} and not any(entry["done"] for entry in entries)


@pytest.mark.slow
def test_learning_rates_are_trained_once_and_reported(recipe_file, capsys, tmp_path):
    words = ["tunnel", "lr", recipe_file, "--widths", "32", "64", "--rates", "0.002", "0.01", "0.05"]
    assert main([*words, "--rules", "mup", "--trial", "1"]) == 0  # another machine's share
    assert len(list((tmp_path / "runs/tunnel-lr/results").iterdir())) == 1
    assert main([*words, "--rules", "mup"]) == 0
    shown = capsys.readouterr().out
    page = (tmp_path / "runs/tunnel-lr/report.md").read_text(encoding="utf-8")
    assert page in shown and len(re.findall(r"^\| mup \| ", page, re.MULTILINE)) == 2
    assert "the optima lie within a factor of" in page
    rows = (tmp_path / "runs/tunnel-lr/results.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 7 and rows[0].startswith("rules,width,depth,lr,seed,tokens,loss,bits_per_byte")
    assert (tmp_path / "runs/tunnel-lr/figure.png").read_bytes().startswith(b"\x89PNG")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs/tunnel-lr").rglob("state.json")}
    assert main([*words, "--rules", "mup"]) == 0
    assert {
        file: file.stat().st_mtime_ns for file in (tmp_path / "runs/tunnel-lr").rglob("state.json")
    } == before


@pytest.mark.slow
def test_a_scaling_law_predicts_before_it_trains(recipe_file, capsys, tmp_path):
    words = ["tunnel", "scaling", recipe_file, "--widths", "32", "64", "--held-out", "96"]
    assert main([*words, "--lengths", "0.03", "0.05", "0.08"]) == 0
    folder = tmp_path / "runs/tunnel-scaling"
    prediction = json.loads((folder / "prediction.json").read_text(encoding="utf-8"))
    assert [entry["length"] for entry in prediction["held_out"]] == [0.03, 0.05, 0.08]
    assert all(entry["low"] <= entry["value"] <= entry["high"] for entry in prediction["held_out"])
    # It was written before the held-out size had a run.
    runs = list((folder / "runs").iterdir())
    assert len(runs) == 3  # one trunk a size
    held_out = max(runs, key=lambda run: (run / "recipe.toml").stat().st_mtime_ns)
    assert (folder / "prediction.json").stat().st_mtime_ns < (
        held_out / "environment.json"
    ).stat().st_mtime_ns
    assert len(list((held_out / "decays").iterdir())) == 3
    page = (folder / "report.md").read_text(encoding="utf-8")
    assert "| C_N |" in page and "missed by" in page and "was predicted from" in page


@pytest.mark.slow
def test_batch_sizes_are_compared_at_equal_loss(recipe_file, tmp_path):
    words = ["tunnel", "batch", recipe_file, "--widths", "64", "--batch-tokens", "64", "128", "256"]
    assert main([*words, "--set", "schedule.stable_tokens=7680", "--set", "schedule.warmup_tokens=0"]) == 0
    page = (tmp_path / "runs/tunnel-batch/report.md").read_text(encoding="utf-8")
    assert "| parabola |" in page and "a · B + b / B + c" in page


@pytest.mark.slow
def test_a_run_that_blows_up_is_a_result(recipe, tmp_path):
    study = LearningRateStudy(recipe=recipe, widths=[32], rates=[0.01, 0.02, 0.04, 1e19], rules=["mup"])
    results = run_trials(study.trials(), tmp_path / "study")
    assert [result.diverged for result in results] == [False, False, False, True]
    assert read_result(study.trials()[3], tmp_path / "study") == results[3]
    assert "within a factor of 1.00" in study.report(results, tmp_path / "study").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="signals to a process group")
def test_side_by_side_stopped_and_resumed(recipe_file, tmp_path):
    words = ["tunnel", "lr", recipe_file, "--widths", "32", "--rules", "mup", "--workers", "2"]
    settings = ["--set", "schedule.stable_tokens=128000", "--set", "schedule.decay_tokens=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "minicpm_edge", *words, *settings],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 120
    while len(list((tmp_path / "runs").rglob("metrics.jsonl"))) < 2:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error
    assert list((tmp_path / "runs").rglob("state.json"))  # they saved what they had
    shorter = ["--rates", "0.01", "0.02", "0.04", "--set", "schedule.stable_tokens=768"]
    assert main([*words, *shorter]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lr", "--widths", "33"], "width 33 is not a multiple"),
        (["lr", "--widths", "32", "--seeds", "0"], "--seeds 0: give at least 1"),
        (["lr", "--widths", "32", "--trial", "99"], "--trial 99: the study has trials 0 to 9"),
        (["batch", "--widths", "32", "--batch-tokens", "100"], "batch_tokens 100 is not a multiple"),
    ],
)
def test_mistakes_are_one_line(recipe_file, words, message, capsys):
    study, *options = words
    assert main(["tunnel", study, recipe_file, *options]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error
