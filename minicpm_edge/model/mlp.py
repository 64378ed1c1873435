"""The dense feed-forward: SwiGLU, or the same with a thresholded ReLU (MiniCPM-S).

Legend: N tokens of a packed batch, D model width, F feed-forward width.
"""

from __future__ import annotations

from minicpm_kernels import swiglu
from torch import Tensor, nn
from torch.nn import functional as F

from minicpm_edge.model.config import ModelConfig


class FeedForward(nn.Module):
    """down(act(gate(x)) · up(x)): (N, D) → (N, D). Gate and up are one matrix, 2F × D."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.threshold = config.hidden_act_param if config.hidden_act == "fatrelu" else None

    def forward(self, x_ND: Tensor) -> Tensor:
        """One position at a time; nothing is mixed between tokens."""
        gate_up_N2F = self.gate_up(x_ND)
        if self.threshold is None:
            hidden_NF = swiglu(gate_up_N2F)
        else:
            gate_NF, up_NF = gate_up_N2F.chunk(2, -1)
            hidden_NF = F.threshold(gate_NF, self.threshold, 0.0) * up_NF
        out_ND: Tensor = self.down(hidden_NF)
        return out_ND
