"""The mixture-of-experts feed-forward (paper, section 6.4).

Legend: N tokens, D model, E experts, F width of one expert.
"""

from __future__ import annotations

import torch
from minicpm_kernels import moe_layer
from torch import Tensor, nn

from minicpm_edge.config import ModelConfig


class MixtureOfExperts(nn.Module):
    """Each token goes to its top-k of E SwiGLU experts, weighted by the renormalised router: (N, D) → (N, D).

    After a forward pass ``load_balance_loss`` and ``router_z_loss`` hold that pass's losses (0-d), for the
    training objective to add.
    """

    load_balance_loss: Tensor
    router_z_loss: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        num_experts, hidden, width = config.num_experts, config.hidden_size, config.intermediate_size
        self.num_experts_per_tok = config.num_experts_per_tok
        self.router = nn.Linear(hidden, num_experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * width, hidden))
        self.down = nn.Parameter(torch.empty(num_experts, hidden, width))

    def forward(self, x_ND: Tensor) -> Tensor:
        """Route, compute, combine."""
        out_ND, self.load_balance_loss, self.router_z_loss = moe_layer(
            x_ND, self.router.weight, self.gate_up, self.down, num_experts_per_tok=self.num_experts_per_tok
        )
        return out_ND
