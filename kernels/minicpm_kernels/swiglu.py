"""SwiGLU on the merged output of the gate and up projections, forward and backward in one pass each.

Legend: N tokens, F feed-forward width. Any number of leading dimensions may stand for N.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from minicpm_kernels.backend import choose_backend


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    """silu(gate) · up, where gate is the first half of the last dimension and up the second; (…, 2F) → (…, F).

    Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202. The result has the type of `gate_up_N2F`:
    float32, bfloat16 or float16; the kernels compute in float32.

    Raises: ValueError if the last dimension is odd.
    """
    if gate_up_N2F.shape[-1] % 2:
        raise ValueError(
            f"the last dimension holds gate and up, so it must be even, not {gate_up_N2F.shape[-1]}"
        )
    out_NF: Tensor = _Swiglu.apply(gate_up_N2F)  # type: ignore[no-untyped-call]
    return out_NF


def swiglu_reference(gate_up_N2F: Tensor) -> Tensor:
    """The definition, computed in float32."""
    gate_NF, up_NF = gate_up_N2F.float().chunk(2, -1)
    return (F.silu(gate_NF) * up_NF).to(gate_up_N2F.dtype)


class _Swiglu(torch.autograd.Function):
    """The backward writes both halves of the merged gradient where they belong, where autograd would glue them."""

    @staticmethod
    def forward(ctx: Any, gate_up_N2F: Tensor) -> Tensor:
        if choose_backend(gate_up_N2F, "swiglu").name == "triton":
            from minicpm_kernels.swiglu_triton import swiglu_fwd

            ctx.save_for_backward(gate_up_N2F)
            out_NF: Tensor = swiglu_fwd(gate_up_N2F)
            return out_NF
        gate_NF, up_NF = gate_up_N2F.chunk(2, -1)
        silu_NF = F.silu(gate_NF)
        ctx.save_for_backward(gate_up_N2F, silu_NF)
        return silu_NF * up_NF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_NF: Tensor) -> Tensor:
        gate_up_N2F, *rest = ctx.saved_tensors
        if choose_backend(gate_up_N2F, "swiglu").name == "triton":
            from minicpm_kernels.swiglu_triton import swiglu_bwd

            d_gate_up_N2F: Tensor = swiglu_bwd(gate_up_N2F, d_out_NF)
            return d_gate_up_N2F
        (silu_NF,) = rest
        gate_NF, up_NF = gate_up_N2F.chunk(2, -1)
        d_silu_NF = d_out_NF * up_NF
        if (
            torch.compiler.is_compiling()
        ):  # which refuses results written into slices, and fuses the passes itself
            return torch.cat([torch.ops.aten.silu_backward(d_silu_NF, gate_NF), d_out_NF * silu_NF], -1)
        d_gate_up_N2F = torch.empty_like(gate_up_N2F)
        d_gate_NF, d_up_NF = d_gate_up_N2F.chunk(2, -1)
        torch.ops.aten.silu_backward.grad_input(d_silu_NF, gate_NF, grad_input=d_gate_NF)
        torch.mul(d_out_NF, silu_NF, out=d_up_NF)
        return d_gate_up_N2F
