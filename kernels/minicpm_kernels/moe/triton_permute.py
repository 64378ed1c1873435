# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: ANN001, ANN201, ANN202
"""Sorting tokens by expert on the device, and bringing the experts' rows back to their tokens.

A counting sort in three small launches: count, add up, place. It is stable (rows of an expert keep the tokens' order),
so every later sum has one order and two runs agree to the bit; it uses no atomics, and the host waits for nothing.

Shapes: N tokens, A experts a token, E experts, D model width, R = N·A sorted rows, M columns of partial sums.
Kernels: b_x tiles, p_x pointers. A pair is n·K + k, token n with its k-th expert; its slot is its sorted row.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_ROWS = 2**31 - 1
_ONE_HOT_ELEMENTS = 8_192  # of a block of pairs by all experts: 32 registers a thread in 8 warps
_PAIRS_OF_BLOCK = (32, 1_024)
COMBINE_TOKENS, COMBINE_COLUMNS = 4, 256  # one warp a token, 16 bytes a thread; 2304 and 1536 divide evenly


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where each pair of token and expert goes, and the row tiles that the grouped matmuls work through."""

    pair_R: Tensor  # the pair at each slot
    slot_NA: Tensor  # the slot of each pair; -1 where the expert's id is out of range
    start_E1: Tensor  # first slot of each expert, then the number of slots in use
    tile_T3: Tensor  # expert, first slot and end of the expert's slots, for each tile of rows
    num_tiles_1: Tensor  # how many of these tiles there are


@triton.jit
def _one_hot(p_expert, num_pairs, num_experts, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """The block's pairs, and for each a row with a 1 at its expert; without one where there is no such expert."""
    b_pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_expert = tl.load(p_expert + b_pair, mask=b_pair < num_pairs, other=-1)
    b_expert = tl.where(b_expert < num_experts, b_expert, -1)
    return b_pair, (b_expert[:, None] == tl.arange(0, EXPERTS)[None, :]).to(tl.int32)


@triton.jit
def moe_count_kernel(p_expert, p_count, num_pairs, num_experts, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """Histogram of one block of pairs."""
    _, b_one_hot = _one_hot(p_expert, num_pairs, num_experts, EXPERTS, BLOCK)
    tl.store(p_count + tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS), tl.sum(b_one_hot, 0))


@triton.jit
def moe_plan_kernel(
    p_count, p_first, p_start, p_tile, p_num_tiles, num_blocks, num_experts, max_tiles,
    TILE_ROWS: tl.constexpr, EXPERTS: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One CTA adds up: where each block's rows of each expert begin, each expert's rows, and the row tiles."""
    b_expert = tl.arange(0, EXPERTS)
    b_total = tl.zeros((EXPERTS,), tl.int32)
    for block in range(0, num_blocks, BLOCKS):
        b_block = block + tl.arange(0, BLOCKS)
        p_block = p_count + b_block[:, None] * EXPERTS + b_expert[None, :]
        b_total += tl.sum(tl.load(p_block, mask=b_block[:, None] < num_blocks, other=0), 0)
    b_start = tl.cumsum(b_total, 0) - b_total
    tl.store(p_start + b_expert, b_start, mask=b_expert < num_experts)
    tl.store(p_start + num_experts, tl.sum(b_total, 0))

    b_next = b_start
    for block in range(0, num_blocks, BLOCKS):
        b_block = block + tl.arange(0, BLOCKS)
        b_offset = b_block[:, None] * EXPERTS + b_expert[None, :]
        b_count = tl.load(p_count + b_offset, mask=b_block[:, None] < num_blocks, other=0)
        b_first = b_next[None, :] + tl.cumsum(b_count, 0) - b_count
        tl.store(p_first + b_offset, b_first, mask=b_block[:, None] < num_blocks)
        b_next += tl.sum(b_count, 0)

    b_num_tiles = (b_total + TILE_ROWS - 1) // TILE_ROWS
    b_tile_end = tl.cumsum(b_num_tiles, 0)
    num_tiles = tl.sum(b_num_tiles, 0)
    tl.store(p_num_tiles, num_tiles)
    for tile in range(0, max_tiles, TILES):
        b_tile = tile + tl.arange(0, TILES)
        b_of = tl.sum((b_tile[:, None] >= b_tile_end[None, :]).to(tl.int32), 1)
        b_is = b_of[:, None] == b_expert[None, :]
        b_first_row = b_start - (b_tile_end - b_num_tiles) * TILE_ROWS
        b_row = tl.sum(tl.where(b_is, b_first_row[None, :], 0), 1) + b_tile * TILE_ROWS
        b_end = tl.sum(tl.where(b_is, (b_start + b_total)[None, :], 0), 1)
        tl.store(p_tile + 3 * b_tile, b_of, mask=b_tile < num_tiles)
        tl.store(p_tile + 3 * b_tile + 1, b_row, mask=b_tile < num_tiles)
        tl.store(p_tile + 3 * b_tile + 2, b_end, mask=b_tile < num_tiles)


@triton.jit
def moe_place_kernel(
    p_expert, p_first, p_pair, p_slot, num_pairs, num_experts, EXPERTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Slot of each pair of a block: its expert's first slot here plus its rank among the block's pairs of it."""
    b_pair, b_one_hot = _one_hot(p_expert, num_pairs, num_experts, EXPERTS, BLOCK)
    b_first = tl.load(p_first + tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS))
    b_slot = tl.sum(b_one_hot * (b_first[None, :] + tl.cumsum(b_one_hot, 0)), 1) - 1  # -1 if of no expert
    tl.store(p_slot + b_pair, b_slot, mask=b_pair < num_pairs)
    tl.store(p_pair + b_slot, b_pair, mask=b_slot >= 0)


@triton.jit
def moe_combine_kernel(
    p_row, p_slot, p_weight, p_out, num_tokens, width,
    TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum of a token's K rows, weighted or not, in float32."""
    b_token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    b_column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    b_here, b_wide = b_token < num_tokens, (b_column < width)[None, :]
    b_sum = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for k in tl.static_range(TOP_K):
        b_pair = b_token * TOP_K + k
        b_slot = tl.load(p_slot + b_pair, mask=b_here, other=-1)
        p_here = p_row + b_slot.to(tl.int64)[:, None] * width + b_column[None, :]
        b_row = tl.load(p_here, mask=(b_slot >= 0)[:, None] & b_wide, other=0.0).to(tl.float32)
        if WEIGHTED:
            b_row *= tl.load(p_weight + b_pair, mask=b_here, other=0.0)[:, None]
        b_sum += b_row
    p_here = p_out + b_token.to(tl.int64)[:, None] * width + b_column[None, :]
    tl.store(p_here, b_sum.to(p_out.dtype.element_ty), mask=b_here[:, None] & b_wide)


@triton.jit
def moe_weight_gradient_kernel(
    p_partial, p_slot, p_out, num_pairs, num_columns, PAIRS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Add up each pair's partial sums, left by the column tiles of a matmul."""
    b_pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    b_column = tl.arange(0, COLUMNS)[None, :]
    b_slot = tl.load(p_slot + b_pair, mask=b_pair < num_pairs, other=-1)
    p_here = p_partial + b_slot.to(tl.int64)[:, None] * num_columns + b_column
    b_partial = tl.load(p_here, mask=(b_slot >= 0)[:, None] & (b_column < num_columns), other=0.0)
    tl.store(p_out + b_pair, tl.sum(b_partial, 1), mask=b_pair < num_pairs)


def make_plan(experts_NA: Tensor, num_experts: int, tile_rows: int) -> Plan:
    """Sort the pairs by expert; ``tile_rows`` is the height of the grouped matmuls' tiles."""
    num_pairs = experts_NA.numel()
    if num_pairs > _MAX_ROWS:
        raise ValueError(f"moe_experts: {num_pairs} rows (tokens times experts a token) exceed {_MAX_ROWS}")
    experts = triton.next_power_of_2(max(num_experts, 2))
    block = pairs_of_block(experts)
    num_blocks = triton.cdiv(num_pairs, block)
    max_tiles = num_pairs // tile_rows + num_experts  # each expert's last tile may be a partial one

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=experts_NA.device)

    plan = Plan(
        pair_R=empty(num_pairs),
        slot_NA=empty(*experts_NA.shape),
        start_E1=empty(num_experts + 1),
        tile_T3=empty(max_tiles, 3),
        num_tiles_1=empty(1),
    )
    count_BE, first_BE = empty(num_blocks, experts), empty(num_blocks, experts)
    moe_count_kernel[(num_blocks,)](
        experts_NA, count_BE, num_pairs, num_experts, EXPERTS=experts, BLOCK=block, num_warps=8
    )
    moe_plan_kernel[(1,)](
        count_BE, first_BE, plan.start_E1, plan.tile_T3, plan.num_tiles_1, num_blocks, num_experts, max_tiles,
        TILE_ROWS=tile_rows, EXPERTS=experts, **plan_blocks(experts), num_warps=8,
    )  # fmt: skip
    moe_place_kernel[(num_blocks,)](
        experts_NA, first_BE, plan.pair_R, plan.slot_NA, num_pairs, num_experts,
        EXPERTS=experts, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return plan


def combine(rows_RD: Tensor, plan: Plan, weights_NA: Tensor | None) -> Tensor:
    """Sum of each token's rows, (N, D), each times its weight if weights are given."""
    num_tokens, top_k = plan.slot_NA.shape
    width = rows_RD.shape[1]
    out_ND = rows_RD.new_empty(num_tokens, width)
    grid = (triton.cdiv(num_tokens, COMBINE_TOKENS), triton.cdiv(width, COMBINE_COLUMNS))
    moe_combine_kernel[grid](
        rows_RD, plan.slot_NA, weights_NA, out_ND, num_tokens, width,
        TOP_K=top_k, WEIGHTED=weights_NA is not None, TOKENS=COMBINE_TOKENS, COLUMNS=COMBINE_COLUMNS,
    )  # fmt: skip
    return out_ND


def weight_gradient(partial_RM: Tensor, plan: Plan) -> Tensor:
    """Gradient of the router's weights, (N, A), from its partial sums at each slot."""
    out_NA = partial_RM.new_empty(plan.slot_NA.shape)
    num_columns = partial_RM.shape[1]
    columns = triton.next_power_of_2(num_columns)
    pairs = max(1, 1_024 // columns)
    moe_weight_gradient_kernel[(triton.cdiv(out_NA.numel(), pairs),)](
        partial_RM, plan.slot_NA, out_NA, out_NA.numel(), num_columns, PAIRS=pairs, COLUMNS=columns
    )
    return out_NA


def pairs_of_block(experts: int) -> int:
    least, most = _PAIRS_OF_BLOCK
    return min(max(_ONE_HOT_ELEMENTS // experts, least), most)


def plan_blocks(experts: int) -> dict[str, int]:
    rows = min(max(4_096 // experts, 1), 64)
    return {"BLOCKS": rows, "TILES": rows}
