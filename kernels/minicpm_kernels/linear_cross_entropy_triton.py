# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: ANN001, ANN201
"""Triton kernel that turns a chunk of logits into its own gradient, and the loss of each row.

One CTA owns one row and passes over it twice: maximum and sum, then the gradient. A CTA is as large as an
SM takes (1024 threads), so that only one row an SM is under way: 132 rows of 122,753 bf16 are
32 MB and the second pass finds them in the 50 MB of L2. Smaller CTAs would have four times the rows under way.

Legend: M tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 16384
_ELEMENTS_OF_THREAD = 16


@triton.jit
def linear_cross_entropy_kernel(
    p_logits,
    p_targets,
    p_losses,
    p_z_losses,
    vocabulary,
    row_stride,
    logit_scale,
    z_loss,
    ignore_index,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
):
    LOG2_E: tl.constexpr = 1.4426950408889634
    LN_2: tl.constexpr = 0.6931471805599453
    row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + row * row_stride
    target = tl.load(p_targets + row)
    is_kept = target != ignore_index
    # A target that is no token has no logit: the loss is NaN rather than a plausible number.
    is_token = (target >= 0) & (target < vocabulary)
    target_logit = tl.load(p_row + target, mask=is_token, other=float("nan")).to(tl.float32)

    # Loads and stores are masked by the row's length in memory, a multiple of 16 in training where the vocabulary is
    # not, because a mask that may end within a vector would split every vector access into single elements.
    # The inner dimension is what one thread loads at once, so the reductions in the loop stay within a thread.
    offsets = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    # Differences from the maximum are scaled, not logits: a large logit times the scale is rounded by as much as a
    # probability may be off, and differently here and below where the compiler fuses a multiplication and an addition.
    scale_log2 = logit_scale * LOG2_E
    b_max = tl.full([BLOCK // VECTOR], -1e30, tl.float32)
    b_sum = tl.zeros([BLOCK // VECTOR], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        columns = start + offsets
        b_logits = tl.load(p_row + columns, mask=columns < row_stride, other=0.0).to(tl.float32)
        b_logits = tl.where(columns < vocabulary, b_logits, -float("inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_logits, 1))
        b_sum *= tl.exp2((b_max - b_new_max) * scale_log2)
        b_sum += tl.sum(tl.exp2((b_logits - b_new_max[:, None]) * scale_log2), 1)
        b_max = b_new_max
    highest = tl.max(b_max, 0)
    total = tl.sum(b_sum * tl.exp2((b_max - highest) * scale_log2), 0)
    log_total = tl.log2(total) * LN_2
    lse = highest * logit_scale + log_total
    tl.store(p_losses + row, tl.where(is_kept, (highest - target_logit) * logit_scale + log_total, 0.0))
    tl.store(p_z_losses + row, tl.where(is_kept, z_loss * lse * lse, 0.0))

    if NEEDS_GRAD:
        # Nothing of this is left to do for each logit but a product and a difference.
        probability_factor = (1.0 + 2.0 * z_loss * lse) / total
        for start in range(0, vocabulary, BLOCK):
            columns = start + offsets
            mask = columns < row_stride
            b_logits = tl.load(p_row + columns, mask=mask, other=0.0).to(tl.float32)
            b_weight = tl.exp2((b_logits - highest) * scale_log2)
            b_gradient = b_weight * probability_factor - tl.where(columns == target, 1.0, 0.0)
            b_gradient = tl.where(is_kept, b_gradient * logit_scale, 0.0)
            tl.store(p_row + columns, b_gradient.to(p_logits.dtype.element_ty), mask=mask)


def gradient_in_place(
    logits_MV: Tensor,
    targets_M: Tensor,
    logit_scale: float,
    z_loss: float,
    ignore_index: int,
    needs_grad: bool,
) -> Tensor:
    """Turn unscaled logits into the gradient with respect to them; returns the sums of loss and z-loss, (2,).

    Rows may be longer in memory than V (the stride says how long), and what lies behind V is overwritten. Without
    `needs_grad` the logits are only read.
    """
    num_rows, vocabulary = logits_MV.shape
    losses_2M = logits_MV.new_empty(2, num_rows, dtype=torch.float32)
    block = min(MAX_BLOCK, max(256, triton.next_power_of_2(vocabulary)))
    linear_cross_entropy_kernel[(num_rows,)](
        logits_MV,
        targets_M,
        losses_2M[0],
        losses_2M[1],
        vocabulary,
        logits_MV.stride(0),
        logit_scale,
        z_loss,
        ignore_index,
        BLOCK=block,
        VECTOR=16 // logits_MV.element_size(),
        NEEDS_GRAD=needs_grad,
        num_warps=num_warps_for(block),
    )
    return losses_2M.sum(1)


def num_warps_for(block: int) -> int:
    return max(1, min(32, block // (_ELEMENTS_OF_THREAD * 32)))
