"""The experts through the Triton kernels, forward and backward: the order of the launches.

Shapes: N tokens, A experts a token, E experts, D model width, F hidden width of an expert, R = N·A sorted rows.
"""

import torch
from torch import Tensor

from minicpm_kernels.moe.triton_gemm import UP_TILES, multiply_rows, tiles_for, up_projection
from minicpm_kernels.moe.triton_gemm_bwd import down_backward, weight_gradients
from minicpm_kernels.moe.triton_permute import Plan, combine, make_plan, weight_gradient


def moe_experts_forward(
    x_ND: Tensor,
    weights_NA: Tensor,
    experts_NA: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    *,
    save_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """out_ND, and hidden_R2F for the backward (no rows unless ``save_hidden``)."""
    x_ND, weights_NA, gate_up_E2FD, down_EDF = map(_readable, (x_ND, weights_NA, gate_up_E2FD, down_EDF))
    if len(x_ND) == 0:
        return torch.empty_like(x_ND), x_ND.new_empty(0, gate_up_E2FD.shape[1])
    plan = _plan(experts_NA, x_ND, gate_up_E2FD)
    activation_RF, hidden_R2F = up_projection(
        x_ND, gate_up_E2FD, plan, weights_NA.shape[1], save_hidden=save_hidden
    )
    y_RD = multiply_rows(activation_RF, down_EDF, plan, transposed=False)
    return combine(y_RD, plan, weights_NA), hidden_R2F


def moe_experts_backward(
    grad_ND: Tensor,
    x_ND: Tensor,
    weights_NA: Tensor,
    experts_NA: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    hidden_R2F: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x_ND, weights_NA, gate_up_E2FD and down_EDF, from that of out_ND."""
    grad_ND, x_ND, weights_NA, gate_up_E2FD, down_EDF = map(
        _readable, (grad_ND, x_ND, weights_NA, gate_up_E2FD, down_EDF)
    )
    if len(x_ND) == 0:
        return (
            torch.empty_like(x_ND),
            torch.empty_like(weights_NA),
            torch.zeros_like(gate_up_E2FD),
            torch.zeros_like(down_EDF),
        )
    plan = _plan(experts_NA, x_ND, gate_up_E2FD)  # three small launches, cheaper than five more saved tensors
    dhidden_R2F, weighted_RF, partial_RM = down_backward(grad_ND, weights_NA, down_EDF, hidden_R2F, plan)
    dweights_NA = weight_gradient(partial_RM, plan)
    ddown_EDF = weight_gradients(weighted_RF, grad_ND, plan, sorted_rows=False)
    del weighted_RF, partial_RM
    dx_RD = multiply_rows(dhidden_R2F, gate_up_E2FD, plan, transposed=True)
    dx_ND = combine(dx_RD, plan, None)
    del dx_RD
    return dx_ND, dweights_NA, weight_gradients(dhidden_R2F, x_ND, plan, sorted_rows=True), ddown_EDF


def _plan(experts_NA: Tensor, x_ND: Tensor, gate_up_E2FD: Tensor) -> Plan:
    return make_plan(experts_NA.contiguous(), gate_up_E2FD.shape[0], tiles_for(x_ND.dtype, UP_TILES).rows)


def _readable(tensor: Tensor) -> Tensor:
    """The tensor itself where TMA and 16-byte copies can read it, else a copy."""
    if tensor.is_contiguous() and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
