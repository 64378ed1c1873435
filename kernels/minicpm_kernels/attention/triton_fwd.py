# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: ANN001, ANN201, ANN202
"""Attention forward in Triton: one CTA a tile of queries of one head, an online softmax in base 2.

Legend: N tokens, H query heads, K key heads, C head dim; b_x tiles, p_x pointers, t_x TMA descriptors.

Why these tiles, by the resource table of sm_90 (none of it timed on a card yet). An SM needs
1024 cycles for the exponentials of a 128x128 block of scores and, at head dim 64, as many for its two
matmuls; at head dim 128 twice as many for the matmuls. Only overlap of the two lets either run at its
rate:

- head dim 64: 128x64 and one warpgroup, 221 registers, so two CTAs share an SM and one's softmax
  runs beside the other's matmuls. Two warpgroups a tile fit twice too (124 registers) but issue 18 % more
  instructions per score and wait for each other at every block. 128x128 makes ptxas serialise the matmuls.
- head dim 128: the accumulator fills the registers, so one CTA of two warpgroups with 128x128 blocks, which
  rescale the accumulator half as often as 128x64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minicpm_kernels.attention.schedule import (
    Tiles,
    attention_bounds,
    descriptor,
    head_and_tile,
    heads_per_section,
    rows_of_heads,
)

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)


def forward_tiles(head_dim: int) -> Tiles:
    """The configuration for a head dim; head dims below 64 use that of 64."""
    if head_dim <= 64:
        return Tiles(block_q=128, block_k=64, num_warps=4, num_stages=3)
    return Tiles(block_q=128, block_k=128, num_warps=8, num_stages=2)


@triton.jit
def _fwd_block(
    b_q, b_maximum, b_sum, b_out, t_k, t_v, key, column, b_row, b_first_key, scale_log2,
    BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take one block of keys into the online softmax."""
    b_k = t_k.load([key, column])
    b_score = tl.dot(b_q, b_k.T)
    if MASKED:
        b_key = key + tl.arange(0, BLOCK_K)
        b_visible = (b_key[None, :] <= b_row[:, None]) & (b_key[None, :] >= b_first_key[:, None])
        b_score = tl.where(b_visible, b_score, -float("inf"))
    b_new_maximum = tl.maximum(b_maximum, tl.max(b_score, 1) * scale_log2)
    b_shift = b_new_maximum
    if MASKED:
        # A row that has seen no key yet would compute -inf - -inf.
        b_shift = tl.where(b_new_maximum == -float("inf"), 0.0, b_new_maximum)
    b_weight = tl.exp2(b_score * scale_log2 - b_shift[:, None])
    b_rescale = tl.exp2(b_maximum - b_shift)
    b_sum = b_sum * b_rescale + tl.sum(b_weight, 1)
    b_out = b_out * b_rescale[:, None]
    b_v = t_v.load([key, column])
    b_out = tl.dot(b_weight.to(b_v.dtype), b_v, b_out)
    return b_new_maximum, b_sum, b_out


@triton.jit
def attention_fwd_kernel(
    t_q, t_k, t_v, t_out, p_lse, p_first_key,
    num_tokens, num_heads, num_tiles, heads_per_section, group, scale_log2,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one tile of queries."""
    head, tile = head_and_tile(num_heads, num_tiles, heads_per_section)
    # The last tiles of long documents have the most keys: started first, they leave no long tail at the end.
    first_row = (num_tiles - 1 - tile) * BLOCK_Q
    q_column = head * HEAD_DIM
    column = head // group * HEAD_DIM

    b_row = first_row + tl.arange(0, BLOCK_Q)
    b_first_key = tl.load(p_first_key + tl.minimum(b_row, num_tokens - 1))
    # Key blocks, all at multiples of BLOCK_K: from `low`, some row does not see all of the block; from
    # `middle`, every row sees all of it; from `first_row`, the diagonal cuts through it.
    low = tl.load(p_first_key + first_row) // BLOCK_K * BLOCK_K
    last_first_key = tl.load(p_first_key + tl.minimum(first_row + BLOCK_Q, num_tokens) - 1)
    middle = tl.minimum(tl.cdiv(last_first_key, BLOCK_K) * BLOCK_K, first_row)
    num_low = (middle - low) // BLOCK_K

    b_q = t_q.load([first_row, q_column])
    b_maximum = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_Q,), tl.float32)
    b_out = tl.zeros((BLOCK_Q, HEAD_DIM), tl.float32)
    for key in tl.range(middle, first_row, BLOCK_K):
        b_maximum, b_sum, b_out = _fwd_block(
            b_q,
            b_maximum,
            b_sum,
            b_out,
            t_k,
            t_v,
            key,
            column,
            b_row,
            b_first_key,
            scale_log2,
            BLOCK_K,
            False,
        )
    # Both masked stretches in one loop: a third copy of the block would cost registers and code.
    for i in tl.range(0, num_low + BLOCK_Q // BLOCK_K):
        key = tl.where(i < num_low, low + i * BLOCK_K, first_row + (i - num_low) * BLOCK_K)
        b_maximum, b_sum, b_out = _fwd_block(
            b_q, b_maximum, b_sum, b_out, t_k, t_v, key, column, b_row, b_first_key, scale_log2, BLOCK_K, True
        )

    t_out.store([first_row, q_column], (b_out / b_sum[:, None]).to(t_out.dtype))
    p_lse_row = p_lse + head.to(tl.int64) * num_tokens + b_row
    tl.store(p_lse_row, (b_maximum + tl.log2(b_sum)) * LN_2, mask=b_row < num_tokens)


def attention_triton_forward(
    q_NHC: Tensor,
    k_NKC: Tensor,
    v_NKC: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Returns the output (N, H, C) and the natural log-sum-exp (H, N) in float32. Nothing waits for the
    device."""
    num_tokens, num_heads, head_dim = q_NHC.shape
    num_kv_heads = k_NKC.shape[1]
    out_NHC = torch.empty(q_NHC.shape, dtype=q_NHC.dtype, device=q_NHC.device)
    lse_HN = torch.empty((num_heads, num_tokens), dtype=torch.float32, device=q_NHC.device)
    if num_tokens == 0:
        return out_NHC, lse_HN
    tiles = forward_tiles(head_dim)
    group, num_tiles = num_heads // num_kv_heads, triton.cdiv(num_tokens, tiles.block_q)
    q_NHC, k_NKC, v_NKC = (rows_of_heads(x) for x in (q_NHC, k_NKC, v_NKC))
    first_key_N, _ = attention_bounds(cu_seqlens, num_tokens, window)
    attention_fwd_kernel[(num_tiles * num_heads,)](
        descriptor(q_NHC, tiles.block_q),
        descriptor(k_NKC, tiles.block_k),
        descriptor(v_NKC, tiles.block_k),
        descriptor(out_NHC, tiles.block_q),
        lse_HN,
        first_key_N,
        num_tokens,
        num_heads,
        num_tiles,
        heads_per_section(num_kv_heads, group, min(max_seqlen, num_tokens), head_dim, q_NHC.element_size()),
        group,
        scale * LOG2_E,
        BLOCK_Q=tiles.block_q,
        BLOCK_K=tiles.block_k,
        HEAD_DIM=head_dim,
        **tiles.options,
    )
    return out_NHC, lse_HN
