# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: ANN001, ANN201
"""Decode attention in Triton: one query per sequence, the cache split among CTAs, their parts then
combined.

Reading the cache is all the work there is, so all SMs must read: where sequences times key
heads are too few CTAs, each cache is cut into equal pieces of what it really holds (lengths are read on
the device). The query heads of a group read their keys once, together, as the rows of one matmul.

Legend: B sequences, T capacity, H query heads, K key heads, C head dim, S splits, G heads of a group
(padded to the 16 rows of a tensor core); b_x tiles, p_x pointers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634

# A CTA should read this many keys at least, or combining costs more than splitting gains. Not tuned on
# a card.
_MIN_KEYS_PER_SPLIT = 256
MAX_SPLITS = 128  # one CTA combines them, and more would not fit its registers

OPTIONS = {"num_warps": 4, "num_stages": 3}


@triton.jit
def attention_decode_kernel(
    p_q, p_k, p_v, p_lengths, p_part, p_lse_log2,
    num_kv_heads, num_splits, capacity, window, scale_log2,
    q_stride_b, q_stride_h, k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Attend one group of heads of one sequence to one piece of its cache."""
    batch = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    kv_head = tl.program_id(0) % num_kv_heads
    split = tl.program_id(1)
    length = tl.minimum(tl.load(p_lengths + batch), capacity)
    first = tl.maximum(length - window, 0)
    piece = tl.cdiv(tl.cdiv(length - first, num_splits), BLOCK_T) * BLOCK_T
    start = first + split * piece
    stop = tl.minimum(start + piece, length)

    b_dim = tl.arange(0, HEAD_DIM)
    b_in_group = tl.arange(0, BLOCK_G)
    b_head = kv_head * GROUP + b_in_group
    b_is_head = b_in_group < GROUP
    b_q = tl.load(
        p_q + batch * q_stride_b + b_head[:, None] * q_stride_h + b_dim[None, :],
        mask=b_is_head[:, None],
        other=0.0,
    )
    p_k += batch * k_stride_b + kv_head.to(tl.int64) * k_stride_h
    p_v += batch * v_stride_b + kv_head.to(tl.int64) * v_stride_h
    b_maximum = tl.full((BLOCK_G,), -float("inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_G,), tl.float32)
    b_out = tl.zeros((BLOCK_G, HEAD_DIM), tl.float32)
    for key in tl.range(start, stop, BLOCK_T):
        b_key = key + tl.arange(0, BLOCK_T)
        # Beyond the length the cache may hold anything: loaded as zero, because 0 * NaN would spoil the
        # matmul.
        b_held = b_key < stop
        b_key_row = b_key.to(tl.int64)[:, None]
        b_k = tl.load(p_k + b_key_row * k_stride_t + b_dim[None, :], mask=b_held[:, None], other=0.0)
        b_score = tl.where(b_held[None, :], tl.dot(b_q, b_k.T) * scale_log2, -float("inf"))
        b_new_maximum = tl.maximum(b_maximum, tl.max(b_score, 1))
        b_weight = tl.exp2(b_score - b_new_maximum[:, None])
        b_rescale = tl.exp2(b_maximum - b_new_maximum)
        b_v = tl.load(p_v + b_key_row * v_stride_t + b_dim[None, :], mask=b_held[:, None], other=0.0)
        b_sum = b_sum * b_rescale + tl.sum(b_weight, 1)
        b_out = tl.dot(b_weight.to(b_v.dtype), b_v, b_out * b_rescale[:, None])
        b_maximum = b_new_maximum

    # A piece without keys has the sum zero: its output must be zero, and its weight too.
    b_out = b_out / tl.where(b_sum == 0, 1.0, b_sum)[:, None]
    b_slot = (batch * num_kv_heads * GROUP + b_head) * num_splits + split
    tl.store(
        p_part + b_slot[:, None] * HEAD_DIM + b_dim[None, :],
        b_out.to(p_part.dtype.element_ty),
        mask=b_is_head[:, None],
    )
    tl.store(p_lse_log2 + b_slot, b_maximum + tl.log2(b_sum), mask=b_is_head)


@triton.jit
def attention_decode_combine_kernel(
    p_part, p_lse_log2, p_out, num_splits, BLOCK_S: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Weigh the pieces of one head of one sequence by their shares of the softmax's denominator."""
    head = tl.program_id(0).to(tl.int64)
    b_split = tl.arange(0, BLOCK_S)
    b_dim = tl.arange(0, HEAD_DIM)
    b_is_split = b_split < num_splits
    b_lse = tl.load(p_lse_log2 + head * num_splits + b_split, mask=b_is_split, other=-float("inf"))
    maximum = tl.max(b_lse, 0)
    # An empty cache: every share is exp2(-inf - 0), zero.
    b_share = tl.exp2(b_lse - tl.where(maximum == -float("inf"), 0.0, maximum))
    total = tl.sum(b_share, 0)
    b_part = tl.load(
        p_part + (head * num_splits + b_split[:, None]) * HEAD_DIM + b_dim[None, :],
        mask=b_is_split[:, None],
        other=0.0,
    )
    b_out = tl.sum(b_part * b_share[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(p_out + head * HEAD_DIM + b_dim, b_out.to(p_out.dtype.element_ty))


def attention_triton_decode(
    q_BHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, lengths_B: Tensor, *, scale: float, window: int | None
) -> Tensor:
    """Returns (B, H, C). The last dimension of each tensor must have stride 1. Nothing waits for the
    device."""
    batch, num_heads, head_dim = q_BHC.shape
    capacity, num_kv_heads = k_BTKC.shape[1], k_BTKC.shape[2]
    group = num_heads // num_kv_heads
    num_splits = _num_splits(batch * num_kv_heads, capacity, q_BHC.device)
    out_BHC = torch.empty(q_BHC.shape, dtype=q_BHC.dtype, device=q_BHC.device)
    lse_BHS = torch.empty((batch, num_heads, num_splits), dtype=torch.float32, device=q_BHC.device)
    # A single piece is the whole: it goes straight to the output.
    part_BHSC = (
        out_BHC
        if num_splits == 1
        else torch.empty((*lse_BHS.shape, head_dim), dtype=torch.float32, device=q_BHC.device)
    )
    if out_BHC.numel() == 0:
        return out_BHC
    attention_decode_kernel[(batch * num_kv_heads, num_splits)](
        q_BHC,
        k_BTKC,
        v_BTKC,
        lengths_B.contiguous(),
        part_BHSC,
        lse_BHS,
        num_kv_heads,
        num_splits,
        capacity,
        capacity if window is None else min(window, capacity),
        scale * LOG2_E,
        *q_BHC.stride()[:2],
        *k_BTKC.stride()[:3],
        *v_BTKC.stride()[:3],
        GROUP=group,
        BLOCK_G=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        BLOCK_T=block_t(head_dim),
        **OPTIONS,
    )
    if num_splits > 1:
        attention_decode_combine_kernel[(batch * num_heads,)](
            part_BHSC,
            lse_BHS,
            out_BHC,
            num_splits,
            BLOCK_S=triton.next_power_of_2(num_splits),
            HEAD_DIM=head_dim,
        )
    return out_BHC


def block_t(head_dim: int) -> int:
    """Keys and values of a block are 16 KiB each, so that three stages leave room for two CTAs."""
    return 128 if head_dim <= 64 else 64


def _num_splits(num_programs: int, capacity: int, device: torch.device) -> int:
    """Enough CTAs for two on each SM, unless the pieces would become too small."""
    SMs = 132
    if device.type == "cuda":
        SMs = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = -(-2 * SMs // max(num_programs, 1))
    return max(1, min(wanted, capacity // _MIN_KEYS_PER_SPLIT, MAX_SPLITS))
