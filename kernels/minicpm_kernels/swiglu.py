"""SwiGLU on the merged output of the gate and up projections, forward and backward in one pass each.

Legend: N tokens, R rows of a block, F feed-forward width. Any number of leading dimensions may stand for N.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from minicpm_kernels.backend import choose_backend

# Plain torch passes over memory two times forward and four backward; blocks of about this many elements stay in cache
# between the passes (a fifth to a third faster than whole tensors, 4096 x 768 on one core).
_BLOCK_ELEMENTS = 2**19


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    """silu(gate) · up, where gate is the first half of the last dimension and up the second; (…, 2F) → (…, F).

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
    """Saves only its input; the backward writes the merged gradient."""

    @staticmethod
    def forward(ctx: Any, gate_up_N2F: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_N2F)
        if choose_backend(gate_up_N2F, "swiglu").name == "triton":
            from minicpm_kernels.swiglu_triton import swiglu_fwd

            out_NF: Tensor = swiglu_fwd(gate_up_N2F)
            return out_NF
        if torch.compiler.is_compiling():  # which fuses the passes itself
            gate_NF, up_NF = gate_up_N2F.chunk(2, -1)
            return F.silu(gate_NF) * up_NF
        return _forward_by_blocks(gate_up_N2F)

    @staticmethod
    def backward(ctx: Any, d_out_NF: Tensor) -> Tensor:
        (gate_up_N2F,) = ctx.saved_tensors
        if choose_backend(gate_up_N2F, "swiglu").name == "triton":
            from minicpm_kernels.swiglu_triton import swiglu_bwd

            d_gate_up_N2F: Tensor = swiglu_bwd(gate_up_N2F, d_out_NF)
            return d_gate_up_N2F
        if torch.compiler.is_compiling():
            gate_NF, up_NF = gate_up_N2F.chunk(2, -1)
            d_gate_NF = torch.ops.aten.silu_backward(d_out_NF * up_NF, gate_NF)
            return torch.cat([d_gate_NF, d_out_NF * F.silu(gate_NF)], -1)
        return _backward_by_blocks(gate_up_N2F, d_out_NF)


def _forward_by_blocks(gate_up: Tensor) -> Tensor:
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    rows_of_block = max(1, _BLOCK_ELEMENTS // max(width, 1))
    for gate_up_R2F, out_RF in zip(
        gate_up.reshape(-1, 2 * width).split(rows_of_block),
        out.view(-1, width).split(rows_of_block),
        strict=True,
    ):
        gate_RF, up_RF = gate_up_R2F.chunk(2, -1)
        torch.ops.aten.silu.out(gate_RF, out=out_RF)
        out_RF.mul_(up_RF)
    return out


def _backward_by_blocks(gate_up: Tensor, d_out: Tensor) -> Tensor:
    width = d_out.shape[-1]
    d_gate_up = gate_up.new_empty(gate_up.shape)
    rows_of_block = max(1, _BLOCK_ELEMENTS // max(width, 1))
    for gate_up_R2F, d_out_RF, d_gate_up_R2F in zip(
        gate_up.reshape(-1, 2 * width).split(rows_of_block),
        d_out.reshape(-1, width).split(rows_of_block),
        d_gate_up.view(-1, 2 * width).split(rows_of_block),
        strict=True,
    ):
        (gate_RF, up_RF), (d_gate_RF, d_up_RF) = gate_up_R2F.chunk(2, -1), d_gate_up_R2F.chunk(2, -1)
        torch.ops.aten.silu.out(gate_RF, out=d_up_RF)
        d_up_RF.mul_(d_out_RF)
        torch.mul(d_out_RF, up_RF, out=d_gate_RF)
        torch.ops.aten.silu_backward.grad_input(d_gate_RF, gate_RF, grad_input=d_gate_RF)
    return d_gate_up
