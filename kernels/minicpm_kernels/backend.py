"""Which implementation of an op runs: the Triton kernels or plain torch, and why.

The rule: Triton where the tensor is on a CUDA device that it can serve, plain torch everywhere else. The
environment variable ``MINICPM_KERNELS`` (``triton`` or ``reference``) overrules it, which is how a user
rules a kernel out as the cause of a problem, and how the tests run the kernels on a CPU in Triton's
interpreter.
"""

import importlib.util
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

# Bytes of shared memory a block must be able to ask for, for the kernels with large tiles: data-center cards from
# compute capability 8.0 on have it, consumer cards have 99 KiB.
LARGE_SHARED_MEMORY = 160 * 1024

OVERRIDE_VARIABLE = "MINICPM_KERNELS"
GLUON_VARIABLE = "MINICPM_GLUON"  # 0: Triton's kernels also where there is one in Gluon

# Asked once, here: torch.compile of torch 2.11 cannot trace the question.
_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True, kw_only=True)
class Backend:
    """The implementation chosen for one op, with the reason in words for ``minicpm-edge doctor``."""

    name: Literal["triton", "reference"]
    reason: str


def choose_backend(tensor: "torch.Tensor", op: str) -> Backend:
    """Choose the implementation of ``op`` for ``tensor``; cheap enough for every call, and traceable.

    Raises ``ValueError`` when ``MINICPM_KERNELS`` is neither unset, ``triton`` nor ``reference``, and
    ``RuntimeError`` when it asks for Triton where Triton cannot run.
    """
    return choose_backend_for_device(tensor.device.type, op)


def choose_backend_for_device(device_type: str, op: str) -> Backend:
    """The same choice from a device type alone (``"cuda"``, ``"cpu"``, ...), for reports."""
    override = os.environ.get(OVERRIDE_VARIABLE, "")
    if override == "reference":
        return Backend(name="reference", reason=f"{op}: {OVERRIDE_VARIABLE}=reference asks for plain torch")
    unsupported_reason = _triton_unsupported_reason(device_type)
    if override == "triton":
        if unsupported_reason:
            raise RuntimeError(
                f"{op}: {OVERRIDE_VARIABLE}=triton, but {unsupported_reason}; unset {OVERRIDE_VARIABLE}"
            )
        return Backend(name="triton", reason=f"{op}: {OVERRIDE_VARIABLE}=triton asks for the Triton kernel")
    if override:
        raise ValueError(f"{OVERRIDE_VARIABLE}={override!r} is not a backend; use triton or reference")
    if unsupported_reason:
        return Backend(name="reference", reason=f"{op}: plain torch, because {unsupported_reason}")
    if device_type != "cuda":
        # Only reachable in the interpreter, which is for tests: it is thousands of times slower than plain
        # torch.
        return Backend(name="reference", reason=f"{op}: plain torch, because the tensor is on {device_type}")
    return Backend(name="triton", reason=f"{op}: Triton kernel on {device_type}")


def triton_importable() -> bool:
    """Whether Triton is installed, without importing it."""
    return _TRITON_IS_INSTALLED


def interpreter_enabled() -> bool:
    """Whether Triton kernels run in its CPU interpreter (set before Triton is imported, or not at all)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def unsupported_reason_to_large_tiles(device: "torch.device") -> str:
    """Why a kernel with large tiles cannot run on a CUDA device, as a clause; empty when it can."""
    import torch

    properties = torch.cuda.get_device_properties(device)
    held: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's stub lacks it
    if held >= LARGE_SHARED_MEMORY:
        return ""
    return f"it needs {LARGE_SHARED_MEMORY // 1024} KiB of shared memory a block, the card has {held // 1024}"


def autocasts(tensor: "torch.Tensor") -> bool:
    """Whether ``torch.autocast`` is on for the tensor's device."""
    import torch

    device_type = tensor.device.type
    return device_type != "meta" and torch.is_autocast_enabled(device_type)  # to ask for meta is an error


def _triton_unsupported_reason(device_type: str) -> str:
    """Why Triton cannot run on this device, as a clause; empty when it can."""
    # The device is asked first: on a CPU, the common case outside training, no import machinery is touched.
    if device_type != "cuda" and not interpreter_enabled():
        return f"the tensor is on {device_type}, not on a CUDA device"
    if not triton_importable():
        return "Triton is not installed"
    return ""
