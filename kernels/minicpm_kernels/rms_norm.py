"""RMSNorm, alone and fused with the residual add. (Reference only, by the lead, to unblock the model; helper C replaces it.)"""

from torch import Tensor
from torch.nn import functional as F


def rms_norm(x_ND: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
    return F.rms_norm(x_ND, (x_ND.shape[-1],), weight_D, eps)


def rms_norm_residual(
    residual_ND: Tensor, branch_ND: Tensor, weight_D: Tensor, *, eps: float, branch_scale: float
) -> tuple[Tensor, Tensor]:
    new_residual_ND = residual_ND + branch_scale * branch_ND
    return rms_norm(new_residual_ND, weight_D, eps=eps), new_residual_ND
