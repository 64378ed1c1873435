"""RMSNorm, alone and fused with the residual add before it (MiniCPM's scale_depth included).

Legend: N tokens, D model. Any number of leading dimensions may stand for N.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from minicpm_kernels.backend import choose_backend


def rms_norm(x_ND: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight (Zhang and Sennrich, arXiv 1910.07467); returns a tensor like `x_ND`.

    Args:
        x_ND: (…, D), float32, bfloat16 or float16.
        weight_D: (D,), of any of these types.
        eps: added to the mean square, in the square of x's unit.

    Computed in float32.

    Raises: ValueError if the weight is not as long as a row.
    """
    _check_weight(x_ND, weight_D)
    normalised_ND: Tensor = _RmsNorm.apply(x_ND, weight_D, eps)  # type: ignore[no-untyped-call]
    return normalised_ND


def rms_norm_residual(
    residual_ND: Tensor, branch_ND: Tensor, weight_D: Tensor, *, eps: float, branch_scale: float
) -> tuple[Tensor, Tensor]:
    """(normalised, new residual), where new residual = residual + branch_scale · branch, normalised as by `rms_norm`.

    Args:
        residual_ND, branch_ND: (…, D) both; float32, bfloat16 or float16, each its own.
        weight_D, eps: as for `rms_norm`.
        branch_scale: factor on the branch (MiniCPM, arXiv 2404.06395, table 7: scale_depth / sqrt(layers)).

    The normalised states have the branch's dtype and the new residual the residual's, so a float32 residual
    stream may run beside bf16 blocks. The norm sees the new residual as it is stored, after rounding.

    Raises: ValueError if residual and branch differ in shape, or the weight is not as long as a row.
    """
    _check_weight(residual_ND, weight_D)
    if residual_ND.shape != branch_ND.shape:
        raise ValueError(f"residual {tuple(residual_ND.shape)} and branch {tuple(branch_ND.shape)} differ")
    normalised_ND, new_residual_ND = _RmsNormResidual.apply(  # type: ignore[no-untyped-call]
        residual_ND, branch_ND, weight_D, eps, branch_scale
    )
    return normalised_ND, new_residual_ND


def rms_norm_reference(x_ND: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
    """The definition, computed in float32."""
    return F.rms_norm(x_ND.float(), weight_D.shape, weight_D.float(), eps).to(x_ND.dtype)


def rms_norm_residual_reference(
    residual_ND: Tensor, branch_ND: Tensor, weight_D: Tensor, *, eps: float, branch_scale: float
) -> tuple[Tensor, Tensor]:
    """The definition, computed in float32."""
    new_residual_ND = (residual_ND.float() + branch_scale * branch_ND.float()).to(residual_ND.dtype)
    return rms_norm_reference(new_residual_ND, weight_D, eps=eps).to(branch_ND.dtype), new_residual_ND


def _check_weight(x_ND: Tensor, weight_D: Tensor) -> None:
    if weight_D.shape != x_ND.shape[-1:]:
        raise ValueError(f"weight {tuple(weight_D.shape)} does not fit rows of {x_ND.shape[-1]}")


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        if choose_backend(x_ND, "rms_norm").name == "triton":
            from minicpm_kernels.rms_norm_triton import rms_norm_fwd

            normalised_ND: Tensor
            normalised_ND, rstd_N1 = rms_norm_fwd(x_ND, weight_D, eps)
        else:
            normalised_ND, rstd_N1 = _normalise(x_ND, weight_D, eps)
        ctx.save_for_backward(x_ND, weight_D, rstd_N1)
        return _as_type(normalised_ND, x_ND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_normalised_ND: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, weight_D, rstd_N1 = ctx.saved_tensors
        if choose_backend(x_ND, "rms_norm").name == "triton":
            from minicpm_kernels.rms_norm_triton import rms_norm_bwd

            return *rms_norm_bwd(x_ND, weight_D, rstd_N1, d_normalised_ND), None
        d_x_ND, d_weight_D = _gradients(x_ND, weight_D, rstd_N1, d_normalised_ND)
        return d_x_ND.to(x_ND.dtype), d_weight_D, None


class _RmsNormResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual_ND: Tensor, branch_ND: Tensor, weight_D: Tensor, eps: float, branch_scale: float
    ) -> tuple[Tensor, Tensor]:
        if choose_backend(residual_ND, "rms_norm").name == "triton":
            from minicpm_kernels.rms_norm_triton import rms_norm_residual_fwd

            normalised_ND, new_residual_ND, rstd_N1 = rms_norm_residual_fwd(
                residual_ND, branch_ND, weight_D, eps, branch_scale
            )
        else:
            new_residual_ND = _as_type(_add_scaled(residual_ND, branch_ND, branch_scale), residual_ND.dtype)
            normalised_ND, rstd_N1 = _normalise(new_residual_ND, weight_D, eps)
        ctx.save_for_backward(new_residual_ND, weight_D, rstd_N1)
        ctx.branch_dtype, ctx.branch_scale = branch_ND.dtype, branch_scale
        return _as_type(normalised_ND, branch_ND.dtype), new_residual_ND

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_normalised_ND: Tensor, d_new_residual_ND: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        new_residual_ND, weight_D, rstd_N1 = ctx.saved_tensors
        if choose_backend(new_residual_ND, "rms_norm").name == "triton":
            from minicpm_kernels.rms_norm_triton import rms_norm_residual_bwd

            gradients = rms_norm_residual_bwd(
                new_residual_ND, weight_D, rstd_N1, d_normalised_ND, d_new_residual_ND, ctx.branch_scale
            )
            return *gradients, None, None
        d_x_ND, d_weight_D = _gradients(new_residual_ND, weight_D, rstd_N1, d_normalised_ND)
        d_x_ND = d_x_ND.add_(d_new_residual_ND)
        d_branch_ND = (d_x_ND * ctx.branch_scale).to(ctx.branch_dtype)
        return d_x_ND.to(new_residual_ND.dtype), d_branch_ND, d_weight_D, None, None


def _add_scaled(residual_ND: Tensor, branch_ND: Tensor, branch_scale: float) -> Tensor:
    """residual + branch_scale · branch."""
    if torch.compiler.is_compiling():
        # Inductor makes one addmm of a product and the add after it, and drops alpha (torch 2.13): not alpha here.
        return residual_ND + branch_scale * branch_ND
    return torch.add(residual_ND, branch_ND, alpha=branch_scale)


def _as_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, without a call where there is nothing to convert.

    torch.compile of torch 2.11 loses the gradient of an output of an autograd function that came by an op returning
    its own input (github.com/pytorch/pytorch/issues/180642).
    """
    return x if x.dtype == dtype else x.to(dtype)


def _normalise(x_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(normalised, 1 / root mean square (N, 1)), both float32."""
    x_ND = _as_type(x_ND, torch.float32)
    rstd_N1 = x_ND.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    if torch.compiler.is_compiling():  # in place it would be such an op
        return x_ND * rstd_N1 * weight_D, rstd_N1
    return (x_ND * rstd_N1).mul_(weight_D), rstd_N1


def _gradients(
    x_ND: Tensor, weight_D: Tensor, rstd_N1: Tensor, d_normalised_ND: Tensor
) -> tuple[Tensor, Tensor]:
    """(d_x in float32, d_weight in its own dtype): a fraction of the passes that torch's own backward makes."""
    unit_ND = x_ND.float() * rstd_N1
    d_normalised_ND = d_normalised_ND.float()
    product_ND = d_normalised_ND * unit_ND
    d_weight_D = product_ND.flatten(0, -2).sum(0).to(weight_D.dtype)
    mean_N1 = (product_ND @ weight_D.float()[:, None]).div_(-x_ND.shape[-1])
    d_x_ND = (d_normalised_ND * weight_D).addcmul_(unit_ND, mean_N1).mul_(rstd_N1)
    return d_x_ND, d_weight_D
