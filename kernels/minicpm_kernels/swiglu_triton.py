# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: ANN001, ANN201
"""Triton kernels of SwiGLU: two loads and one store a forward element, three and two backward.

Legend: N rows, F feed-forward width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_COLUMNS = 1024  # columns of a CTA: two 16-byte loads of bf16 a thread
NUM_WARPS = 4


@triton.jit
def swiglu_fwd_kernel(p_gate_up, p_out, width, row_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    p_gate = p_gate_up + row * row_stride + columns
    b_gate = tl.load(p_gate, mask=mask, other=0.0).to(tl.float32)
    b_up = tl.load(p_gate + width, mask=mask, other=0.0).to(tl.float32)
    b_out = b_gate * tl.sigmoid(b_gate) * b_up
    tl.store(p_out + row * width + columns, b_out.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_bwd_kernel(
    p_gate_up, p_d_out, p_d_gate_up, width, row_stride, d_out_row_stride, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    p_gate = p_gate_up + row * row_stride + columns
    b_gate = tl.load(p_gate, mask=mask, other=0.0).to(tl.float32)
    b_up = tl.load(p_gate + width, mask=mask, other=0.0).to(tl.float32)
    b_d_out = tl.load(p_d_out + row * d_out_row_stride + columns, mask=mask, other=0.0).to(tl.float32)
    b_sigmoid = tl.sigmoid(b_gate)
    b_silu = b_gate * b_sigmoid
    b_d_gate = b_d_out * b_up * (b_sigmoid + b_silu * (1.0 - b_sigmoid))
    p_d_gate = p_d_gate_up + row * (2 * width) + columns
    tl.store(p_d_gate, b_d_gate.to(p_d_gate_up.dtype.element_ty), mask=mask)
    tl.store(p_d_gate + width, (b_d_out * b_silu).to(p_d_gate_up.dtype.element_ty), mask=mask)


@torch.library.custom_op("minicpm_kernels::swiglu_fwd", mutates_args=())
def swiglu_fwd(gate_up: Tensor) -> Tensor:
    """(…, 2F) → (…, F)."""
    width = gate_up.shape[-1] // 2
    rows_N2F = _rows(gate_up)
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    grid = (rows_N2F.shape[0], triton.cdiv(width, BLOCK_COLUMNS))
    if out.numel():
        with torch.cuda.device_of(gate_up):
            swiglu_fwd_kernel[grid](
                rows_N2F, out, width, rows_N2F.stride(0), BLOCK=BLOCK_COLUMNS, num_warps=NUM_WARPS
            )
    return out


@swiglu_fwd.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op("minicpm_kernels::swiglu_bwd", mutates_args=())
def swiglu_bwd(gate_up: Tensor, d_out: Tensor) -> Tensor:
    """(…, 2F) and the output's gradient (…, F) → the input's gradient (…, 2F)."""
    rows_N2F, d_out_NF = _rows(gate_up), _rows(d_out)
    width = d_out.shape[-1]
    d_gate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    grid = (rows_N2F.shape[0], triton.cdiv(width, BLOCK_COLUMNS))
    if d_out.numel():
        with torch.cuda.device_of(gate_up):
            swiglu_bwd_kernel[grid](
                rows_N2F,
                d_out_NF,
                d_gate_up,
                width,
                rows_N2F.stride(0),
                d_out_NF.stride(0),
                BLOCK=BLOCK_COLUMNS,
                num_warps=NUM_WARPS,
            )
    return d_gate_up


@swiglu_bwd.register_fake
def _(gate_up: Tensor, d_out: Tensor) -> Tensor:
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


def _rows(x: Tensor) -> Tensor:
    """`x` as a matrix whose rows are contiguous; copied only where its strides need it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
