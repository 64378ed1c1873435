"""The mixture-of-experts feed-forward (paper, section 6.4).

Legend: N tokens of a packed batch, D model width, F feed-forward width, E experts, A experts per token.
"""

from __future__ import annotations

import torch
from minicpm_kernels import moe_layer
from torch import Tensor, nn

from minicpm_edge.model.config import ModelConfig


class MixtureOfExperts(nn.Module):
    """Each token goes to its A of E SwiGLU experts, weighted by the renormalised router: (N, D) → (N, D).

    Weights: ``router`` (E, D), ``gate_up`` (E, 2F, D), ``down`` (E, D, F).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        num_experts, hidden, width = config.num_experts, config.hidden_size, config.intermediate_size
        self.num_experts_per_tok = config.num_experts_per_tok
        self.router = nn.Linear(hidden, num_experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * width, hidden))
        self.down = nn.Parameter(torch.empty(num_experts, hidden, width))

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Route, compute, combine; returns (output, load-balance loss), the latter 0-d and 1 when even."""
        result = moe_layer(
            x_ND, self.router.weight, self.gate_up, self.down, num_experts_per_tok=self.num_experts_per_tok
        )
        return result.out_ND, result.load_balance_loss
