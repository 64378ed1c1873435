"""What every kernel test needs: a device to run on, the interpreter mended, poisoned memory, a measure of
error.

On a machine without a GPU kernels run in Triton's interpreter, in the ordinary pytest session;
tests/conftest.py switches it on. With ``MINICPM_TEST_DEVICE=cuda`` the same tests run compiled kernels on
the card.
"""

import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="kernel tests need Triton (Linux)")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that kernels are tested on."""
    return torch.device(os.environ.get("MINICPM_TEST_DEVICE", "cpu"))


@pytest.fixture
def triton_kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the public ops run their Triton kernels, interpreted when the device is the CPU."""
    monkeypatch.setenv("MINICPM_KERNELS", "triton")
    if device.type == "cpu":
        from minicpm_kernels import _interpreter

        _interpreter.mend()
    # Interpreted arithmetic is numpy's, which warns where a GPU saturates in silence (exp2 of a large
    # number).
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN (integers: the largest), so that an unwritten output
    shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory, "torch's default"
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def assert_as_accurate() -> Callable[..., None]:
    """A check that a kernel errs at most twice as much as torch's own op does in the same precision."""

    def check(
        ours: torch.Tensor,
        torch_own: torch.Tensor,
        exact: torch.Tensor,
        *,
        factor: float = 2.0,
        what: str = "output",
    ) -> None:
        """Compare ``ours`` and torch's own result, both in low precision, with the ``exact`` float32 one.

        Two measures: the largest and the root mean square error. Where torch happens to be (nearly) exact,
        one rounding of the output's type at the tensor's own size is granted, because no kernel can do
        better.
        """
        assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
        assert ours.dtype == torch_own.dtype, f"{what}: {ours.dtype}, not {torch_own.dtype}"
        assert torch.isfinite(ours).all(), f"{what}: not finite"
        if exact.numel() == 0:
            return
        exact = exact.double()
        rounding = torch.finfo(ours.dtype).eps / 2
        for name, size in (("largest", _largest), ("root mean square", _root_mean_square)):
            error, allowed = size(ours.double() - exact), factor * size(torch_own.double() - exact)
            allowed = max(allowed, rounding * size(exact))
            assert error <= allowed, f"{what}: {name} error {error:.3e} exceeds {allowed:.3e}"

    return check


def _largest(values: torch.Tensor) -> float:
    return float(values.abs().max())


def _root_mean_square(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())
