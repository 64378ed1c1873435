"""Several processes train the model that one trains, stop as one does, and none outlives the others."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from minicpm_training import evaluation
from minicpm_training.commands.job import check_num_processes
from minicpm_training.data.packed_dataloader import open_packed
from minicpm_training.evaluation import Validation
from minicpm_training.parallel import process_group
from minicpm_training.recipe.files import to_toml
from minicpm_training.run import Run

from minicpm_edge.cli.main import main
from minicpm_edge.errors import UserError
from minicpm_edge.formats.checkpoint import load_checkpoint, verify_manifest
from minicpm_edge.model.transformer import MiniCPM
from minicpm_edge.text.tokenizer import Tokenizer

LONG = ("schedule.stable_tokens=12_800_000", "checkpoint.every=0", "checkpoint.keep_every=0")
NO_SIGNALS = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs signals and /proc")


@pytest.fixture
def start(make_recipe, tmp_path):
    """Start ``train --nproc N`` of the small recipe with settings, in ``tmp_path/NAME``."""
    started = []

    def start_it(name, *settings, nproc=2, options=()):
        recipe = tmp_path / f"{name}.toml"
        recipe.write_text(to_toml(make_recipe(*settings)), encoding="utf-8")
        words = ["train", str(recipe), "--out", str(tmp_path / name), "--nproc", str(nproc), *options]
        process = subprocess.Popen(
            [sys.executable, "-m", "minicpm_edge", *words],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process, Run(folder=tmp_path / name)

    yield start_it
    for process in started:
        kill_all(process)
        process.communicate()


def kill_all(process):
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):  # none is left
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def wait_for_steps(process, run, count):
    end = time.monotonic() + 240
    while len(run.trunk.metrics()) < count:
        if process.poll() is not None or time.monotonic() > end:
            kill_all(process)  # else its errors have no end
            pytest.fail(process.stderr.read())
        time.sleep(0.01)


def workers(process):
    lists = [path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/children")]
    pids = [int(word) for text in lists for word in text.split()]
    return [pid for pid in sorted(pids) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # an orphan's new parent may be slow to reap it


def assert_none_left(pids):
    end = time.monotonic() + 30
    while left := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < end, f"{left} still run"
        time.sleep(0.05)


def assert_same_state(first, second):
    """Weights and optimizer state equal to rounding, in the same files."""
    from safetensors.torch import load_file

    for file in ("model.safetensors", "optimizer.safetensors"):
        expected, found = load_file(first / file), load_file(second / file)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def lines(run, key):
    branches = (run.trunk, *run.decays())
    return [line[key] for branch in branches for line in branch.metrics() if key in line]


@pytest.mark.slow
def test_three_processes_train_the_model_of_one(start, make_recipe, train, workspace, tmp_path):
    settings = (
        "batch_tokens=192",  # of 6 sequences, in micro-batches of 2: the same for one process and for three
        "model.num_experts=2",  # fewer than processes; nor can they share the width evenly
        "model.num_experts_per_tok=1",
        "optimizer.z_loss=0.001",
        "optimizer.clip_norm=0.5",  # less than any gradient's
        "schedule.stable_tokens=960",
        "schedule.decay_tokens=384",
        f'data.valid=[{{path="{(workspace / "valid").as_posix()}"}}]',
        "evaluation.tokens=600",  # one batch: the other process takes part without rows of its own
        "evaluation.every=3",
        'sample.prompts=["the cat"]',
        "sample.max_tokens=5",
    )
    process, run = start("three", *settings, nproc=3, options=["--json"])
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert json.loads(out)["step"] == 5
    assert error.count("step 1/5") == 1  # one of them speaks

    one = train(make_recipe(*settings), tmp_path / "one")
    for key in ("loss", "grad_norm"):
        assert lines(run, key) == pytest.approx(lines(one, key), rel=1e-4)
    for key in ("step", "tokens", "lr", "samples"):
        assert lines(run, key) == lines(one, key)
    assert min(lines(run, "grad_norm")) > 0.5
    for found, expected in zip(lines(run, "valid"), lines(one, "valid"), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    for branch, expected in zip((run.trunk, *run.decays()), (one.trunk, *one.decays()), strict=True):
        assert branch.steps() == expected.steps()
        checkpoint = branch.checkpoint(branch.steps()[-1])
        assert_same_state(expected.checkpoint(expected.steps()[-1]), checkpoint)
        verify_manifest(checkpoint)
        assert load_checkpoint(checkpoint).config.num_hidden_layers == 2


@pytest.mark.slow
@NO_SIGNALS
def test_stopped_with_two_processes_and_resumed_with_one_and_with_four(start, make_recipe, train, tmp_path):
    process, run = start("run", *LONG)
    wait_for_steps(process, run, 3)
    pids = workers(process)
    assert len(pids) == 2
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"resume: minicpm-edge train --resume {run.folder} --nproc 2" in out
    assert_none_left(pids)
    (step,) = run.trunk.steps()
    assert run.trunk.metrics()[-1]["step"] == step >= 3

    def longer(num_steps):
        return f"schedule.stable_tokens={num_steps * 128}", "checkpoint.keep_every=1"

    train(make_recipe(*longer(step + 2)), run.folder)  # one process
    process, _ = start("run", *longer(step + 4), nproc=4, options=["--resume"])
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    straight = train(make_recipe(*longer(step + 4)), tmp_path / "straight")
    assert lines(run, "loss") == pytest.approx(lines(straight, "loss"), rel=1e-3)
    assert_same_state(straight.trunk.checkpoint(step + 4), run.trunk.checkpoint(step + 4))


@pytest.mark.slow
@NO_SIGNALS
def test_a_killed_process_ends_all_with_one_line(start):
    process, run = start("run", *LONG)
    wait_for_steps(process, run, 2)
    pids = workers(process)
    os.kill(pids[1], signal.SIGKILL)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 1 and not out
    (line,) = [line for line in error.splitlines() if not line.startswith("step ")]
    assert line.startswith("error: process ") and "of 2 was killed by SIGKILL" in line
    assert_none_left(pids)
    assert not run.trunk.checkpoints_folder.exists()


@pytest.mark.slow
@NO_SIGNALS
@pytest.mark.parametrize("num_updates", [0, 2])
def test_no_process_outlives_its_launcher(start, num_updates):
    process, run = start("run", *LONG)
    while len(pids := workers(process)) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    wait_for_steps(process, run, num_updates)
    process.kill()
    assert_none_left(pids)
    assert len(run.trunk.steps()) == (1 if num_updates else 0)  # in training they stop with a checkpoint


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_all_with_one_line(start):
    settings = ("schedule.peak_lr=1e19", "schedule.warmup_tokens=0", "checkpoint.every=1")
    process, run = start("run", *settings)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 1 and not out
    (line,) = [line for line in error.splitlines() if not line.startswith("step ")]
    assert line.startswith("error: step ") and "The last checkpoint is good" in line
    assert line.count("a:") == 4  # the rows of both
    verify_manifest(run.trunk.checkpoint(run.trunk.steps()[-1]))


def test_each_rank_takes_its_sequences_of_a_step(make_recipe, workspace, monkeypatch):
    tokenizer = Tokenizer.load(workspace / "tok")
    recipe = make_recipe("batch_tokens=192")  # 6 sequences, in micro-batches of 2

    def sequences(rank, size):
        monkeypatch.setattr(process_group, "_rank_info", process_group.RankInfo(rank=rank, world_size=size))
        return [batch.origins for batch in open_packed(recipe, tokenizer)(7)]

    whole = [name for names in sequences(0, 1) for name in names]
    for size in (2, 3, 6):
        shares = [sequences(rank, size) for rank in range(size)]
        assert [name for share in shares for names in share for name in names] == whole
        assert len({tuple(map(len, share)) for share in shares}) == 1  # as many micro-batches, as large


@pytest.mark.parametrize("size", [2, 3, 8])
def test_validation_is_shared_out(make_recipe, workspace, monkeypatch, size):
    tokenizer = Tokenizer.load(workspace / "tok")
    model = MiniCPM(make_recipe().model.config(vocab_size=tokenizer.vocab_size))
    model.init_weights(seed=0)
    validation = Validation.open(workspace / "valid", tokenizer, sequence_length=32, max_tokens=7 * 32)
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", 64)  # four batches, the last of one sequence
    whole = validation.measure(model)
    monkeypatch.setattr(process_group, "all_reduce_sum", lambda number: number)
    results = []
    for rank in range(size):
        monkeypatch.setattr(process_group, "_rank_info", process_group.RankInfo(rank=rank, world_size=size))
        results.append(validation.measure(model))
    for field in ("cross_entropy", "num_tokens", "num_bytes"):
        assert sum(getattr(result, field) for result in results) == pytest.approx(getattr(whole, field))


def test_dry_run_tells_the_memory_of_each_process(make_recipe, tmp_path, capsys):
    recipe = tmp_path / "small.toml"
    recipe.write_text(to_toml(make_recipe()), encoding="utf-8")

    def plan(*options):
        assert main(["train", str(recipe), "--dry-run", "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    one, two = plan(), plan("--nproc", "2")
    assert (one["micro_batches"], two["micro_batches"]) == (2, 1)
    for part in ("weights", "gradients", "optimizer"):
        assert two["memory_bytes"][part] == one["memory_bytes"][part] / 2
    assert main(["train", str(recipe), "--dry-run", "--nproc", "2"]) == 0
    assert "GiB for each of 2 processes" in capsys.readouterr().out


def test_what_is_wrong_is_told_before_processes_start(make_recipe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="2 processes need a GPU each and there are 1"):
        check_num_processes(2, make_recipe("device=cuda"))
    assert check_num_processes(2, make_recipe("device=cpu")) == 2
    with pytest.raises(UserError, match="'cuda:1' is one device"):
        check_num_processes(2, make_recipe("device=cuda:1"))
