"""The mixture-of-experts ops as torch sees them: opaque to torch.compile, with their shapes and gradients.

How many rows an expert gets is data, so neither the loop over experts nor a kernel's launch can be traced; an op of its
own keeps the graph around it whole. Which implementation runs is decided when it runs.

Shapes: N tokens, A experts a token, E experts, D model width, F hidden width of an expert, R = N·A.
"""

import os
from typing import Any

import torch
from torch import Tensor

from minicpm_kernels.backend import OVERRIDE_VARIABLE, choose_backend, unsupported_reason_to_large_tiles
from minicpm_kernels.moe import reference as moe_reference


def uses_triton(tensor: Tensor, op: str) -> bool:
    """Whether the Triton kernels serve this tensor; they compute in float32, so float64 goes to plain torch."""
    if tensor.dtype == torch.float64 or choose_backend(tensor, op).name != "triton":
        return False
    unsupported_reason = (
        unsupported_reason_to_large_tiles(tensor.device) if tensor.is_cuda and op == "moe_experts" else ""
    )
    if unsupported_reason and os.environ.get(OVERRIDE_VARIABLE) == "triton":
        raise RuntimeError(
            f"{op}: {OVERRIDE_VARIABLE}=triton, but {unsupported_reason}; unset {OVERRIDE_VARIABLE}"
        )
    return not unsupported_reason


@torch.library.custom_op("minicpm_kernels::moe_experts", mutates_args=())
def experts_op(
    x_ND: Tensor,
    weights_NA: Tensor,
    experts_NA: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    save_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """out_ND, and hidden_R2F for the backward (no rows unless ``save_hidden``)."""
    forward = moe_reference.moe_experts_forward
    if uses_triton(x_ND, "moe_experts"):
        from minicpm_kernels.moe import triton_experts as moe_triton

        forward = moe_triton.moe_experts_forward
    with torch.cuda.device_of(x_ND):
        return forward(x_ND, weights_NA, experts_NA, gate_up_E2FD, down_EDF, save_hidden=save_hidden)


@experts_op.register_fake
def _(
    x_ND: Tensor,
    weights_NA: Tensor,
    experts_NA: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    save_hidden: bool,
) -> tuple[Tensor, Tensor]:
    num_rows = weights_NA.shape[0] * weights_NA.shape[1] if save_hidden else 0
    return x_ND.new_empty(x_ND.shape), x_ND.new_empty(num_rows, gate_up_E2FD.shape[1])


@torch.library.custom_op("minicpm_kernels::moe_experts_backward", mutates_args=())
def experts_backward_op(
    grad_ND: Tensor,
    x_ND: Tensor,
    weights_NA: Tensor,
    experts_NA: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    hidden_R2F: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x_ND, weights_NA, gate_up_E2FD and down_EDF, from that of out_ND."""
    backward = moe_reference.moe_experts_backward
    if uses_triton(x_ND, "moe_experts"):
        from minicpm_kernels.moe import triton_experts as moe_triton

        backward = moe_triton.moe_experts_backward
    with torch.cuda.device_of(x_ND):
        return backward(grad_ND, x_ND, weights_NA, experts_NA, gate_up_E2FD, down_EDF, hidden_R2F)


@experts_backward_op.register_fake
def _(
    grad_ND: Tensor,
    x_ND: Tensor,
    weights_NA: Tensor,
    experts_NA: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    hidden_R2F: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # A compiled graph trusts these strides: contiguous, whatever those of the inputs.
    return (
        x_ND.new_empty(x_ND.shape),
        weights_NA.new_empty(weights_NA.shape),
        gate_up_E2FD.new_empty(gate_up_E2FD.shape),
        down_EDF.new_empty(down_EDF.shape),
    )


def _save_experts(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden_R2F = output[1]
    ctx.save_for_backward(*inputs[:5], hidden_R2F)
    ctx.mark_non_differentiable(hidden_R2F)
    ctx.set_materialize_grads(False)  # else hidden_R2F, the largest tensor here, gets a gradient of zeros


def _experts_gradient(ctx: Any, grad_ND: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_ND is None:
        return (None,) * 6
    dx_ND, dweights_NA, dgate_up_E2FD, ddown_EDF = experts_backward_op(grad_ND, *ctx.saved_tensors)
    return dx_ND, dweights_NA, None, dgate_up_E2FD, ddown_EDF, None


experts_op.register_autograd(_experts_gradient, setup_context=_save_experts)


@torch.library.custom_op("minicpm_kernels::moe_router", mutates_args=())
def router_op(logits_NE: Tensor, num_experts_per_tok: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The router's Triton kernels; plain torch needs no op, because autograd and the compiler see through it."""
    from minicpm_kernels.moe import triton_router as moe_triton_router

    with torch.cuda.device_of(logits_NE):
        return moe_triton_router.router_forward(logits_NE.contiguous(), num_experts_per_tok)


@router_op.register_fake
def _(logits_NE: Tensor, num_experts_per_tok: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_tokens, num_experts = logits_NE.shape
    return (
        logits_NE.new_empty(num_tokens, num_experts_per_tok),
        logits_NE.new_empty(num_tokens, num_experts_per_tok, dtype=torch.int32),
        logits_NE.new_empty(()),
        logits_NE.new_empty(()),
        logits_NE.new_empty(num_experts),
    )


@torch.library.custom_op("minicpm_kernels::moe_router_backward", mutates_args=())
def router_backward_op(
    logits_NE: Tensor,
    weights_NA: Tensor,
    experts_NA: Tensor,
    fraction_E: Tensor,
    dweights_NA: Tensor,
    dload_balance: Tensor,
    dz: Tensor,
) -> Tensor:
    """Gradient of the logits."""
    from minicpm_kernels.moe import triton_router as moe_triton_router

    with torch.cuda.device_of(logits_NE):
        return moe_triton_router.router_backward(
            logits_NE.contiguous(),
            weights_NA.contiguous(),
            experts_NA.contiguous(),
            fraction_E,
            dweights_NA.contiguous(),
            dload_balance,
            dz,
        )


@router_backward_op.register_fake
def _(
    logits_NE: Tensor,
    weights_NA: Tensor,
    experts_NA: Tensor,
    fraction_E: Tensor,
    dweights_NA: Tensor,
    dload_balance: Tensor,
    dz: Tensor,
) -> Tensor:
    return logits_NE.new_empty(logits_NE.shape)


def _save_router(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    weights_NA, experts_NA, _, _, fraction_E = output
    ctx.save_for_backward(inputs[0], weights_NA, experts_NA, fraction_E)
    ctx.mark_non_differentiable(experts_NA, fraction_E)


def _router_gradient(
    ctx: Any, dweights_NA: Tensor, _: Tensor, dload_balance: Tensor, dz: Tensor, __: Tensor
) -> tuple[Tensor, None]:
    return router_backward_op(*ctx.saved_tensors, dweights_NA, dload_balance, dz), None


router_op.register_autograd(_router_gradient, setup_context=_save_router)
