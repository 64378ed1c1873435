"""The tests of the sm_90 machine, and a few programs of training on it, in a process whose Triton compiles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(
    os.environ.get("MINICPM_TEST_DEVICE", "cpu") != "cpu", reason="for sessions with the interpreter"
)
def test_machine_and_programs_on_it():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["MINICPM_TEST_DEVICE"] = "sm90"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(HERE / "ptx" / "test_machine.py"),
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1])
    assert result.returncode == 0, result.stdout + result.stderr
