"""The main job, whole: quickstart on this machine's standard library, interrupted and taken up again."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("llama_cpp")
COMMAND = [sys.executable, "-m", "minicpm_edge", "quickstart", "--minutes", "1", "--out", "quick"]


def start(folder):
    return subprocess.Popen(
        COMMAND,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUTF8": "1"},
    )


def wait_until(found, process, seconds):
    deadline = time.monotonic() + seconds
    while not found() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    assert found()


@pytest.mark.slow(seconds=60)
def test_quickstart_killed_in_training_goes_on_and_ends_with_answers(tmp_path):
    out = tmp_path / "quick"
    first = start(tmp_path)
    checkpoints = out / "run" / "checkpoints"
    wait_until(lambda: checkpoints.is_dir() and any(checkpoints.glob("step-*")), first, 400)
    first.send_signal(signal.SIGKILL if sys.platform != "win32" else signal.SIGTERM)
    first.communicate()
    recipe = (out / "recipe.toml").read_text(encoding="utf-8")

    second = start(tmp_path)
    printed, _ = second.communicate(timeout=600)
    assert second.returncode == 0, printed
    assert "done before" in printed
    assert (out / "recipe.toml").read_text(encoding="utf-8") == recipe

    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    bits = report["held_out_docs_bits_per_byte"]
    assert bits["after_decay"] < bits["before_decay"], "the decay stage must gain on held-out docs"
    assert 2 <= len(report["answers"]) <= 3
    assert all(answer["question"] in printed for answer in report["answers"])
    assert (out / "run" / "loss.png").stat().st_size > 5_000
    [model] = out.glob("*.gguf")
    certificates = list(out.glob("*certificate*.json"))
    assert certificates and json.loads(certificates[0].read_text(encoding="utf-8"))
    assert model.as_posix().rsplit("/", 1)[1] in printed

    third = start(tmp_path)  # everything is done: it only reports again
    printed, _ = third.communicate(timeout=120)
    assert third.returncode == 0, printed
