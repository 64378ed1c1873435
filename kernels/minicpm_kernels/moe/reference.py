"""The mixture-of-experts ops in plain torch: what the kernels must compute, and the path of every CPU.

Shapes: N tokens, A experts a token, E experts, D model width, F hidden width of an expert, R = N·A sorted rows (one
for each pair of a token and one of its experts, grouped by expert).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def moe_router_reference(
    logits_NE: Tensor, num_experts_per_tok: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose experts: (weights_NA, experts_NA int32, load-balance loss, z-loss). See :func:`moe.moe_router`."""
    num_tokens, num_experts = logits_NE.shape
    # A stable sort, unlike topk, promises that the lower expert wins a tie, on every device.
    order_NE = logits_NE.detach().sort(dim=-1, descending=True, stable=True).indices
    experts_NA = order_NE[:, :num_experts_per_tok].int()
    chosen_NAE = experts_NA[..., None] == torch.arange(num_experts, device=logits_NE.device)
    # The softmax over the chosen logits is the softmax over all of them, renormalised. They are picked by a mask,
    # because the scatter in the backward of sort or gather is misplaced by inductor's CPU code (torch 2.13): it adds
    # up the gradients of the logits before it has scattered into them.
    weights_NA = torch.where(chosen_NAE, logits_NE[:, None, :], 0).sum(-1).softmax(-1)

    num_rows = max(num_tokens, 1)  # no token at all: both losses are 0, not NaN
    fraction_E = chosen_NAE.sum((0, 1)).to(logits_NE.dtype) / (num_rows * num_experts_per_tok)
    probability_E = logits_NE.softmax(-1).sum(0) / num_rows
    load_balance_loss = num_experts * (fraction_E * probability_E).sum()
    z_loss = logits_NE.logsumexp(-1).square().sum() / num_rows
    return weights_NA, experts_NA, load_balance_loss, z_loss


def moe_experts_forward(
    x_ND: Tensor,
    weights_NA: Tensor,
    experts_NA: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    *,
    save_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """out_ND, and hidden_R2F: what the first matmul gave, all that the backward needs (no rows if not saved)."""
    groups = _Groups.of(experts_NA, gate_up_E2FD.shape[0])
    x_RD = x_ND.index_select(0, groups.token_R)
    hidden_R2F = x_ND.new_empty(len(x_RD) if save_hidden else 0, gate_up_E2FD.shape[1])
    y_RD = torch.empty_like(x_RD)
    for expert, rows in groups:
        hidden = F.linear(x_RD[rows], gate_up_E2FD[expert])
        if save_hidden:
            hidden_R2F[rows] = hidden
        gate, up = hidden.chunk(2, dim=-1)
        y_RD[rows] = F.linear(F.silu(gate) * up, down_EDF[expert])
    y_NAD = y_RD.index_select(0, groups.slot_R).view(*weights_NA.shape, x_ND.shape[1])
    return (y_NAD * weights_NA[..., None]).sum(1).to(x_ND.dtype), hidden_R2F


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
    groups = _Groups.of(experts_NA, gate_up_E2FD.shape[0])
    dtype = x_ND.dtype
    wide = torch.promote_types(dtype, torch.float32)
    weight_R1 = weights_NA.reshape(-1, 1)[groups.order_R]
    x_RD, grad_RD = x_ND.index_select(0, groups.token_R), grad_ND.index_select(0, groups.token_R)
    dx_RD, dweight_R = torch.empty_like(x_RD), weights_NA.new_empty(weights_NA.numel())
    dgate_up_E2FD = gate_up_E2FD.new_zeros(gate_up_E2FD.shape)
    ddown_EDF = down_EDF.new_zeros(down_EDF.shape)
    for expert, rows in groups:
        gate, up = hidden_R2F[rows].to(wide).chunk(2, dim=-1)
        sigmoid = gate.sigmoid()
        activation = gate * sigmoid * up
        # The gradient of the activation before the router's weight: its product with the activation is the weight's
        # own gradient, so the expert's output is never computed again.
        unweighted = (grad_RD[rows] @ down_EDF[expert]).to(wide)
        dweight_R[rows] = (unweighted * activation).sum(-1).to(weights_NA.dtype)
        dactivation = unweighted * weight_R1[rows]
        dgate = dactivation * up * sigmoid * (1 + gate * (1 - sigmoid))
        dhidden = torch.cat((dgate, dactivation * gate * sigmoid), dim=-1).to(dtype)
        ddown_EDF[expert] = grad_RD[rows].T @ (activation * weight_R1[rows]).to(dtype)
        dgate_up_E2FD[expert] = dhidden.T @ x_RD[rows]
        dx_RD[rows] = dhidden @ gate_up_E2FD[expert]
    dx_ND = (
        dx_RD.index_select(0, groups.slot_R).view(*weights_NA.shape, x_ND.shape[1]).to(wide).sum(1).to(dtype)
    )
    return dx_ND, dweight_R.index_select(0, groups.slot_R).view_as(weights_NA), dgate_up_E2FD, ddown_EDF


@dataclass(frozen=True, kw_only=True)
class _Groups:
    """The pairs of token and expert, sorted by expert and, within one, in the order of the tokens."""

    order_R: Tensor  # pair n·K + k that stands at each sorted row
    slot_R: Tensor  # its inverse: the sorted row of each pair
    token_R: Tensor  # token of each sorted row
    counts: list[int]  # rows of each expert

    @classmethod
    def of(cls, experts_NA: Tensor, num_experts: int) -> "_Groups":
        pairs_R = experts_NA.reshape(-1)
        if pairs_R.numel() and not (pairs_R.min() >= 0 and pairs_R.max() < num_experts):
            raise ValueError(
                f"moe_experts: experts must lie in 0 to {num_experts - 1}, "
                f"not {pairs_R.min().item()} to {pairs_R.max().item()}"
            )
        order_R = pairs_R.argsort(stable=True)
        return cls(
            order_R=order_R,
            slot_R=order_R.argsort(),
            token_R=order_R // experts_NA.shape[1],
            counts=torch.bincount(pairs_R, minlength=num_experts).tolist(),
        )

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        """Each expert that has rows, with them."""
        start = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, slice(start, start + count)
            start += count
