"""The commands as a user types them: exit codes, one clear line, JSON, resuming, interrupts."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from minicpm_training.recipe.files import load_recipe, to_toml
from minicpm_training.run import Run, find_runs

from minicpm_edge.cli.main import main


@pytest.fixture
def recipe_file(make_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.toml"
    path.write_text(
        to_toml(make_recipe("schedule.stable_tokens=640", "schedule.decay_tokens=256")), encoding="utf-8"
    )
    return str(path)


@pytest.mark.slow
def test_train_then_runs_then_decay_then_eval(recipe_file, workspace, tmp_path, capsys):
    assert main(["train", recipe_file, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["name"] == "small" and result["step"] == 5
    assert [decay["label"] for decay in result["decays"]] == ["step-00000005"]

    assert main(["train", recipe_file]) == 0  # a second run gets a name of its own
    assert [run.name for run in find_runs(tmp_path / "runs")] == ["small", "small-2"]

    assert main(["decay", "small", "--at", "5", "--tokens", "384", "--set", "schedule.form=linear"]) == 0
    out = capsys.readouterr().out
    assert "decay    step-00000005-2: step 8" in out  # other settings, another label
    assert main(["decay", "small", "--at", "5", "--tokens", "384", "--set", "schedule.form=linear"]) == 0
    assert len(Run(folder=tmp_path / "runs/small").decays()) == 2  # the same again is the same one

    assert main(["runs", "--json"]) == 0
    runs = {
        run["name"]: run for run in json.loads(capsys.readouterr().out.split("\n[", 1)[1].join(["[", ""]))
    }
    assert runs["small"]["trunk_steps"] == 5 and len(runs["small"]["decays"]) == 2

    assert main(["eval", "small", "--data", str(workspace / "valid"), str(workspace / "b"), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    for name in ("valid", "b"):
        result = results[str(workspace / name)]
        assert 0 < result["bits_per_byte"] < 8 and result["perplexity"] > 1 and result["num_tokens"] > 100


def test_a_data_recipe_gives_the_decays_mixture(recipe_file, workspace, tmp_path):
    assert main(["train", recipe_file, "--set", "schedule.decay_tokens=0", "--out", "runs/x"]) == 0
    other = tmp_path / "other.toml"
    other.write_text(
        f'[data]\ntokenizer = "tok"\nstable = [{{ path = "{(workspace / "b").as_posix()}" }}]\n'
        "[schedule]\nstable_tokens = 1\n",
        encoding="utf-8",
    )
    assert main(["decay", "x", "--tokens", "256", "--data", str(other)]) == 0
    saved = load_recipe(str(tmp_path / "runs/x/decays/step-00000005/recipe.toml"))
    assert [source.path for source in saved.data.decay] == [(workspace / "b").as_posix()]
    assert saved.data.tokenizer == (workspace / "tok").as_posix()


def test_dry_run_plans_and_trains_nothing(recipe_file, tmp_path, capsys):
    assert main(["train", recipe_file, "--dry-run"]) == 0
    text = capsys.readouterr().out
    for part in (
        "parameters",
        "FLOPs",
        "memory",
        "warm-up",
        "mixture, stable",
        "mixture, decay",
        "epochs of",
    ):
        assert part in text
    assert main(["train", recipe_file, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] == 7 and plan["tokens"] == 896 and plan["micro_batches"] == 2
    assert plan["mixture"]["decay"][1]["share"] == pytest.approx(2 / 3)
    assert plan["learning_rate"]["end of stable"]["lr"] == 0.01
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "parameters"), [("minicpm-1.2b", 1_247_442_432), ("minicpm-2.4b", 2_442_057_984)]
)
def test_dry_run_of_the_papers_models_needs_no_data(name, parameters, capsys):
    assert main(["train", name, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["model"]["parameters_without_embedding"] == parameters
    assert plan["tokens"] == pytest.approx(1.1e12, rel=2e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "schedule.peak_rl=1"], "did you mean 'schedule.peak_lr'?"),
        (["--set", "model.preset=huge"], "no model preset is called 'huge'"),
        (["--set", "data.tokenizer=nowhere"], "nowhere"),
        (["--set", "device=abacus"], "device 'abacus' cannot be used here"),
        (["--set", "data.stable=[{path='nowhere'}]"], "nowhere is no prepared set"),
        (
            [
                "--set",
                "data.sequence_length=4096",
                "--set",
                "batch_tokens=4096",
                "--set",
                "micro_batch_tokens=4096",
            ],
            "longer than the model's context",
        ),
        (["--set", "model.vocab_size=100"], "smaller than the tokenizer's"),
        (["--nproc", "3"], "4 sequences of data.sequence_length 32, which 3 processes cannot share evenly"),
        (["--nproc", "2", "--set", "compile=true"], "compile is for one process"),
        (["--nproc", "0"], "give at least 1"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(recipe_file, words, message, capsys, tmp_path):
    assert main(["train", recipe_file, *words]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error
    assert not (tmp_path / "runs").exists()


def test_wrong_usage_is_2_and_missing_runs_are_told(recipe_file, capsys):
    assert main(["train", "--nproc", "many"]) == 2
    assert main(["decay", "x"]) == 2
    capsys.readouterr()
    assert main(["train", "--resume"]) == 1
    assert "no runs under runs" in capsys.readouterr().err
    assert main(["decay", "nowhere", "--tokens", "10"]) == 1
    assert "'nowhere' is not a run" in capsys.readouterr().err
    assert main(["runs"]) == 0
    assert "no runs" in capsys.readouterr().out


@pytest.mark.slow
def test_resume_lengthens_a_run_and_refuses_another_model(recipe_file, tmp_path, capsys):
    assert main(["train", recipe_file, "--out", "runs/x", "--set", "schedule.decay_tokens=0"]) == 0
    assert main(["train", recipe_file, "--out", "runs/x"]) == 1
    assert "already holds a run: --resume runs/x" in capsys.readouterr().err.replace("\\", "/")
    assert main(["train", "--resume", "--set", "schedule.stable_tokens=1024"]) == 0
    run = Run(folder=tmp_path / "runs/x")
    assert run.trunk.steps()[-1] == 8
    assert [line["step"] for line in run.trunk.metrics()] == list(range(1, 9))
    for setting in ("model.num_hidden_layers=3", "schedule.peak_lr=0.1", "seed=7", "batch_tokens=256"):
        assert main(["train", "--resume", "x", "--set", setting]) == 1
        assert f"{setting.split('=')[0]} was" in capsys.readouterr().err
    assert main(["train", "--resume", "x", "--set", "schedule.stable_tokens=640"]) == 1
    assert "past the end" in capsys.readouterr().err
    assert main(["decay", "x", "--at", "6", "--tokens", "128"]) == 1
    assert "keeps no trunk checkpoint of step 6" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(recipe_file, tmp_path, capsys):
    assert main(["train", recipe_file, "--out", "runs/x", "--set", "schedule.decay_tokens=0"]) == 0
    weights = tmp_path / "runs/x/checkpoints/step-00000005/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main(["train", "--resume", "x", "--set", "schedule.stable_tokens=1280"]) == 1
    assert "model.safetensors is damaged" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals to a process are POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_a_checkpoint_and_exits_130(make_recipe, tmp_path, number):
    recipe = tmp_path / "long.toml"
    settings = ("schedule.stable_tokens=12_800_000", "checkpoint.every=0", "checkpoint.keep_every=0")
    recipe.write_text(to_toml(make_recipe(*settings)), encoding="utf-8")
    run = Run(folder=tmp_path / "run")
    process = subprocess.Popen(
        [sys.executable, "-m", "minicpm_edge", "train", str(recipe), "--out", str(run.folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    end = time.monotonic() + 120
    while len(run.trunk.metrics()) < 3:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "resume: minicpm-edge train --resume" in output
    (step,) = run.trunk.steps()
    assert run.trunk.metrics()[-1]["step"] == step >= 3


@pytest.mark.slow
def test_a_longer_recipe_file_resumes_and_keeps_the_warm_up(make_recipe, tmp_path, capsys):
    text = to_toml(make_recipe("schedule.stable_tokens=2560"))
    lines = [line for line in text.splitlines() if not line.startswith("warmup_tokens")]
    recipe = tmp_path / "r.toml"
    recipe.write_text("\n".join(lines), encoding="utf-8")
    assert main(["train", str(recipe), "--out", str(tmp_path / "run")]) == 0
    recipe.write_text(
        "\n".join(lines).replace("stable_tokens = 2560", "stable_tokens = 51200"), encoding="utf-8"
    )
    assert main(["train", str(recipe), "--resume", str(tmp_path / "run"), "--minutes", "0.05"]) == 0
    assert main(["runs", str(tmp_path)]) == 0
    assert "run" in capsys.readouterr().out


def test_a_longer_cosine_is_refused(make_recipe, tmp_path, capsys):
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        to_toml(make_recipe("schedule.kind=cosine", "schedule.stable_tokens=640")), encoding="utf-8"
    )
    run = str(tmp_path / "run")
    assert main(["train", str(recipe), "--out", run]) == 0
    assert main(["train", "--resume", run, "--set", "schedule.stable_tokens=1280"]) == 1
    assert "schedule.stable_tokens was 640" in capsys.readouterr().err


def test_a_run_that_cannot_be_read_does_not_hide_the_others(make_recipe, train, tmp_path, capsys):
    train(make_recipe("schedule.stable_tokens=640"), tmp_path / "runs" / "good")
    (tmp_path / "runs" / "bad").mkdir()
    (tmp_path / "runs" / "bad" / "recipe.toml").write_text("colour = 1\n", encoding="utf-8")
    assert main(["runs", str(tmp_path / "runs")]) == 0
    shown = capsys.readouterr()
    assert "good" in shown.out and "left out" in shown.err and "colour" in shown.err
