"""Kernels of training in the emulator: a few of the kernels' own tests, launched through Triton's launch path.

All of them, in any mode: run tests/kernels with the variables used here.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TESTS = (
    "attention/test_triton.py::test_grouped_heads[3-False]",
    "attention/test_triton.py::test_grouped_heads[3-True]",
    "moe/test_experts.py::test_outputs_and_gradients[triton-ragged]",
    "attention/test_gluon_fwd.py::test_as_accurate_as_torch[[63]-64]",
    "attention/test_gluon_bwd.py::test_as_accurate_as_torch[[130]-64]",
)


@pytest.mark.slow(seconds=15)
@pytest.mark.parametrize("mode", ["lazy:1", "random:2"])
def test_kernels_are_right_whatever_the_order(mode):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"MINICPM_TEST_DEVICE": "sm90", "MINICPM_SM90_MODE": mode}
    tests = [str(ROOT / "tests" / "kernels" / test) for test in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
