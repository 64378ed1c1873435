"""Mixture of experts: a router with its losses, and a layer of SwiGLU experts.

Shapes: N tokens, A experts a token, E experts, D model width, F hidden width of an expert, R = N·A.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minicpm_kernels.backend import autocasts
from minicpm_kernels.moe import op as moe_ops
from minicpm_kernels.moe import reference as moe_reference

# The copy engine wants rows at multiples of 16 bytes, and the compiler must see that 16-byte copies are aligned.
_WIDTH_MULTIPLE = 16


class MoeRouting(NamedTuple):
    """Which experts see each token, by what weight, and the two losses that keep the router healthy."""

    weights_NA: Tensor  # float32, each row sums to 1, largest first; differentiable
    experts_NA: Tensor  # int32
    load_balance_loss: Tensor  # 0-d; 1 when the experts share tokens and probability evenly
    z_loss: Tensor  # 0-d


class MoeOutput(NamedTuple):
    """The output of a whole mixture-of-experts layer."""

    out_ND: Tensor
    load_balance_loss: Tensor  # 0-d, unscaled
    z_loss: Tensor  # 0-d, unscaled


def moe_layer(
    x_ND: Tensor,
    router_weight_ED: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    *,
    num_experts_per_tok: int,
) -> MoeOutput:
    """A whole layer: router, then SwiGLU experts (Shazeer et al., arXiv 1701.06538; MiniCPM, section 6.4).

    Args:
        x_ND: tokens, float32, bfloat16 or float16; under autocast the experts compute in its dtype.
        router_weight_ED: the router's matrix; its logits are float32 whatever the model's type.
        gate_up_E2FD: gate and up of every expert, one below the other. down_EDF: its matrix down.
        num_experts_per_tok: how many experts see a token, 1 to E.

    Returns the output (N, D) in the type of ``x_ND``, and the router's two losses, which the caller scales (MiniCPM:
    load balance by 0.01).

    Raises ``ValueError`` or ``TypeError`` for shapes and types that do not fit, ``ValueError`` for a number of experts
    a token that there is not.
    """
    # In float32 whatever the model's type, and outside autocast: a rounded logit can change which experts are chosen.
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    with torch.autocast(x_ND.device.type, enabled=False) if autocasts(x_ND) else nullcontext():
        logits_NE = F.linear(x_ND.to(wide), router_weight_ED.to(wide))
    routing = moe_router(logits_NE, num_experts_per_tok)
    out_ND = moe_experts(x_ND, routing.weights_NA, routing.experts_NA, gate_up_E2FD, down_EDF)
    return MoeOutput(out_ND, routing.load_balance_loss, routing.z_loss)


def moe_router(logits_NE: Tensor, num_experts_per_tok: int) -> MoeRouting:
    """Softmax over the experts, the best ``num_experts_per_tok`` of them, their weights renormalised to sum to 1.

    ``logits_NE`` are (N, E). Returns weights float32 and experts int32, both (N, A), largest weight first, and two 0-d
    losses. A tie goes to the lower expert. The load-balance loss is E · Σ_e f_e · P_e, with f_e the fraction of all
    choices that fell on expert e and P_e its mean probability (Switch Transformer, arXiv 2101.03961, equation 4);
    gradients flow through P. The z-loss is the mean of logsumexp(logits)² (ST-MoE, arXiv 2202.08906, equation 5).

    Raises ``TypeError`` unless the logits are float32 (or float64), ``ValueError`` for a shape that cannot be.
    """
    _check_router(logits_NE, num_experts_per_tok)
    if moe_ops.uses_triton(logits_NE, "moe_router"):
        return MoeRouting(*moe_ops.router_op(logits_NE, num_experts_per_tok)[:4])
    return MoeRouting(*moe_reference.moe_router_reference(logits_NE, num_experts_per_tok))


def moe_experts(
    x_ND: Tensor, weights_NA: Tensor, experts_NA: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """out_ND = Σ_k weights[:, k] · down[e] (silu(gate[e] x) · (up[e] x)), where e = experts[:, k].

    Args:
        x_ND: tokens, float32, bfloat16 or float16.
        weights_NA, experts_NA: of ``moe_router``, float32 and int32.
        gate_up_E2FD: for each expert the rows of gate, then those of up, in the type of x. down_EDF: likewise.

    The result is (N, D) in the type of x. No token is dropped, as in MegaBlocks (arXiv 2211.15841): any number of them
    may choose an expert, none included. Differentiable in all but ``experts_NA``, whose ids must lie in [0, E).
    Sums are in float32. Under autocast x and the matrices are cast first, as by a linear layer.

    Raises ``TypeError`` or ``ValueError``, naming the argument, for types and shapes that do not fit together.
    """
    if autocasts(x_ND):
        dtype = torch.get_autocast_dtype(x_ND.device.type)
        x_ND, gate_up_E2FD, down_EDF = x_ND.to(dtype), gate_up_E2FD.to(dtype), down_EDF.to(dtype)
    _check_experts(x_ND, weights_NA, experts_NA, gate_up_E2FD, down_EDF)
    learns = any(tensor.requires_grad for tensor in (x_ND, weights_NA, gate_up_E2FD, down_EDF))
    out_ND: Tensor = moe_ops.experts_op(
        x_ND, weights_NA, experts_NA, gate_up_E2FD, down_EDF, learns and torch.is_grad_enabled()
    )[0]
    return out_ND


def _check_router(logits_NE: Tensor, num_experts_per_tok: int) -> None:
    if logits_NE.dim() != 2:
        raise ValueError(f"moe_router: logits must have shape (N, E), not {tuple(logits_NE.shape)}")
    if logits_NE.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"moe_router: logits must be float32, not {logits_NE.dtype}; a narrower type misroutes"
        )
    if not 1 <= num_experts_per_tok <= logits_NE.shape[1]:
        raise ValueError(
            f"moe_router: num_experts_per_tok must lie in 1 to {logits_NE.shape[1]} (the experts there are), "
            f"not {num_experts_per_tok}"
        )


def _check_experts(
    x_ND: Tensor, weights_NA: Tensor, experts_NA: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> None:
    if x_ND.dim() != 2 or weights_NA.dim() != 2 or down_EDF.dim() != 3:
        raise ValueError(
            "moe_experts: x must have shape (N, D), weights (N, A) and down (E, D, F), "
            f"not {tuple(x_ND.shape)}, {tuple(weights_NA.shape)} and {tuple(down_EDF.shape)}"
        )
    num_tokens, width = x_ND.shape
    num_experts, _, hidden = down_EDF.shape
    expected = {
        "weights": (weights_NA, (num_tokens, weights_NA.shape[1])),
        "experts": (experts_NA, tuple(weights_NA.shape)),
        "gate_up": (gate_up_E2FD, (num_experts, 2 * hidden, width)),
        "down": (down_EDF, (num_experts, width, hidden)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"moe_experts: {name} must have shape {shape} here, not {tuple(tensor.shape)}")
        if tensor.device != x_ND.device:
            raise ValueError(f"moe_experts: {name} is on {tensor.device}, but x on {x_ND.device}")
    if weights_NA.shape[1] == 0:
        raise ValueError("moe_experts: every token needs at least one expert, but weights has shape (N, 0)")
    if (width % _WIDTH_MULTIPLE or hidden % _WIDTH_MULTIPLE) and moe_ops.uses_triton(x_ND, "moe_experts"):
        raise ValueError(
            f"moe_experts: the Triton kernels need D and F to be multiples of {_WIDTH_MULTIPLE}, not {width} and "
            f"{hidden}; set MINICPM_KERNELS=reference for plain torch"
        )
    if experts_NA.dtype != torch.int32:
        raise TypeError(f"moe_experts: experts must be int32, not {experts_NA.dtype}")
    if not (x_ND.dtype == gate_up_E2FD.dtype == down_EDF.dtype):
        raise TypeError(
            "moe_experts: x, gate_up and down must share one type, "
            f"not {x_ND.dtype}, {gate_up_E2FD.dtype} and {down_EDF.dtype}"
        )
    if weights_NA.dtype != torch.promote_types(x_ND.dtype, torch.float32):
        raise TypeError(
            f"moe_experts: weights must be float32 beside a {x_ND.dtype} x, not {weights_NA.dtype}"
        )
