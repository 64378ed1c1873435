# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: ANN001, ANN201
"""Triton kernels of RMSNorm, plain and with the residual add before it: every tensor is read or written once.

The backward runs a fixed number of CTAs, each over its share of the rows, so that the weight's gradient is summed
in registers and then over CTAs: no atomics, the same bits every time.

Legend: N rows, D model.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096  # elements of a CTA's tile: a long row, or several short ones
NUM_WARPS_FWD = 4
NUM_WARPS_BWD = 8
_CTAS_PER_SM = 2  # of the backward: what its registers allow


@triton.jit
def rms_norm_fwd_kernel(
    p_x,
    p_branch,
    p_weight,
    p_normalised,
    p_new_residual,
    p_rstd,
    num_rows,
    width,
    eps,
    branch_scale,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    offsets = rows[:, None] * width + columns[None, :]
    mask = (rows < num_rows)[:, None] & (columns < width)[None, :]
    # Rows pass once: marking them first to go keeps the weight, which every CTA reads, in the cache.
    b_x = tl.load(p_x + offsets, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if RESIDUAL:
        b_branch = tl.load(p_branch + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
        # The norm must see what the next layer will: the rounded sum.
        b_stored = (b_x + branch_scale * b_branch.to(tl.float32)).to(p_new_residual.dtype.element_ty)
        tl.store(p_new_residual + offsets, b_stored, mask=mask)
        b_x = b_stored.to(tl.float32)
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / width + eps)
    tl.store(p_rstd + rows, b_rstd, mask=rows < num_rows)
    b_weight = tl.load(p_weight + columns, mask=columns < width, other=0.0).to(tl.float32)
    b_normalised = b_x * b_rstd[:, None] * b_weight[None, :]
    tl.store(p_normalised + offsets, b_normalised.to(p_normalised.dtype.element_ty), mask=mask)


@triton.jit
def rms_norm_bwd_kernel(
    p_x,
    p_weight,
    p_rstd,
    p_d_normalised,
    p_d_new_residual,
    p_d_x,
    p_d_branch,
    p_d_weight,
    num_rows,
    width,
    branch_scale,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    column_mask = columns < width
    b_weight = tl.load(p_weight + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    b_d_weight = tl.zeros([BLOCK], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=3):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        offsets = rows[:, None] * width + columns[None, :]
        mask = (rows < num_rows)[:, None] & column_mask[None, :]
        b_x = tl.load(p_x + offsets, mask=mask, other=0.0).to(tl.float32)
        b_d_normalised = tl.load(p_d_normalised + offsets, mask=mask, other=0.0).to(tl.float32)
        b_rstd = tl.load(p_rstd + rows, mask=rows < num_rows, other=0.0)[:, None]
        b_unit = b_x * b_rstd
        b_product = b_d_normalised * b_unit
        b_d_weight += tl.sum(b_product, 0)
        b_mean = tl.sum(b_product * b_weight, 1)[:, None] / width
        b_d_x = (b_d_normalised * b_weight - b_unit * b_mean) * b_rstd
        if RESIDUAL:
            b_d_x += tl.load(p_d_new_residual + offsets, mask=mask, other=0.0).to(tl.float32)
            tl.store(p_d_branch + offsets, (b_d_x * branch_scale).to(p_d_branch.dtype.element_ty), mask=mask)
        tl.store(p_d_x + offsets, b_d_x.to(p_d_x.dtype.element_ty), mask=mask)
    p_d_weight += tl.program_id(0) * width + columns
    tl.store(p_d_weight, b_d_weight, mask=column_mask)


@torch.library.custom_op("minicpm_kernels::rms_norm_fwd", mutates_args=())
def rms_norm_fwd(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(normalised like `x`, 1 / root mean square (N,) float32)."""
    x = x.contiguous()
    normalised = torch.empty_like(x)
    return normalised, _forward(x, None, weight_D, normalised, None, eps, 0.0)


@rms_norm_fwd.register_fake
def _(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _like(x), x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@torch.library.custom_op("minicpm_kernels::rms_norm_residual_fwd", mutates_args=())
def rms_norm_residual_fwd(
    residual: Tensor, branch: Tensor, weight_D: Tensor, eps: float, branch_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(normalised like `branch`, new residual like `residual`, 1 / root mean square (N,) float32)."""
    residual, branch = residual.contiguous(), branch.contiguous()
    normalised, new_residual = torch.empty_like(branch), torch.empty_like(residual)
    rstd_N = _forward(residual, branch, weight_D, normalised, new_residual, eps, branch_scale)
    return normalised, new_residual, rstd_N


@rms_norm_residual_fwd.register_fake
def _(
    residual: Tensor, branch: Tensor, weight_D: Tensor, eps: float, branch_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _like(branch),
        _like(residual),
        residual.new_empty(residual.shape[:-1].numel(), dtype=torch.float32),
    )


@torch.library.custom_op("minicpm_kernels::rms_norm_bwd", mutates_args=())
def rms_norm_bwd(x: Tensor, weight_D: Tensor, rstd_N: Tensor, d_normalised: Tensor) -> tuple[Tensor, Tensor]:
    """(d_x like `x`, d_weight like the weight)."""
    d_x = _like(x)
    return d_x, _backward(x, weight_D, rstd_N, d_normalised, None, d_x, None, 0.0)


@rms_norm_bwd.register_fake
def _(x: Tensor, weight_D: Tensor, rstd_N: Tensor, d_normalised: Tensor) -> tuple[Tensor, Tensor]:
    return _like(x), torch.empty_like(weight_D)


@torch.library.custom_op("minicpm_kernels::rms_norm_residual_bwd", mutates_args=())
def rms_norm_residual_bwd(
    new_residual: Tensor,
    weight_D: Tensor,
    rstd_N: Tensor,
    d_normalised: Tensor,
    d_new_residual: Tensor,
    branch_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_residual like the residual, d_branch like `d_normalised`, d_weight like the weight)."""
    d_residual, d_branch = _like(new_residual), _like(d_normalised)
    d_weight_D = _backward(
        new_residual, weight_D, rstd_N, d_normalised, d_new_residual, d_residual, d_branch, branch_scale
    )
    return d_residual, d_branch, d_weight_D


@rms_norm_residual_bwd.register_fake
def _(
    new_residual: Tensor,
    weight_D: Tensor,
    rstd_N: Tensor,
    d_normalised: Tensor,
    d_new_residual: Tensor,
    branch_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(new_residual), _like(d_normalised), torch.empty_like(weight_D)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _forward(
    x: Tensor,
    branch: Tensor | None,
    weight_D: Tensor,
    normalised: Tensor,
    new_residual: Tensor | None,
    eps: float,
    branch_scale: float,
) -> Tensor:
    width = x.shape[-1]
    num_rows = x.shape[:-1].numel()
    rstd_N = x.new_empty(num_rows, dtype=torch.float32)
    rows, block = tile_shape(width)
    if x.numel():
        with torch.cuda.device_of(x):
            rms_norm_fwd_kernel[(triton.cdiv(num_rows, rows),)](
                x,
                branch,
                weight_D.contiguous(),
                normalised,
                new_residual,
                rstd_N,
                num_rows,
                width,
                eps,
                branch_scale,
                ROWS=rows,
                BLOCK=block,
                RESIDUAL=branch is not None,
                num_warps=NUM_WARPS_FWD,
            )
    return rstd_N


def _backward(
    x: Tensor,
    weight_D: Tensor,
    rstd_N: Tensor,
    d_normalised: Tensor,
    d_new_residual: Tensor | None,
    d_x: Tensor,
    d_branch: Tensor | None,
    branch_scale: float,
) -> Tensor:
    width = x.shape[-1]
    num_rows = x.shape[:-1].numel()
    rows, block = tile_shape(width)
    num_programs = min(triton.cdiv(num_rows, rows), _num_sms(x.device) * _CTAS_PER_SM)
    d_weight_PD = x.new_empty(num_programs, width, dtype=torch.float32)
    if x.numel():
        with torch.cuda.device_of(x):
            rms_norm_bwd_kernel[(num_programs,)](
                x.contiguous(),
                weight_D.contiguous(),
                rstd_N,
                d_normalised.contiguous(),
                None if d_new_residual is None else d_new_residual.contiguous(),
                d_x,
                d_branch,
                d_weight_PD,
                num_rows,
                width,
                branch_scale,
                ROWS=rows,
                BLOCK=block,
                RESIDUAL=d_branch is not None,
                num_warps=NUM_WARPS_BWD,
            )
    return d_weight_PD.sum(0).to(weight_D.dtype)


def tile_shape(width: int) -> tuple[int, int]:
    block = triton.next_power_of_2(width)
    return max(1, _TILE // block), block


@functools.cache
def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # interpreted: enough to have several CTAs share the rows
    return torch.cuda.get_device_properties(device).multi_processor_count
