"""Triton kernels for the training step of MiniCPM shapes, each with its plain-torch reference.

Every name below is an ordinary differentiable function of tensors. On a CUDA device with Triton installed
it runs the kernel, elsewhere plain torch; ``choose_backend`` says which and why. This package imports
nothing of ours.
"""

import importlib
from typing import Any

# Names are looked up on first use, so that importing the package imports neither torch nor Triton.
_EXPORTS = {
    "Backend": "backend",
    "choose_backend": "backend",
    "attention": "attention",
    "attention_with_lse": "attention",
    "attention_decode": "attention_decode",
    "LinearCrossEntropy": "linear_cross_entropy",
    "linear_cross_entropy": "linear_cross_entropy",
    "MoeOutput": "moe",
    "MoeRouting": "moe",
    "moe_experts": "moe",
    "moe_layer": "moe",
    "moe_router": "moe",
    "rms_norm": "rms_norm",
    "rms_norm_residual": "rms_norm",
    "rope": "rope",
    "rope_tables": "rope",
    "swiglu": "swiglu",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value
