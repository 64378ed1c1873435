# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: ANN001, ANN201, ANN202
"""Grouped matmuls of the experts, backward: through down and SwiGLU in one kernel, and the matrices' gradients.

With g = gradient of the output times down (one row for each pair), h = w · g is the gradient of the activation and
Σ g · activation that of the router's weight w. So the experts' outputs are neither kept nor computed again: all that
the forward leaves is gate·x and up·x, from which the activation is made anew while a tile's sum is still in registers.

Shapes and kernels as in moe_triton_gemm.py; C column tiles of F.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from minicpm_kernels.moe.triton_gemm import (
    Tiles,
    column_halves,
    grouped_tile,
    num_programs,
    tile_constants,
    tiles_for,
)
from minicpm_kernels.moe.triton_permute import Plan

DOWN_BACKWARD_TILES = Tiles(rows=128, columns=256, depth=64, piece=32, num_warps=8, num_stages=4)
# Seven stages make four buffers: the row numbers are loaded ahead of the rows, and Triton shares the stages out
# evenly between the two steps.
GRADIENT_TILES = Tiles(rows=128, columns=256, depth=64, piece=256, num_warps=8, num_stages=7)


@triton.jit
def moe_down_bwd_kernel(
    p_dout, t_down, t_hidden, p_weight, p_dhidden, p_weighted, p_partial, p_pair, p_tile, p_num_tiles, width, hidden,
    TOP_K: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """From the output's gradient to those of gate·x, up·x and the router's weight; and w · activation."""
    num_row_tiles = tl.load(p_num_tiles)
    num_column_tiles = tl.cdiv(hidden, COLUMNS)
    b_depth = tl.arange(0, DEPTH)
    for tile in tl.range(tl.program_id(0), num_row_tiles * num_column_tiles, tl.num_programs(0)):
        row_tile, column_tile = grouped_tile(tile, num_row_tiles, num_column_tiles, GROUP)
        expert = tl.load(p_tile + 3 * row_tile)
        row = tl.load(p_tile + 3 * row_tile + 1)
        num_rows = tl.load(p_tile + 3 * row_tile + 2) - row
        column = column_tile * COLUMNS
        b_row = tl.arange(0, ROWS)
        b_pair = tl.load(p_pair + row + b_row, mask=b_row < num_rows, other=0)
        p_token = p_dout + (b_pair // TOP_K).to(tl.int64)[:, None] * width + b_depth[None, :]
        b_grad = tl.zeros((ROWS, COLUMNS), tl.float32)
        for depth in tl.range(0, width, DEPTH):
            if EVEN:
                b_dout = tl.load(p_token + depth)
            else:
                b_dout = tl.load(p_token + depth, mask=(b_depth < width - depth)[None, :], other=0.0)
            b_down = t_down.load([expert, depth, column]).reshape(DEPTH, COLUMNS)
            b_grad = tl.dot(b_dout, b_down, b_grad, input_precision="ieee")
        b_weight = tl.load(p_weight + b_pair)
        p_tile_dhidden = p_dhidden + row.to(tl.int64) * (2 * hidden) + column
        p_tile_weighted = p_weighted + row.to(tl.int64) * hidden + column
        b_partial = _swiglu_backward(
            b_grad, b_weight, t_hidden, row, column, p_tile_dhidden, p_tile_weighted, num_rows, hidden, PIECE
        )
        p_here = p_partial + (row + b_row).to(tl.int64) * num_column_tiles + column_tile
        tl.store(p_here, b_partial, mask=b_row < num_rows)


@triton.jit
def _swiglu_backward(
    b_grad, b_weight, t_hidden, row, column, p_dhidden, p_weighted, num_rows, hidden, PIECE: tl.constexpr
):
    """Store one tile, PIECE columns at a time, as registers allow; returns each row's Σ g · activation."""
    ROWS: tl.constexpr = b_grad.shape[0]
    COLUMNS: tl.constexpr = b_grad.shape[1]
    if COLUMNS > PIECE:
        HALF: tl.constexpr = COLUMNS // 2
        b_left, b_right = column_halves(b_grad)
        b_sum = _swiglu_backward(
            b_left, b_weight, t_hidden, row, column, p_dhidden, p_weighted, num_rows, hidden, PIECE
        )
        return b_sum + _swiglu_backward(
            b_right, b_weight, t_hidden, row, column + HALF, p_dhidden + HALF, p_weighted + HALF, num_rows, hidden,
            PIECE,
        )  # fmt: skip
    else:  # noqa: RET505  (a branch that the compiler leaves out must not be followed by code)
        # By TMA, not by pointers: these would not fit the registers. Columns beyond F read as zero and add nothing.
        b_gate, b_up = t_hidden.load([row, 0, column]).permute(0, 2, 1).split()
        b_gate, b_up = b_gate.to(tl.float32), b_up.to(tl.float32)
        b_sigmoid = tl.sigmoid(b_gate)
        b_silu = b_gate * b_sigmoid
        b_activation = b_silu * b_up
        b_sum = tl.sum(b_grad * b_activation, 1)

        b_row, b_column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
        b_inside = (b_row < num_rows) & (b_column < hidden - column)
        p_here = p_weighted + b_row * hidden + b_column
        # The same product but for a NaN. Tied to b_grad, it stays in that one's registers; else Triton would load the
        # piece a second time in the store's layout and do all of the above again: 38 % more instructions.
        b_weighted = tl.where(b_grad == b_grad, b_weight[:, None] * b_activation, b_grad)
        tl.store(p_here, b_weighted.to(p_weighted.dtype.element_ty), mask=b_inside)
        b_grad = b_weight[:, None] * b_grad
        p_here = p_dhidden + b_row * (2 * hidden) + b_column
        b_dup = b_grad * b_silu
        tl.store(p_here + hidden, b_dup.to(p_dhidden.dtype.element_ty), mask=b_inside)
        b_dgate = b_grad * b_up * (b_sigmoid + b_silu * (1.0 - b_sigmoid))
        tl.store(p_here, b_dgate.to(p_dhidden.dtype.element_ty), mask=b_inside)
        return b_sum


@triton.jit
def moe_weight_bwd_kernel(
    t_sorted, p_token_row, p_out, p_pair, p_start, num_experts, out_rows, out_columns,
    TOP_K: tl.constexpr, SORTED_ROWS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[e] = Leftᵀ · Right over the rows of expert e: one operand is sorted, the other gathered from its tokens.

    ``SORTED_ROWS``: the sorted operand is the left one. An expert without rows gets zeros.
    """
    num_row_tiles = tl.cdiv(out_rows, ROWS)
    num_column_tiles = tl.cdiv(out_columns, COLUMNS)
    num_tiles = num_row_tiles * num_column_tiles
    for tile in tl.range(tl.program_id(0), num_experts * num_tiles, tl.num_programs(0)):
        expert = tile // num_tiles
        row_tile, column_tile = grouped_tile(tile % num_tiles, num_row_tiles, num_column_tiles, GROUP)
        row, column = row_tile * ROWS, column_tile * COLUMNS
        b_row, b_column = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        b_depth = tl.arange(0, DEPTH)
        first = tl.load(p_start + expert)
        end = tl.load(p_start + expert + 1)
        b_out = tl.zeros((ROWS, COLUMNS), tl.float32)
        for slot in tl.range(first, end, DEPTH):
            # Rows beyond the expert's last are the next expert's in the sorted operand, and zero in the gathered one.
            b_here = (b_depth < end - slot)[:, None]
            b_token = tl.load(p_pair + slot + b_depth, mask=b_depth < end - slot, other=0) // TOP_K
            b_token = b_token.to(tl.int64)[:, None]
            if SORTED_ROWS:
                b_left = t_sorted.load([slot, row])
                p_here = p_token_row + b_token * out_columns + b_column[None, :]
                b_right = tl.load(p_here, mask=b_here & (b_column < out_columns)[None, :], other=0.0)
            else:
                p_here = p_token_row + b_token * out_rows + b_row[None, :]
                b_left = tl.load(p_here, mask=b_here & (b_row < out_rows)[None, :], other=0.0)
                b_right = t_sorted.load([slot, column])
            b_out = tl.dot(b_left.T, b_right, b_out, input_precision="ieee")
        p_expert = p_out + expert.to(tl.int64) * out_rows * out_columns
        p_here = p_expert + b_row.to(tl.int64)[:, None] * out_columns + b_column[None, :]
        b_inside = (b_row < out_rows)[:, None] & (b_column < out_columns)[None, :]
        tl.store(p_here, b_out.to(p_out.dtype.element_ty), mask=b_inside)


def down_backward(
    grad_ND: Tensor, weights_NA: Tensor, down_EDF: Tensor, hidden_R2F: Tensor, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden (S, 2F), weight times activation (S, F), and partial sums (S, C) of the router weights' gradient."""
    _, width, hidden = down_EDF.shape
    num_rows = hidden_R2F.shape[0]
    tiles = tiles_for(grad_ND.dtype, DOWN_BACKWARD_TILES)
    dhidden_R2F, weighted_RF = torch.empty_like(hidden_R2F), hidden_R2F.new_empty(num_rows, hidden)
    partial_RM = weights_NA.new_empty(num_rows, triton.cdiv(hidden, tiles.columns))
    moe_down_bwd_kernel[(num_programs(grad_ND.device),)](
        grad_ND,
        TensorDescriptor.from_tensor(down_EDF, [1, tiles.depth, tiles.columns]),
        TensorDescriptor.from_tensor(hidden_R2F.view(num_rows, 2, hidden), [tiles.rows, 2, tiles.piece]),
        weights_NA, dhidden_R2F, weighted_RF, partial_RM, plan.pair_R, plan.tile_T3, plan.num_tiles_1, width, hidden,
        TOP_K=weights_NA.shape[1], EVEN=width % tiles.depth == 0, PIECE=tiles.piece,
        **tile_constants(tiles), **tiles.options,
    )  # fmt: skip
    return dhidden_R2F, weighted_RF, partial_RM


def weight_gradients(sorted_RP: Tensor, tokens_NQ: Tensor, plan: Plan, *, sorted_rows: bool) -> Tensor:
    """Each expert's Σ over its rows of sorted ⊗ token: (E, P, Q), or (E, Q, P) unless ``sorted_rows``."""
    num_experts, top_k = plan.start_E1.numel() - 1, plan.slot_NA.shape[1]
    out_rows, out_columns = sorted_RP.shape[1], tokens_NQ.shape[1]
    if not sorted_rows:
        out_rows, out_columns = out_columns, out_rows
    tiles = tiles_for(sorted_RP.dtype, GRADIENT_TILES)
    out = sorted_RP.new_empty(num_experts, out_rows, out_columns)
    moe_weight_bwd_kernel[(num_programs(sorted_RP.device),)](
        TensorDescriptor.from_tensor(sorted_RP, [tiles.depth, tiles.rows if sorted_rows else tiles.columns]),
        tokens_NQ, out, plan.pair_R, plan.start_E1, num_experts, out_rows, out_columns,
        TOP_K=top_k, SORTED_ROWS=sorted_rows, **tile_constants(tiles), **tiles.options,
    )  # fmt: skip
    return out
