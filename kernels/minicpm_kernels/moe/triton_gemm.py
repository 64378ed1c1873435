# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: ANN001, ANN201, ANN202
"""Grouped matmuls of the experts, forward: every expert's rows times that expert's matrix, in one launch each.

The host does not know how many rows an expert has, so the grid is persistent: one CTA an SM walks
through the tiles that the plan lists on the device. Matrices come by TMA, whose descriptors keep a tile from reaching
into the next expert's matrix; a tile of rows that reaches into the next expert's rows computes them and does not store
them. Rows of tokens are gathered straight into shared memory (sm_90's TMA cannot gather), never into a sorted copy.

Shapes: N tokens, A experts a token, E experts, D model width, F hidden width of an expert, R = N·A sorted rows.
Kernels: b_x tiles, p_x pointers, t_x TMA descriptors.

Why these tiles, by the resource table of sm_90 (none of it timed on a card yet): 128x256 of 64 is what two warpgroups
can hold (128 registers a thread of sums). A tile of 128x128 would ask the L2 cache for 10 TB/s at 700 TFLOP/s, more
than it has; this one asks for 8.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from minicpm_kernels.moe.triton_permute import Plan

GROUP_ROWS = 8  # tiles of rows that share tiles of columns while these are in the L2 cache


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Size of an output tile, depth of one step along the sum, and how the compiler shall build the kernel."""

    rows: int
    columns: int
    depth: int
    piece: int  # columns that the work after the sum takes at a time
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """Launch options in Triton's names."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# The up kernel's 128 columns are twice 128: the gate's and those of up.
UP_TILES = Tiles(rows=128, columns=128, depth=64, piece=64, num_warps=8, num_stages=4)
ROWS_TILES = Tiles(rows=128, columns=256, depth=64, piece=256, num_warps=8, num_stages=3)
# float32 has no exact tensor-core matmul; this path is for checks, not for speed.
FLOAT32_TILES = Tiles(rows=32, columns=32, depth=32, piece=32, num_warps=4, num_stages=2)


@triton.jit
def grouped_tile(tile, num_row_tiles, num_column_tiles, GROUP: tl.constexpr):
    """Row and column of the ``tile``-th tile, in an order that keeps reused operands in the L2 cache."""
    group_size = GROUP * num_column_tiles
    first_row = tile // group_size * GROUP
    rows = tl.minimum(num_row_tiles - first_row, GROUP)
    within = tile % group_size
    return first_row + within % rows, within // rows


@triton.jit
def moe_up_fwd_kernel(
    p_x, t_gate_up, p_hidden, p_activation, p_pair, p_tile, p_num_tiles, width, hidden,
    TOP_K: tl.constexpr, SAVE_HIDDEN: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """activation = silu(gate·x) · (up·x) for each sorted row; gate·x and up·x are kept for the backward if asked."""
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
        # A row beyond the expert's last stands in for token 0: read, computed, and not stored.
        b_token = tl.load(p_pair + row + b_row, mask=b_row < num_rows, other=0) // TOP_K
        p_token = p_x + b_token.to(tl.int64)[:, None] * width + b_depth[None, :]
        b_gate = tl.zeros((ROWS, COLUMNS), tl.float32)
        b_up = tl.zeros((ROWS, COLUMNS), tl.float32)
        for depth in tl.range(0, width, DEPTH):
            if EVEN:
                b_x = tl.load(p_token + depth)
            else:
                b_x = tl.load(p_token + depth, mask=(b_depth < width - depth)[None, :], other=0.0)
            b_gate_weight = t_gate_up.load([expert, 0, column, depth]).reshape(COLUMNS, DEPTH)
            b_up_weight = t_gate_up.load([expert, 1, column, depth]).reshape(COLUMNS, DEPTH)
            b_gate = tl.dot(b_x, b_gate_weight.T, b_gate, input_precision="ieee")
            b_up = tl.dot(b_x, b_up_weight.T, b_up, input_precision="ieee")
        p_tile_hidden = p_hidden + row.to(tl.int64) * (2 * hidden) + column
        p_tile_activation = p_activation + row.to(tl.int64) * hidden + column
        _store_activation(
            b_gate,
            b_up,
            p_tile_hidden,
            p_tile_activation,
            num_rows,
            hidden - column,
            hidden,
            SAVE_HIDDEN,
            PIECE,
        )


@triton.jit
def _store_activation(
    b_gate, b_up, p_hidden, p_activation, num_rows, num_columns, hidden,
    SAVE_HIDDEN: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Store one tile, PIECE columns at a time: all of them at once would not fit the registers."""
    ROWS: tl.constexpr = b_gate.shape[0]
    COLUMNS: tl.constexpr = b_gate.shape[1]
    if COLUMNS > PIECE:
        HALF: tl.constexpr = COLUMNS // 2
        b_left_gate, b_right_gate = column_halves(b_gate)
        b_left_up, b_right_up = column_halves(b_up)
        _store_activation(
            b_left_gate, b_left_up, p_hidden, p_activation, num_rows, num_columns, hidden, SAVE_HIDDEN, PIECE
        )
        _store_activation(
            b_right_gate, b_right_up, p_hidden + HALF, p_activation + HALF, num_rows, num_columns - HALF, hidden,
            SAVE_HIDDEN, PIECE,
        )  # fmt: skip
    else:
        b_row, b_column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
        b_inside = (b_row < num_rows) & (b_column < num_columns)
        if SAVE_HIDDEN:
            p_here = p_hidden + b_row * (2 * hidden) + b_column
            tl.store(p_here, b_gate.to(p_hidden.dtype.element_ty), mask=b_inside)
            tl.store(p_here + hidden, b_up.to(p_hidden.dtype.element_ty), mask=b_inside)
        b_activation = (b_gate * tl.sigmoid(b_gate) * b_up).to(p_activation.dtype.element_ty)
        tl.store(p_activation + b_row * hidden + b_column, b_activation, mask=b_inside)


@triton.jit
def column_halves(b_tile):
    """The left and the right half of a tile; on a matmul's result this only renames registers."""
    ROWS: tl.constexpr = b_tile.shape[0]
    HALF: tl.constexpr = b_tile.shape[1] // 2
    return b_tile.reshape(ROWS, 2, HALF).permute(0, 2, 1).split()


@triton.jit
def moe_rows_kernel(
    t_row, t_weight, p_out, p_tile, p_num_tiles, sum_width, out_width,
    TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out = rows · Wᵀ of each row's expert, W stored (out_width, sum_width); rows · W if ``TRANSPOSED``."""
    num_row_tiles = tl.load(p_num_tiles)
    num_column_tiles = tl.cdiv(out_width, COLUMNS)
    num_tiles = num_row_tiles * num_column_tiles
    # Flattened, the loads of the next tile are under way while this one is stored. Only here: with gathered rows the
    # same makes ptxas wait for every matmul before it starts the next.
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
        row_tile, column_tile = grouped_tile(tile, num_row_tiles, num_column_tiles, GROUP)
        expert = tl.load(p_tile + 3 * row_tile)
        row = tl.load(p_tile + 3 * row_tile + 1)
        column = column_tile * COLUMNS
        b_out = tl.zeros((ROWS, COLUMNS), tl.float32)
        for depth in tl.range(0, sum_width, DEPTH):
            b_row = t_row.load([row, depth])
            if TRANSPOSED:
                b_weight = t_weight.load([expert, depth, column]).reshape(DEPTH, COLUMNS)
            else:
                b_weight = t_weight.load([expert, column, depth]).reshape(COLUMNS, DEPTH).T
            b_out = tl.dot(b_row, b_weight, b_out, input_precision="ieee")
        num_rows = tl.load(p_tile + 3 * row_tile + 2) - row
        b_index, b_column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        p_tile_out = p_out + row.to(tl.int64) * out_width + column
        p_here = p_tile_out + b_index[:, None] * out_width + b_column[None, :]
        b_inside = (b_index < num_rows)[:, None] & (b_column < out_width - column)[None, :]
        tl.store(p_here, b_out.to(p_out.dtype.element_ty), mask=b_inside)


def up_projection(
    x_ND: Tensor, gate_up_E2FD: Tensor, plan: Plan, top_k: int, *, save_hidden: bool
) -> tuple[Tensor, Tensor]:
    """The activation (S, F) of every sorted row, and what the backward needs of it: (S, 2F), or (0, 2F)."""
    num_rows, (num_experts, double, width) = plan.pair_R.numel(), gate_up_E2FD.shape
    hidden_R2F = x_ND.new_empty(num_rows if save_hidden else 0, double)
    activation_RF = x_ND.new_empty(num_rows, double // 2)
    tiles = tiles_for(x_ND.dtype, UP_TILES)
    moe_up_fwd_kernel[(num_programs(x_ND.device),)](
        x_ND,
        TensorDescriptor.from_tensor(
            gate_up_E2FD.view(num_experts, 2, double // 2, width), [1, 1, tiles.columns, tiles.depth]
        ),
        hidden_R2F, activation_RF, plan.pair_R, plan.tile_T3, plan.num_tiles_1, width, double // 2,
        TOP_K=top_k, SAVE_HIDDEN=save_hidden, EVEN=width % tiles.depth == 0, PIECE=tiles.piece,
        **tile_constants(tiles), **tiles.options,
    )  # fmt: skip
    return activation_RF, hidden_R2F


def multiply_rows(rows: Tensor, weight: Tensor, plan: Plan, *, transposed: bool) -> Tensor:
    """Each sorted row (S, P) times its expert's matrix: (E, Q, P) to (S, Q), or ``transposed`` (E, P, Q) to (S, Q)."""
    out_width = weight.shape[2 if transposed else 1]
    out = rows.new_empty(rows.shape[0], out_width)
    tiles = tiles_for(rows.dtype, ROWS_TILES)
    weight_tile = [tiles.depth, tiles.columns] if transposed else [tiles.columns, tiles.depth]
    moe_rows_kernel[(num_programs(rows.device),)](
        TensorDescriptor.from_tensor(rows, [tiles.rows, tiles.depth]),
        TensorDescriptor.from_tensor(weight, [1, *weight_tile]),
        out, plan.tile_T3, plan.num_tiles_1, rows.shape[1], out_width,
        TRANSPOSED=transposed, **tile_constants(tiles), **tiles.options,
    )  # fmt: skip
    return out


def tiles_for(dtype: torch.dtype, half: Tiles) -> Tiles:
    """The tiles of a kernel whose 16-bit ones are ``half``."""
    return half if dtype.itemsize == 2 else FLOAT32_TILES


def num_programs(device: torch.device) -> int:
    """Size of a persistent grid: one CTA an SM, since each fills its registers."""
    if device.type != "cuda":
        return 3  # in the interpreter: more than one, and fewer than the tiles, so that the walk is tested
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def tile_constants(tiles: Tiles) -> dict[str, int]:
    """The constants of a kernel that its tiles set."""
    return {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "DEPTH": tiles.depth, "GROUP": GROUP_ROWS}
