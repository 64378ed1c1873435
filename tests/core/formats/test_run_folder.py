"""A run's checkpoints: their names, their order, and the one that the run stands for."""

import os

from minicpm_edge.formats.run_folder import (
    checkpoint_name,
    checkpoint_steps,
    find_runs,
    released_checkpoint,
)


def make_checkpoint(branch, step, *, state="{}", age=0):
    folder = branch / "checkpoints" / checkpoint_name(step)
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(state, encoding="utf-8")
    os.utime(folder / "state.json", (1_000_000 - age, 1_000_000 - age))
    return folder


def test_steps_are_those_of_whole_checkpoints_in_order(tmp_path):
    assert checkpoint_steps(tmp_path) == []
    for step in (100_000_000, 20, 3):
        make_checkpoint(tmp_path, step)
    for name in (".step-00000004.tmp-1", "step-5", "step-00000006x", "step-000000007", "notes"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "step-00000008").write_text("a file", encoding="utf-8")
    assert checkpoint_steps(tmp_path) == [3, 20, 100_000_000]


def test_a_run_stands_for_its_newest_finished_decay_else_for_its_trunk(tmp_path):
    assert released_checkpoint(tmp_path) is None
    trunk = make_checkpoint(tmp_path, 30)
    make_checkpoint(tmp_path / "decays" / "unfinished", 40)
    make_checkpoint(tmp_path / "decays" / "damaged", 40, state="{")
    assert released_checkpoint(tmp_path) == trunk
    newer = make_checkpoint(tmp_path / "decays" / "a", 35, state='{"finished": true}', age=1)
    make_checkpoint(tmp_path / "decays" / "b", 50, state='{"finished": true}', age=9)
    assert released_checkpoint(tmp_path) == newer


def test_no_root_has_no_runs(tmp_path):
    assert find_runs(tmp_path / "missing") == []
