"""Triton kernels for the training step of MiniCPM shapes, each with its plain-torch reference.

Every name below is an ordinary differentiable function of tensors. On a CUDA device with Triton installed it runs
the kernel, elsewhere plain torch; ``choose_backend`` says which and why. This package imports nothing of ours, and
Triton only when a kernel first runs.
"""

# Imported here and not on first use: several ops bear their module's name, and only an import statement leaves the
# function, whatever was imported first.
from minicpm_kernels.attention.decode import attention_decode, decode_kernel_serves
from minicpm_kernels.attention.op import attention, attention_with_lse
from minicpm_kernels.backend import Backend, choose_backend
from minicpm_kernels.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from minicpm_kernels.moe.layer import MoeOutput, MoeRouting, moe_experts, moe_layer, moe_router
from minicpm_kernels.rms_norm import rms_norm, rms_norm_residual
from minicpm_kernels.rope import rope, rope_tables
from minicpm_kernels.swiglu import swiglu

__all__ = [
    "Backend",
    "LinearCrossEntropy",
    "MoeOutput",
    "MoeRouting",
    "attention",
    "attention_decode",
    "attention_with_lse",
    "choose_backend",
    "decode_kernel_serves",
    "linear_cross_entropy",
    "moe_experts",
    "moe_layer",
    "moe_router",
    "rms_norm",
    "rms_norm_residual",
    "rope",
    "rope_tables",
    "swiglu",
]
