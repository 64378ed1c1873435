# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: ANN001, ANN201, ANN202
"""Attention backward in Triton, from the log-sum-exp that forward kept.

With P = exp(scale·Q·Kᵀ - lse) and delta = rowsum(dO·O): dV = Pᵀ·dO, dS = P·(dO·Vᵀ - delta), dQ = scale·dS·K,
dK = scale·dSᵀ·Q.

Three kernels, of which a call runs two:

- ``attention_bwd_dkdv_kernel``: a tile of keys goes through the queries that see it. With ``ADD_DQ`` it also adds
  its part of dQ to a float32 buffer in memory (five matmuls for each block in all). The order of these
  additions is not fixed, so dQ is then not bit-equal from call to call.
- ``attention_bwd_dq_kernel``: a tile of queries goes through its keys. With the first, without ``ADD_DQ``, seven
  matmuls for each block, and deterministic: every sum has one owner and a fixed order.
- ``attention_bwd_stats_kernel``: delta, and the log-sum-exp in base 2, before either.

Legend: N tokens, H query heads, K key heads, C head dim, S tokens rounded up for TMA; b_x tiles, p_x
pointers, t_x TMA descriptors.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from minicpm_kernels.attention.schedule import (
    Tiles,
    attention_bounds,
    descriptor,
    head_and_tile,
    heads_per_section,
    rows_of_heads,
)

LOG2_E = tl.constexpr(1.4426950408889634)

STATS_BLOCK = 128


def adds_dq(head_dim: int, deterministic: bool) -> bool:
    """Whether dQ is added up by the dK/dV kernel: at head dim 128 its tile leaves no registers for that."""
    return not deterministic and head_dim <= 64


def dkdv_tiles(head_dim: int) -> Tiles:
    """64 queries by 128 keys: 128 by 128 takes all registers or spills, and with four warps these spill.

    Scores are computed transposed, so that weights and score gradients lie in registers as the left operands
    of dV and dK, and need no way through shared memory.
    """
    return Tiles(block_q=64, block_k=128, num_warps=8, num_stages=2)


def dq_tiles(head_dim: int) -> Tiles:
    """At head dim 64, the cap of 128 registers (it would take 133) lets two CTAs share an
    SM."""
    if head_dim <= 64:
        return Tiles(block_q=128, block_k=64, num_warps=8, num_stages=3, max_registers=128)
    return Tiles(block_q=128, block_k=64, num_warps=8, num_stages=2)


@triton.jit
def attention_bwd_stats_kernel(
    t_out,
    t_d_out,
    p_lse,
    p_lse_log2,
    p_delta,
    num_tokens,
    num_slots,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Write delta and the base-2 log-sum-exp of each row and head; zero in the slots beyond the last
    token."""
    row, head = tl.program_id(0) * BLOCK, tl.program_id(1)
    b_out = t_out.load([row, head * HEAD_DIM]).to(tl.float32)
    b_d_out = t_d_out.load([row, head * HEAD_DIM]).to(tl.float32)
    b_row = row + tl.arange(0, BLOCK)
    b_lse = tl.load(p_lse + head.to(tl.int64) * num_tokens + b_row, mask=b_row < num_tokens, other=0.0)
    b_slot = head.to(tl.int64) * num_slots + b_row
    tl.store(p_lse_log2 + b_slot, b_lse * LOG2_E, mask=b_row < num_slots)
    tl.store(p_delta + b_slot, tl.sum(b_out * b_d_out, 1), mask=b_row < num_slots)


@triton.jit
def _dkdv_block(
    b_k, b_v, b_dk, b_dv, t_q, t_d_out, t_dq_sum, t_lse_log2, t_delta, head, query, b_key, b_end_query, scale_log2,
    BLOCK_Q: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr, ADD_DQ: tl.constexpr,
):  # fmt: skip
    """Add one block of queries' part of dK and dV (and to dQ in memory). Scores are held as keys by
    queries."""
    column = head * HEAD_DIM
    b_q = t_q.load([query, column])
    b_score = tl.dot(b_k, b_q.T)
    # Through TMA too: as ordinary pipelined loads these two rows alone took 32 instructions of each thread.
    b_lse_log2 = tl.reshape(t_lse_log2.load([head, query]), (BLOCK_Q,))
    b_weight = tl.exp2(b_score * scale_log2 - b_lse_log2[None, :])
    if MASKED:
        b_query = query + tl.arange(0, BLOCK_Q)
        b_visible = (b_query[None, :] >= b_key[:, None]) & (b_query[None, :] < b_end_query[:, None])
        b_weight = tl.where(b_visible, b_weight, 0.0)
    b_d_out = t_d_out.load([query, column])
    b_dv = tl.dot(b_weight.to(b_d_out.dtype), b_d_out, b_dv)
    b_d_weight = tl.dot(b_v, b_d_out.T)
    # Loaded only here: a row of queries is 16 registers of each thread, and head dim 128 has none to spare.
    b_delta = tl.reshape(t_delta.load([head, query]), (BLOCK_Q,))
    b_d_score = (b_weight * (b_d_weight - b_delta[None, :])).to(b_q.dtype)
    b_dk = tl.dot(b_d_score, b_q, b_dk)
    if ADD_DQ:
        t_dq_sum.atomic_add([query, column], tl.dot(b_d_score.T, b_k))
    return b_dk, b_dv


@triton.jit
def attention_bwd_dkdv_kernel(
    t_q, t_k, t_v, t_d_out, t_dk, t_dv, t_dq_sum, t_lse_log2, t_delta, p_end_query,
    num_tokens, num_kv_heads, num_tiles, heads_per_section, scale, scale_log2,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr, ADD_DQ: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one key head, over all query heads that it serves."""
    # The first tiles of long documents have the most queries, and are started first.
    kv_head, tile = head_and_tile(num_kv_heads, num_tiles, heads_per_section)
    first_key = tile * BLOCK_K
    column = kv_head * HEAD_DIM
    b_key = first_key + tl.arange(0, BLOCK_K)
    b_end_query = tl.load(p_end_query + tl.minimum(b_key, num_tokens - 1))
    # Query blocks, all at multiples of BLOCK_Q: the diagonal's, to `middle`, even where the tokens end before;
    # from there every query sees every key; from `tail` to `stop`, some query sees only some.
    middle = first_key + BLOCK_K
    tail = tl.maximum(tl.load(p_end_query + first_key) // BLOCK_Q * BLOCK_Q, middle)
    stop = tl.maximum(tl.load(p_end_query + tl.minimum(middle, num_tokens) - 1), middle)
    num_masked = BLOCK_K // BLOCK_Q + tl.maximum(tl.cdiv(stop - tail, BLOCK_Q), 0)
    num_full = (tail - middle) // BLOCK_Q

    b_k = t_k.load([first_key, column])
    b_v = t_v.load([first_key, column])
    b_dk = tl.zeros((BLOCK_K, HEAD_DIM), tl.float32)
    b_dv = tl.zeros((BLOCK_K, HEAD_DIM), tl.float32)
    # Each loop walks blocks and heads of the group with counters: nested loops would hold more registers.
    head = kv_head * GROUP
    query = first_key
    for _ in tl.range(0, GROUP * num_masked):
        b_dk, b_dv = _dkdv_block(
            b_k, b_v, b_dk, b_dv, t_q, t_d_out, t_dq_sum, t_lse_log2, t_delta, head, query, b_key, b_end_query,
            scale_log2, BLOCK_Q, HEAD_DIM, True, ADD_DQ,
        )  # fmt: skip
        query += BLOCK_Q
        query = tl.where(query == middle, tail, query)
        if GROUP > 1:
            head = tl.where(query >= stop, head + 1, head)
            query = tl.where(query >= stop, first_key, query)
    head = kv_head * GROUP
    query = middle
    for _ in tl.range(0, GROUP * num_full):
        b_dk, b_dv = _dkdv_block(
            b_k, b_v, b_dk, b_dv, t_q, t_d_out, t_dq_sum, t_lse_log2, t_delta, head, query, b_key, b_end_query,
            scale_log2, BLOCK_Q, HEAD_DIM, False, ADD_DQ,
        )  # fmt: skip
        query += BLOCK_Q
        if GROUP > 1:
            head = tl.where(query == tail, head + 1, head)
            query = tl.where(query == tail, middle, query)
    t_dk.store([first_key, column], (b_dk * scale).to(t_dk.dtype))
    t_dv.store([first_key, column], b_dv.to(t_dv.dtype))


@triton.jit
def _dq_block(
    b_q, b_d_out, b_dq, b_lse_log2, b_delta, t_k, t_v, key, column, b_row, b_first_key, scale_log2,
    BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add one block of keys' part of dQ."""
    b_k = t_k.load([key, column])
    b_score = tl.dot(b_q, b_k.T)
    b_weight = tl.exp2(b_score * scale_log2 - b_lse_log2[:, None])
    if MASKED:
        b_key = key + tl.arange(0, BLOCK_K)
        b_visible = (b_key[None, :] <= b_row[:, None]) & (b_key[None, :] >= b_first_key[:, None])
        b_weight = tl.where(b_visible, b_weight, 0.0)
    b_v = t_v.load([key, column])
    b_d_weight = tl.dot(b_d_out, b_v.T)
    b_d_score = b_weight * (b_d_weight - b_delta[:, None])
    return tl.dot(b_d_score.to(b_k.dtype), b_k, b_dq)


@triton.jit
def attention_bwd_dq_kernel(
    t_q, t_k, t_v, t_d_out, t_dq, p_lse_log2, p_delta, p_first_key,
    num_tokens, num_slots, num_heads, num_tiles, heads_per_section, group, scale, scale_log2,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries of one head; its loops are those of the forward kernel."""
    head, tile = head_and_tile(num_heads, num_tiles, heads_per_section)
    first_row = (num_tiles - 1 - tile) * BLOCK_Q
    q_column = head * HEAD_DIM
    column = head // group * HEAD_DIM
    b_row = first_row + tl.arange(0, BLOCK_Q)
    b_first_key = tl.load(p_first_key + tl.minimum(b_row, num_tokens - 1))
    low = tl.load(p_first_key + first_row) // BLOCK_K * BLOCK_K
    last_first_key = tl.load(p_first_key + tl.minimum(first_row + BLOCK_Q, num_tokens) - 1)
    middle = tl.minimum(tl.cdiv(last_first_key, BLOCK_K) * BLOCK_K, first_row)
    num_low = (middle - low) // BLOCK_K

    b_slot = head.to(tl.int64) * num_slots + b_row
    b_lse_log2 = tl.load(p_lse_log2 + b_slot, mask=b_row < num_slots, other=0.0)
    b_delta = tl.load(p_delta + b_slot, mask=b_row < num_slots, other=0.0)
    b_q = t_q.load([first_row, q_column])
    b_d_out = t_d_out.load([first_row, q_column])
    b_dq = tl.zeros((BLOCK_Q, HEAD_DIM), tl.float32)
    for key in tl.range(middle, first_row, BLOCK_K):
        b_dq = _dq_block(
            b_q, b_d_out, b_dq, b_lse_log2, b_delta, t_k, t_v, key, column, b_row, b_first_key, scale_log2,
            BLOCK_K, False,
        )  # fmt: skip
    for i in tl.range(0, num_low + BLOCK_Q // BLOCK_K):
        key = tl.where(i < num_low, low + i * BLOCK_K, first_row + (i - num_low) * BLOCK_K)
        b_dq = _dq_block(
            b_q, b_d_out, b_dq, b_lse_log2, b_delta, t_k, t_v, key, column, b_row, b_first_key, scale_log2,
            BLOCK_K, True,
        )  # fmt: skip
    t_dq.store([first_row, q_column], (b_dq * scale).to(t_dq.dtype))


class BackwardPlan(NamedTuple):
    """What both backward kernels work by: each token's bounds, its row's statistics, and the heads of a section."""

    first_key_N: Tensor
    end_query_N: Tensor
    lse_log2_HS: Tensor
    delta_HS: Tensor
    section: int


def prepare_backward(
    d_out_NHC: Tensor,
    q_NHC: Tensor,
    k_NKC: Tensor,
    v_NKC: Tensor,
    out_NHC: Tensor,
    lse_HN: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    window: int | None,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor], BackwardPlan | None]:
    """(q, k, v, d_out) in rows that TMA can read, empty gradients of q, k and v, and the plan (None without tokens)."""
    gradients = (
        torch.empty(q_NHC.shape, dtype=q_NHC.dtype, device=q_NHC.device),
        torch.empty(k_NKC.shape, dtype=k_NKC.dtype, device=k_NKC.device),
        torch.empty(v_NKC.shape, dtype=v_NKC.dtype, device=v_NKC.device),
    )
    num_tokens, num_heads, head_dim = q_NHC.shape
    if num_tokens == 0:
        return (q_NHC, k_NKC, v_NKC, d_out_NHC), gradients, None
    q_NHC, k_NKC, v_NKC, d_out_NHC = (rows_of_heads(x) for x in (q_NHC, k_NKC, v_NKC, d_out_NHC))
    num_kv_heads = k_NKC.shape[1]
    first_key_N, end_query_N = attention_bounds(cu_seqlens, num_tokens, window)
    lse_log2_HS, delta_HS = row_stats(rows_of_heads(out_NHC), d_out_NHC, lse_HN)
    section = heads_per_section(
        num_kv_heads,
        num_heads // num_kv_heads,
        min(max_seqlen, num_tokens),
        head_dim,
        q_NHC.element_size(),
    )
    plan = BackwardPlan(first_key_N, end_query_N, lse_log2_HS, delta_HS, section)
    return (q_NHC, k_NKC, v_NKC, d_out_NHC), gradients, plan


def attention_triton_backward(
    d_out_NHC: Tensor,
    q_NHC: Tensor,
    k_NKC: Tensor,
    v_NKC: Tensor,
    out_NHC: Tensor,
    lse_HN: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    scale: float,
    window: int | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (N, H, C), (N, K, C), (N, K, C) in the type of the inputs. Nothing waits for the device."""
    inputs, gradients, plan = prepare_backward(
        d_out_NHC, q_NHC, k_NKC, v_NKC, out_NHC, lse_HN, cu_seqlens, max_seqlen=max_seqlen, window=window
    )  # fmt: skip
    if plan is None:
        return gradients
    q_NHC, k_NKC, v_NKC, d_out_NHC = inputs
    dq_NHC, dk_NKC, dv_NKC = gradients
    num_tokens, num_heads, head_dim = q_NHC.shape
    num_kv_heads = k_NKC.shape[1]
    group = num_heads // num_kv_heads
    num_slots = plan.delta_HS.shape[1]

    add_dq = adds_dq(head_dim, deterministic)
    dq_sum_NHC = torch.zeros(q_NHC.shape, dtype=torch.float32, device=q_NHC.device) if add_dq else None
    tiles = dkdv_tiles(head_dim)
    num_tiles = triton.cdiv(num_tokens, tiles.block_k)
    attention_bwd_dkdv_kernel[(num_tiles * num_kv_heads,)](
        descriptor(q_NHC, tiles.block_q),
        descriptor(k_NKC, tiles.block_k),
        descriptor(v_NKC, tiles.block_k),
        descriptor(d_out_NHC, tiles.block_q),
        descriptor(dk_NKC, tiles.block_k),
        descriptor(dv_NKC, tiles.block_k),
        # Not touched without ADD_DQ, but an argument must be there.
        descriptor(q_NHC if dq_sum_NHC is None else dq_sum_NHC, tiles.block_q),
        TensorDescriptor(plan.lse_log2_HS, list(plan.lse_log2_HS.shape), [num_slots, 1], [1, tiles.block_q]),
        TensorDescriptor(plan.delta_HS, list(plan.delta_HS.shape), [num_slots, 1], [1, tiles.block_q]),
        plan.end_query_N,
        num_tokens,
        num_kv_heads,
        num_tiles,
        plan.section // group,
        scale,
        scale * LOG2_E.value,
        GROUP=group,
        BLOCK_Q=tiles.block_q,
        BLOCK_K=tiles.block_k,
        HEAD_DIM=head_dim,
        ADD_DQ=add_dq,
        **tiles.options,
    )
    if dq_sum_NHC is not None:
        torch.mul(dq_sum_NHC, scale, out=dq_NHC)  # scales and rounds in one pass
        return dq_NHC, dk_NKC, dv_NKC

    separate_dq(q_NHC, k_NKC, v_NKC, d_out_NHC, dq_NHC, plan, scale=scale)
    return dq_NHC, dk_NKC, dv_NKC


def separate_dq(
    q_NHC: Tensor,
    k_NKC: Tensor,
    v_NKC: Tensor,
    d_out_NHC: Tensor,
    dq_NHC: Tensor,
    plan: BackwardPlan,
    *,
    scale: float,
) -> None:
    """Write dQ, in a launch of its own, a section of heads at a time."""
    num_tokens, num_heads, head_dim = q_NHC.shape
    tiles = dq_tiles(head_dim)
    num_tiles = triton.cdiv(num_tokens, tiles.block_q)
    attention_bwd_dq_kernel[(num_tiles * num_heads,)](
        descriptor(q_NHC, tiles.block_q),
        descriptor(k_NKC, tiles.block_k),
        descriptor(v_NKC, tiles.block_k),
        descriptor(d_out_NHC, tiles.block_q),
        descriptor(dq_NHC, tiles.block_q),
        plan.lse_log2_HS,
        plan.delta_HS,
        plan.first_key_N,
        num_tokens,
        plan.delta_HS.shape[1],
        num_heads,
        num_tiles,
        plan.section,
        num_heads // k_NKC.shape[1],
        scale,
        scale * LOG2_E.value,
        BLOCK_Q=tiles.block_q,
        BLOCK_K=tiles.block_k,
        HEAD_DIM=head_dim,
        **tiles.options,
    )


def row_stats(out_NHC: Tensor, d_out_NHC: Tensor, lse_HN: Tensor) -> tuple[Tensor, Tensor]:
    """Base-2 log-sum-exp and delta, float32 (H, S): rows padded to the 16 bytes that TMA asks for."""
    num_tokens, num_heads, head_dim = out_NHC.shape
    num_slots = triton.cdiv(num_tokens, 4) * 4
    stats = torch.empty((2, num_heads, num_slots), dtype=torch.float32, device=out_NHC.device)
    attention_bwd_stats_kernel[(triton.cdiv(num_slots, STATS_BLOCK), num_heads)](
        descriptor(out_NHC, STATS_BLOCK),
        descriptor(d_out_NHC, STATS_BLOCK),
        lse_HN,
        stats[0],
        stats[1],
        num_tokens,
        num_slots,
        BLOCK=STATS_BLOCK,
        HEAD_DIM=head_dim,
    )
    return stats[0], stats[1]
