"""SwiGLU on the merged output. (Reference only, by the lead, to unblock the model; helper C replaces it.)"""

from torch import Tensor
from torch.nn import functional as F


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    gate, up = gate_up_N2F.chunk(2, -1)
    return F.silu(gate) * up
