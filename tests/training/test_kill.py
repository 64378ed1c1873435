"""``kill -9`` at ten random moments, some inside a save: the final weights are those of a run never killed."""

import json
import os
import random
import subprocess
import sys
import time

import pytest
from minicpm_training.recipe.files import to_toml
from minicpm_training.run import Run

NUM_KILLS, NUM_INSIDE_SAVES = 10, 4
DEADLINE_SECONDS = 300.0


def command(*words):
    return [sys.executable, "-m", "minicpm_edge", "train", *map(str, words)]


def start(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(*words), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition, process):
    """Poll until ``condition()``; False when the process ended first."""
    end = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < end, "the run does not get on"
        time.sleep(0.0005)
    return True


def unfinished_saves(run):
    return [
        path
        for branch in (run.trunk, *run.decays())
        for path in branch.checkpoints_folder.glob(".step-*.tmp-*")
    ]


def num_lines(run):
    return sum(len(branch.metrics()) for branch in (run.trunk, *run.decays()))


def stable_metrics(branch):
    """What does not depend on the clock."""
    timed = ("tokens_per_second", "mfu")
    return [{key: value for key, value in line.items() if key not in timed} for line in branch.metrics()]


@pytest.mark.slow(seconds=60)
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_killed_ten_times_is_the_run_never_killed(make_recipe, train, same_checkpoint, workspace, tmp_path):
    # 1.4M parameters: a save takes longer than an update, so that random moments fall into it too.
    recipe = make_recipe(
        "model.hidden_size=256",
        "model.intermediate_size=768",
        "schedule.stable_tokens=5120",
        "schedule.decay_tokens=1280",
        "checkpoint.every=3",
        "evaluation.every=20",
        "evaluation.tokens=256",
        f"data.valid={json.dumps([str(workspace / 'valid')]).replace('[', '[{path=').replace(']', '}]')}",
    )
    recipe_file = tmp_path / "recipe.toml"
    recipe_file.write_text(to_toml(recipe), encoding="utf-8")
    never_killed = train(recipe, tmp_path / "straight")

    generator, run = random.Random(0), Run(folder=tmp_path / "killed")
    killed_inside_a_save = 0
    for kill in range(NUM_KILLS):
        words = (
            ("--resume", run.folder)
            if (run.folder / "recipe.toml").exists()
            else (recipe_file, "--out", run.folder)
        )
        before = num_lines(run)
        process = start(*words)
        # Ten kills spread over the run: each lets the run get on by a few updates at most.
        assert wait_for(lambda before=before: num_lines(run) != before, process), process.stderr.read()
        if kill % 10 < NUM_INSIDE_SAVES:
            assert wait_for(lambda: unfinished_saves(run), process), process.stderr.read()
        else:
            time.sleep(generator.uniform(0.0, 0.12))
        process.kill()
        process.wait()
        process.stderr.close()
        killed_inside_a_save += bool(unfinished_saves(run))
    assert killed_inside_a_save >= 2
    finished = subprocess.run(
        command("--resume", run.folder),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr

    label = "step-00000040"
    assert same_checkpoint(run.trunk.checkpoint(40), never_killed.trunk.checkpoint(40))
    assert same_checkpoint(run.decay(label).checkpoint(50), never_killed.decay(label).checkpoint(50))
    assert stable_metrics(run.trunk) == stable_metrics(never_killed.trunk)
    assert stable_metrics(run.decay(label)) == stable_metrics(never_killed.decay(label))
    assert not unfinished_saves(run)
