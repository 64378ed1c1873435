"""The dense feed-forward: SwiGLU.

Legend: N tokens of a packed batch, D model width, F feed-forward width.
"""

from __future__ import annotations

from minicpm_kernels import swiglu
from torch import Tensor, nn

from minicpm_edge.model.config import ModelConfig


class FeedForward(nn.Module):
    """down(silu(gate(x)) · up(x)): (N, D) → (N, D). Gate and up are one matrix, 2F × D."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        """One position at a time; nothing is mixed between tokens."""
        hidden_NF = swiglu(self.gate_up(x_ND))
        out_ND: Tensor = self.down(hidden_NF)
        return out_ND
