"""The emulator's tests, where the session's own Triton interprets: in a process whose Triton compiles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow(seconds=15)
@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="this session runs them itself")
def test_emulator_where_triton_compiles():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "test_emulator.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[2])
    assert result.returncode == 0, result.stdout + result.stderr
