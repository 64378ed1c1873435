"""What every kernel test needs: a device to run on, the patched interpreter, poisoned memory, a measure of error.

On a machine without a GPU kernels run in Triton's interpreter, in the ordinary pytest session; tests/conftest.py
switches it on. With ``MINICPM_TEST_DEVICE=cuda`` the same tests run compiled kernels on the card, and with
``MINICPM_TEST_DEVICE=sm90`` the programs compiled for a Hopper card in the sm_90 PTX emulator (kernels/ptx_emulator),
in the mode that ``MINICPM_SM90_MODE`` names (``eager``, ``lazy:1``, ``random:2``: when asynchronous work is done, and a
seed).
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

# No test here can run without Triton. A skip would not do: pytest reads this file before it can skip anything.
collect_ignore_glob = ["*"] if find_spec("triton") is None else []

IN_EMULATOR = os.environ.get("MINICPM_TEST_DEVICE") == "sm90"
TESTING_TOOLS = Path(__file__).parents[2] / "kernels" / "testing"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that kernels are tested on."""
    return torch.device("cpu" if IN_EMULATOR else os.environ.get("MINICPM_TEST_DEVICE", "cpu"))


@pytest.fixture
def triton_kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the public ops run their Triton kernels, interpreted when the device is the CPU."""
    monkeypatch.setenv("MINICPM_KERNELS", "triton")
    if IN_EMULATOR:
        from minicpm_kernels import backend
        from ptx_emulator import driver

        # As on a card: nothing stands between a tensor and the kernels.
        monkeypatch.setattr(backend, "_triton_unsupported_reason", lambda device_type: "")
        with driver.use(driver.mode_from_environment()):
            yield
        return
    if device.type == "cpu":
        from minicpm_kernels_testing.interpreter import patch_interpreter

        patch_interpreter()
    # Interpreted arithmetic is numpy's, which warns where a GPU is silent: exp2 of a large number, the
    # maximum of NaNs.
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@pytest.fixture(scope="session")
def run_where_triton_compiles() -> Callable[[str], str]:
    """Run a Python program in a process without the interpreter, which cannot compile; returns what it prints."""

    def run(program: str) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        paths = (str(TESTING_TOOLS), os.environ.get("PYTHONPATH", ""))
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        command = [sys.executable, "-c", program]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN (integers: the largest), so that an unwritten output
    shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory, "torch's default"
    before = torch.are_deterministic_algorithms_enabled()
    # The filling is all that is wanted: ops of torch without a deterministic version, which references use
    # on a card, may run and need not warn.
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*determinis")
        yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test twice: with the public ops on plain torch, and on their Triton kernels."""
    if request.param == "triton":
        request.getfixturevalue("triton_kernels")
    else:
        monkeypatch.setenv("MINICPM_KERNELS", "reference")
    return str(request.param)


@pytest.fixture
def far_rows(device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Lay three rows out 2^30 elements apart, so that the last one's offset does not fit int32.

    Only the pages of the rows themselves are ever touched, so a CPU gives little memory for it.
    """

    def spread(rows: torch.Tensor) -> torch.Tensor:
        width = rows[0].numel()
        memory = torch.empty(3 * 2**30, dtype=rows.dtype, device=device)
        far = memory.as_strided((3, width), (2**30, 1))
        far.copy_(rows.flatten(1))
        return far.view(rows.shape) if rows.dim() > 2 else far

    return spread


@pytest.fixture(scope="session")
def with_gradients() -> Callable[..., list[torch.Tensor]]:
    """Run an op and its backward; returns its outputs and then the gradient of every input."""

    def run(
        op: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
        inputs: tuple[torch.Tensor, ...],
        *,
        dtype: torch.dtype | None = None,
    ) -> list[torch.Tensor]:
        """``dtype`` widens the inputs first. The outputs' gradients are random, equal for equal shapes."""
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        result = op(*leaves)
        outputs = [result] if isinstance(result, torch.Tensor) else list(result)
        generator = torch.Generator().manual_seed(7)
        upstream = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in outputs]
        gradients = torch.autograd.grad(outputs, leaves, upstream)
        return [x.detach() for x in outputs] + list(gradients)

    return run


@pytest.fixture(scope="session")
def assert_as_accurate() -> Callable[..., None]:
    """A check that a kernel errs at most twice as much as torch's own op does in the same precision."""

    def check(
        ours: torch.Tensor,
        torch_own: torch.Tensor,
        exact: torch.Tensor,
        *,
        factor: float = 2.0,
        largest_factor: float | None = None,
        roundings: float = 1.0,
        floor: float = 0.0,
        what: str = "output",
    ) -> None:
        """Compare ``ours`` and torch's own result, both in low precision, with the ``exact`` float32 one.

        Two measures: the largest and the root mean square error. Where torch happens to be (nearly) exact,
        one rounding of the output's type at the tensor's own size is granted, because no kernel can do
        better; a chain of operations that rounds to that type at each step may ask for more. ``floor`` is
        an error below which a result counts as exact: for gradients that are zero but for float32 rounding.
        ``largest_factor`` is the factor of the first measure, where the largest of few errors is mostly luck.
        """
        assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
        assert ours.dtype == torch_own.dtype, f"{what}: {ours.dtype}, not {torch_own.dtype}"
        assert torch.isfinite(ours).all(), f"{what}: not finite"
        if exact.numel() == 0:
            return
        rounding = roundings * torch.finfo(ours.dtype).eps / 2
        ours, torch_own, exact = (x.detach().double() for x in (ours, torch_own, exact))
        for name, size in (("largest", _largest), ("root mean square", _root_mean_square)):
            here = largest_factor if largest_factor and size is _largest else factor
            error, allowed = size(ours - exact), here * size(torch_own - exact)
            allowed = max(allowed, floor, rounding * size(exact))
            assert error <= allowed, f"{what}: {name} error {error:.3e} exceeds {allowed:.3e}"

    return check


def _largest(values: torch.Tensor) -> float:
    return float(values.abs().max())


def _root_mean_square(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())
