# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: ANN001, ANN201
"""Triton kernel of the rotary embedding: one CTA turns 32 heads of one token.

The token's cosines and sines are loaded once for the CTA's heads, so memory traffic is x in and x out.

Legend: N tokens, H heads, C head dim, C2 half of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS_OF_PROGRAM = 32
NUM_WARPS = 4


@triton.jit
def rope_kernel(
    p_x,
    p_cos,
    p_sin,
    p_out,
    num_heads,
    token_stride,
    head_stride,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    columns = tl.arange(0, BLOCK_HALF)
    mask = (heads < num_heads)[:, None] & (columns < HALF)[None, :]
    b_cos = tl.load(p_cos + token * HALF + columns, mask=columns < HALF, other=0.0).to(tl.float32)[None, :]
    b_sin = tl.load(p_sin + token * HALF + columns, mask=columns < HALF, other=0.0).to(tl.float32)[None, :]
    if BACKWARD:
        b_sin = -b_sin
    p_first = p_x + token * token_stride + heads[:, None] * head_stride + columns[None, :]
    b_first = tl.load(p_first, mask=mask, other=0.0).to(tl.float32)
    b_second = tl.load(p_first + HALF, mask=mask, other=0.0).to(tl.float32)
    p_turned = p_out + (token * num_heads + heads[:, None]) * (2 * HALF) + columns[None, :]
    tl.store(p_turned, (b_first * b_cos - b_second * b_sin).to(p_out.dtype.element_ty), mask=mask)
    tl.store(p_turned + HALF, (b_second * b_cos + b_first * b_sin).to(p_out.dtype.element_ty), mask=mask)


@torch.library.custom_op("minicpm_kernels::rope_turn", mutates_args=())
def rope_turn(x_NHC: Tensor, cos_NC2: Tensor, sin_NC2: Tensor, backward: bool) -> Tensor:
    """Turn by the angle, or `backward` by its opposite; (N, H, C) → contiguous (N, H, C)."""
    num_tokens, num_heads, head_dim = x_NHC.shape
    if x_NHC.stride(-1) != 1:
        x_NHC = x_NHC.contiguous()
    out_NHC = torch.empty_like(x_NHC, memory_format=torch.contiguous_format)
    if out_NHC.numel():
        with torch.cuda.device_of(x_NHC):
            rope_kernel[(num_tokens, triton.cdiv(num_heads, HEADS_OF_PROGRAM))](
                x_NHC,
                cos_NC2.contiguous(),
                sin_NC2.contiguous(),
                out_NHC,
                num_heads,
                x_NHC.stride(0),
                x_NHC.stride(1),
                HALF=head_dim // 2,
                BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
                HEADS=HEADS_OF_PROGRAM,
                BACKWARD=backward,
                num_warps=NUM_WARPS,
            )
    return out_NHC


@rope_turn.register_fake
def _(x_NHC: Tensor, cos_NC2: Tensor, sin_NC2: Tensor, backward: bool) -> Tensor:
    return torch.empty_like(x_NHC, memory_format=torch.contiguous_format)
