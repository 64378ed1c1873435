"""A command line becomes one job, which holds all that was said, here and in every worker."""

import argparse
import pickle
from pathlib import Path

import pytest
from minicpm_training import cli
from minicpm_training.commands.decay import decay_job
from minicpm_training.commands.job import TrainJob
from minicpm_training.commands.train import train_job
from minicpm_training.recipe.files import to_toml


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, make_recipe):
    monkeypatch.chdir(tmp_path)
    Path("small.toml").write_text(to_toml(make_recipe("schedule.stable_tokens=640")), encoding="utf-8")
    Path("other.toml").write_text(
        to_toml(make_recipe('data.decay=[{path="elsewhere"}]', "schedule.decay_tokens=128")), encoding="utf-8"
    )


def parse(command, words):
    parser = argparse.ArgumentParser()
    parser.add_argument("--debug", action="store_true")  # as minicpm_edge.cli.main gives it to every command
    command.add_arguments(parser)
    options = {action.dest for action in parser._actions if action.dest != "help"}
    return parser.parse_args(words), options


def sent(job):
    """The job as a worker gets it."""
    received = pickle.loads(pickle.dumps(job))
    assert isinstance(received, TrainJob) and received == job
    return received


# For each option: words that give it, and how it shows in the job.
TRAIN = {
    "recipe": (["small.toml"], lambda job: job.recipe.name == "small"),
    "settings": (["small.toml", "--set", "seed=7"], lambda job: job.recipe.seed == 7),
    "out": (["small.toml", "--out", "here"], lambda job: job.run.folder == Path("here")),
    "resume": (["--resume", "runs/old"], lambda job: job.run.folder == Path("runs/old")),
    "minutes": (["small.toml", "--minutes", "1.5"], lambda job: job.seconds == 90.0),
    "nproc": (["small.toml", "--nproc", "2"], lambda job: job.nproc == 2),
    "json": (["small.toml", "--json"], lambda job: job.as_json),
    "debug": (["small.toml", "--debug"], lambda job: job.debug),
}
DECAY = {
    "run": (["runs/old", "--tokens", "256"], lambda job: job.run.folder == Path("runs/old")),
    "at": (["runs/old", "--tokens", "256", "--at", "5"], lambda job: job.decay_from == 5),
    "tokens": (["runs/old", "--tokens", "512"], lambda job: job.recipe.total_steps == 14),
    "data": (
        ["runs/old", "--tokens", "256", "--data", "other.toml"],
        lambda job: job.recipe.plan.stages[-1].sources[0].path.endswith("/elsewhere"),
    ),
    "settings": (
        ["runs/old", "--tokens", "256", "--set", "schedule.form=linear"],
        lambda job: job.recipe.schedule.form == "linear",
    ),
    "nproc": (["runs/old", "--tokens", "256", "--nproc", "4"], lambda job: job.nproc == 4),
    "json": (["runs/old", "--tokens", "256", "--json"], lambda job: job.as_json),
    "debug": (["runs/old", "--tokens", "256", "--debug"], lambda job: job.debug),
}


@pytest.fixture
def old_run(make_recipe, train, tmp_path):
    return train(make_recipe("schedule.stable_tokens=1280"), tmp_path / "runs" / "old")


@pytest.mark.parametrize(
    ("command", "resolve", "cases"), [(cli.TRAIN, train_job, TRAIN), (cli.DECAY, decay_job, DECAY)]
)
def test_every_option_reaches_the_workers(old_run, command, resolve, cases):
    _, options = parse(command, next(iter(cases.values()))[0])
    done_without_a_job = {"dry_run"}
    assert options - done_without_a_job == set(cases), "say here how a new option shows in the job"
    for name, (words, shows) in cases.items():
        arguments, _ = parse(command, words)
        assert shows(sent(resolve(arguments))), name


def test_what_stopped_is_resumed_by_the_command_that_is_printed(old_run):
    words = ["runs/old", "--at", "5", "--tokens", "256", "--data", "other.toml", "--set", "log.every=2"]
    job = decay_job(parse(cli.DECAY, words)[0])
    again = decay_job(parse(cli.DECAY, list(job.resume[1:]))[0])
    assert again == job
    started = train_job(parse(cli.TRAIN, ["small.toml", "--out", "runs/new"])[0])
    assert started.resume == ("train", "--resume", "runs/new")
